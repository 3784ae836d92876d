"""Splits an answer's text, as it is generated, into content, reasoning and tool calls.

One parser per sequence, between its detokenizer and its stop strings; used by `worker.loop.sequence`. The output does not depend on
how the text was cut into pieces, so a takeover that replays the tokens gets the same result.
"""

from __future__ import annotations

from common.protocol import ChatPrompt, GenerationJob, Reasoning, ToolCall
from worker.text import answer_format
from worker.text.answer_format import NORMAL, REASONING, TOOL, CallFormat, ModelFormat
from worker.text.detokenizer import TokenBytes
from worker.text.stop_strings import StopMatcher
from worker.text.tool_calls import CallableTools, CallParser, HermesCallParser, NativeCallParser, Part


def make_parser(
    job: GenerationJob, model_format: ModelFormat, prompt: list[int], token_bytes: TokenBytes
) -> AnswerParser | None:
    """Create the parser of a job's answer; None if the complete answer is content.

    Args:
        prompt: Token ids; if they end with open reasoning, the answer begins with reasoning.
    """
    if not isinstance(job.prompt, ChatPrompt):
        return None
    call_format = answer_format.choose_call_format(job, model_format)
    if call_format is CallFormat.NONE and not model_format.transitions:
        return None
    return AnswerParser(
        job, model_format, answer_format.initial_state(job, model_format, prompt, token_bytes)
    )


class AnswerParser:
    """See the module.

    White space around reasoning and calls belongs to neither and is not content, so that an answer of calls has no content.

    Attributes:
        has_call: Whether the answer has a tool call so far.
        is_finished: Whether the answer is complete: it has the only call allowed, or its format ended it.

    Args:
        state: The state in which the answer begins.
    """

    def __init__(self, job: GenerationJob, model_format: ModelFormat, state: str) -> None:
        self.has_call = False
        self.is_finished = False
        self._model_format = model_format
        self._call_format = answer_format.choose_call_format(job, model_format)
        use = job.tool_use
        self._is_parallel = use is None or use.is_parallel
        self._is_required = use is not None and (use.is_required or use.function is not None)
        self._tools = CallableTools(
            use.tools if use else [], use.function if use else None, is_parallel=self._is_parallel
        )
        transitions = answer_format.transitions_with_calls(self._call_format, model_format, state)
        self._transitions = {each: dict(edges) for each, edges in transitions.items()}
        self._num_calls = 0
        self._call: CallParser | None = None
        self._held_space = ""  # white space at the beginning of content, or at the end of reasoning
        self._is_first = True  # the answer is only white space so far
        self._has_reasoned = False
        self._space_before_call = ""  # of an answer that begins with what looks like a call
        self._is_at_state_start = True  # only white space so far in this state
        self._enter_state(state)

    @property
    def is_reasoning(self) -> bool:
        """Whether the text that comes next is reasoning."""
        return self._state == REASONING and self._call is None

    @property
    def holds_content(self) -> bool:
        """Whether held-back text may still be released as content."""
        if self._call is not None:
            return self._call.may_be_content
        return self._state == NORMAL and (bool(self._held_space) or self._markers.is_holding)

    def feed(self, text: str) -> list[Part]:
        """Add text.

        Returns:
            The parts that are certain now, in order; may be empty.
        """
        parts: list[Part] = []
        while text and not self.is_finished:
            if self._call is not None:
                text = self._feed_call(self._call, text, parts)
                continue
            certain, marker, text = self._markers.split(text)
            self._emit_text(certain, parts)
            if marker is not None:
                self._follow_marker(marker)
        return parts

    def feed_token(self, text: str) -> tuple[list[Part], bool]:
        """As `feed`, with one token's text; also returns whether the token counts as reasoning: if any of its text is."""
        was_reasoning = self.is_reasoning
        parts = self.feed(text)
        is_reasoning = (
            was_reasoning or self.is_reasoning or any(isinstance(part, Reasoning) for part in parts)
        )
        return parts, is_reasoning

    def flush(self, *, is_cut: bool) -> list[Part]:
        """Release held-back text at the end of the answer.

        Args:
            is_cut: Whether the answer was cut by its length.
        """
        parts = self._release_held(is_cut=is_cut)
        if is_cut and self._is_required:  # the client asked for a call: the fragment of one is not content
            return [part for part in parts if not isinstance(part, str)]
        return parts

    def _release_held(self, *, is_cut: bool) -> list[Part]:
        parts: list[Part] = []
        if self.is_finished:
            return parts
        if self._call is not None:
            self._emit_call_parts(self._call.flush(is_cut=is_cut), parts)
            self._call = None
            return parts
        self._emit_text(self._markers.flush(), parts)
        if self._state == NORMAL and self._held_space:  # the answer is only white space
            parts.append(self._held_space)
        self._held_space = ""
        return parts

    def _emit_text(self, text: str, parts: list[Part]) -> None:
        if not text or self._state not in (NORMAL, REASONING):
            return
        if self._state == REASONING:
            self._emit_reasoning(text, parts)
            return
        if self._is_at_state_start:
            text = self._held_space + text if self._is_first else text.lstrip()
            self._held_space = "" if text.strip() else text
            if self._held_space or not text:
                return
            self._is_at_state_start = self._is_first = False
        parts.append(text)

    def _emit_reasoning(self, text: str, parts: list[Part]) -> None:
        text = self._held_space + text
        if self._is_at_state_start:
            text = text.lstrip()
        reasoning = text.rstrip()
        self._held_space = text[len(reasoning) :]
        if not reasoning:
            return
        if self._is_at_state_start and self._has_reasoned:
            reasoning = f"\n{reasoning}"
        self._is_at_state_start, self._has_reasoned = False, True
        parts.append(Reasoning(reasoning))

    def _follow_marker(self, marker: str) -> None:
        target = self._transitions[self._state][marker]
        if target is None:
            self.is_finished = True
        elif target == TOOL:
            self._space_before_call, self._held_space = self._held_space, ""
            self._call = self._make_call_parser(marker)
        elif target != self._state:
            self._is_first = False
            self._enter_state(target)

    def _enter_state(self, state: str) -> None:
        self._state = state
        self._markers = StopMatcher(tuple(self._transitions.get(state, ())))
        self._held_space, self._is_at_state_start = "", True

    def _make_call_parser(self, start: str) -> CallParser:
        if self._call_format is CallFormat.HERMES:
            return HermesCallParser(start, self._tools, self._num_calls)
        parse = self._model_format.parse_call
        assert parse is not None
        ends = [marker for marker, _ in self._model_format.call_ends]
        return NativeCallParser(start, ends, parse, self._tools, self._num_calls)

    def _feed_call(self, call: CallParser, text: str, parts: list[Part]) -> str:
        """Feed the call's parser; returns the text after the call, empty while it goes on."""
        result = call.feed(text)
        is_content = self._emit_call_parts(result.parts, parts)
        if result.rest is None:
            return ""
        self._call = None
        self.is_finished = not self._is_parallel and not is_content
        is_native = self._call_format is CallFormat.NATIVE
        target = dict(self._model_format.call_ends).get(result.end) if is_native else NORMAL
        self._is_first = False
        self._enter_state(target or NORMAL)
        self._is_at_state_start = not is_content
        return result.rest

    def _emit_call_parts(self, call_parts: list[Part], parts: list[Part]) -> bool:
        """Append what a call's parser returned; returns whether it was content, that is, not a call."""
        for part in call_parts:
            if isinstance(part, ToolCall):
                self.has_call = True
                self._num_calls += 1
            elif isinstance(part, str) and self._space_before_call:
                parts.append(self._space_before_call)
            self._space_before_call = ""
        parts += call_parts
        return any(isinstance(part, str) for part in call_parts)
