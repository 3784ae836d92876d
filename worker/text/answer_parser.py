"""An answer's text, as it becomes certain, taken apart: content, reasoning and calls.

One parser a row, between its detokenizer and its stop strings; used by `worker.loop.sequence`. Fed the same text again, however
cut, it gives the same, which is what a takeover relies on.
"""

from __future__ import annotations

from common.protocol import ChatPrompt, GenerationJob, Reasoning, ToolCall
from worker.text import answer_format
from worker.text.answer_format import NORMAL, REASONING, TOOL, CallForm, ModelFormat
from worker.text.detokenizer import TokenBytes
from worker.text.stop_strings import StopMatcher
from worker.text.tool_calls import CallReader, KnownTools, OwnCall, Part, UniversalCall


def make_parser(
    job: GenerationJob, model: ModelFormat, prompt: list[int], token_bytes: TokenBytes
) -> AnswerParser | None:
    """A parser for a job's answer; None where all of it is content.

    Args:
        prompt: Its token ids: where thinking is open at their end, the answer begins with it.
    """
    if not isinstance(job.prompt, ChatPrompt):
        return None
    if answer_format.choose_call_form(job, model) is CallForm.NONE and not model.transitions:
        return None
    end = b"".join(token_bytes[token_id] for token_id in prompt[-answer_format.NUM_LAST_TOKENS :])
    return AnswerParser(job, model, answer_format.initial_state(job, model, end.decode(errors="replace")))


class AnswerParser:
    """See the module.

    White space around reasoning and calls is neither's and no content, so that an answer of calls has no content.

    Attributes:
        has_call: Whether there was one so far.
        is_finished: No more is wanted: the one call that there may be is there, or the format says so.
    """

    def __init__(self, job: GenerationJob, model: ModelFormat, state: str) -> None:
        self.has_call = False
        self.is_finished = False
        self._model = model
        self._form = answer_format.choose_call_form(job, model)
        use = job.tool_use
        self._is_parallel = use is None or use.is_parallel
        self._is_required = use is not None and (use.is_required or use.function is not None)
        self._known = KnownTools(
            use.tools if use else [], use.function if use else None, is_parallel=self._is_parallel
        )
        self._transitions = {
            each: dict(edges) for each, edges in answer_format.transitions(self._form, model, state).items()
        }
        self._num_calls = 0
        self._call: CallReader | None = None
        self._space = ""  # held back: of content at the beginning, of reasoning at its end
        self._is_first = True  # nothing but white space came yet
        self._has_reasoned = False
        self._space_before_call = ""  # of an answer that begins with what looks like one
        self._is_at_edge = True  # only white space came in this state yet
        self._enter(state)

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._state == REASONING and self._call is None

    @property
    def holds_content(self) -> bool:
        """Whether text that was fed may come out as content yet."""
        if self._call is not None:
            return self._call.may_be_content
        return self._state == NORMAL and (bool(self._space) or self._markers.is_holding)

    def feed(self, text: str) -> list[Part]:
        """Take more text; what is certain now, in order."""
        parts: list[Part] = []
        while text and not self.is_finished:
            if self._call is not None:
                text = self._feed_call(self._call, text, parts)
                continue
            said, marker, text = self._markers.split(text)
            self._say(said, parts)
            if marker is not None:
                self._leave(marker)
        return parts

    def flush(self, *, is_cut: bool) -> list[Part]:
        """What was held back, once no more text comes.

        Args:
            is_cut: The answer's length ended it.
        """
        parts = self._held_back(is_cut=is_cut)
        # Of a call that has to be one, and was cut before it was, nobody wants to read the form's own words.
        return (
            [part for part in parts if not isinstance(part, str)] if is_cut and self._is_required else parts
        )

    def _held_back(self, *, is_cut: bool) -> list[Part]:
        parts: list[Part] = []
        if self.is_finished:
            return parts
        if self._call is not None:
            self._take_call(self._call.flush(is_cut=is_cut), parts)
            self._call = None
            return parts
        self._say(self._markers.flush(), parts)
        if self._state == NORMAL and self._space:  # white space is all there is
            parts.append(self._space)
        self._space = ""
        return parts

    # -- text ---------------------------------------------------------------------------------------------------------

    def _say(self, text: str, parts: list[Part]) -> None:
        if not text or self._state not in (NORMAL, REASONING):
            return
        if self._state == REASONING:
            self._reason(text, parts)
            return
        if self._is_at_edge:
            text = self._space + text if self._is_first else text.lstrip()
            self._space = "" if text.strip() else text
            if self._space or not text:
                return
            self._is_at_edge = self._is_first = False
        parts.append(text)

    def _reason(self, text: str, parts: list[Part]) -> None:
        text = self._space + text
        if self._is_at_edge:
            text = text.lstrip()
        thought = text.rstrip()
        self._space = text[len(thought) :]
        if not thought:
            return
        if self._is_at_edge and self._has_reasoned:
            thought = f"\n{thought}"
        self._is_at_edge, self._has_reasoned = False, True
        parts.append(Reasoning(thought))

    # -- states -------------------------------------------------------------------------------------------------------

    def _leave(self, marker: str) -> None:
        target = self._transitions[self._state][marker]
        if target is None:
            self.is_finished = True
        elif target == TOOL:
            self._space_before_call, self._space = self._space, ""
            self._call = self._reader(marker)
        elif target != self._state:
            self._is_first = False
            self._enter(target)

    def _enter(self, state: str) -> None:
        self._state = state
        self._markers = StopMatcher(tuple(self._transitions.get(state, ())))
        self._space, self._is_at_edge = "", True

    def _reader(self, start: str) -> CallReader:
        if self._form is CallForm.UNIVERSAL:
            return UniversalCall(start, self._known, self._num_calls)
        parse = self._model.parse_call
        assert parse is not None
        ends = [marker for marker, _ in self._model.call_ends]
        return OwnCall(start, ends, parse, self._known, self._num_calls)

    def _feed_call(self, call: CallReader, text: str, parts: list[Part]) -> str:
        reading = call.feed(text)
        is_content = self._take_call(reading.parts, parts)
        if reading.rest is None:
            return ""
        self._call = None
        self.is_finished = not self._is_parallel and not is_content
        target = dict(self._model.call_ends).get(reading.end) if self._form is CallForm.OWN else NORMAL
        self._is_first = False
        self._enter(target or NORMAL)
        self._is_at_edge = not is_content
        return reading.rest

    def _take_call(self, read: list[Part], parts: list[Part]) -> bool:
        """Keep what a reader gave; whether it is content, since it was no call."""
        for part in read:
            if isinstance(part, ToolCall):
                self.has_call = True
                self._num_calls += 1
            elif isinstance(part, str) and self._space_before_call:
                parts.append(self._space_before_call)
            self._space_before_call = ""
        parts += read
        return any(isinstance(part, str) for part in read)
