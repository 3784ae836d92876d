"""The format of a model's answers: the markers of reasoning and tool calls, and the format of the calls in a job's answer.

`detect_format` reads a `ModelFormat` from mlx-lm's tokenizer, once, when the model is loaded; the other functions decide for each
job. Used by the engine, `prompts` and `answer_parser`. Independent of MLX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import msgspec

from common.protocol import ChatPrompt, GenerationJob
from common.schema import function_schema
from common.schema import grammar as grammars
from common.schema.grammar import CALL_BEGIN
from worker.text.detokenizer import TokenBytes
from worker.text.templates.renderer import ChatRenderer
from worker.text.templates.support import TemplateSupport, probe_template
from worker.text.tool_calls import ParseCall

NORMAL = "normal"
REASONING = "reasoning"
TOOL = "tool"
"""States of mlx-lm's `make_text_state_machine` (0.32). Text in any other state, such as a header's, is dropped."""

Transitions = Mapping[str, list[tuple[str, str | None]]]
"""By state: the markers that end it, each with the state that follows; None: the answer ends."""


_NUM_PROMPT_END_TOKENS = 16
"""How many tokens of white space may follow the marker that opens reasoning at the end of a prompt."""


class CallFormat(Enum):
    """How the tool calls in an answer are written."""

    NONE = "no calls"
    NATIVE = "the model's own format"
    HERMES = "<tool_call>{...}</tool_call>, enforced by a grammar"


@dataclass(frozen=True, slots=True)
class ModelFormat:
    """What was detected about a model.

    Attributes:
        transitions: Without the transitions to tool calls.
        initial_state: The state in which an answer begins, unless its prompt opens reasoning.
        think_start: The marker that opens reasoning; None: the model does not reason.
        call_starts: By state: the markers that begin a call in the native format.
        call_ends: The markers that end a native call, each with the state that follows; empty: the end of the answer ends it.
        parse_call: mlx-lm's parser of the native format; None: the model has no native format.
        template: What its chat template supports.
        think_start_ids: The token ids of the marker that opens reasoning.
        renderer: Renders conversations with the template; None: `prompts` makes one for each prompt.
    """

    transitions: Transitions = field(default_factory=dict)
    initial_state: str = NORMAL
    think_start: str | None = None
    call_starts: Mapping[str, list[str]] = field(default_factory=dict)
    call_ends: list[tuple[str, str | None]] = field(default_factory=list)
    parse_call: ParseCall | None = None
    template: TemplateSupport = field(default_factory=TemplateSupport)
    think_start_ids: tuple[int, ...] = ()
    renderer: ChatRenderer | None = field(default=None, compare=False, repr=False)

    @property
    def can_reason(self) -> bool:
        """Whether the model has markers of reasoning."""
        targets = (target for edges in self.transitions.values() for _, target in edges)
        return self.initial_state == REASONING or REASONING in targets

    @property
    def reasoning_end(self) -> str | None:
        """The marker that closes reasoning; None: the model does not reason."""
        if not self.can_reason:
            return None
        return next(
            (marker for marker, state in self.transitions.get(REASONING, ()) if state != REASONING), None
        )

    @property
    def has_native_calls(self) -> bool:
        """Whether the model was trained to call functions: it has a format for calls, and its template describes the tools."""
        return self.parse_call is not None and self.template.renders_tools


def detect_format(tokenizer: Any) -> ModelFormat:
    """Read the format from mlx-lm's `TokenizerWrapper`, as `make_text_state_machine` does (mlx-lm 0.32)."""
    response: dict[str, list[tuple[str, str | None]]] = tokenizer.response_transitions
    transitions: dict[str, list[tuple[str, str | None]]] = {}
    starts: dict[str, list[str]] = {}
    if tokenizer.has_thinking:
        transitions[NORMAL] = [(tokenizer.think_start, REASONING)]
        transitions[REASONING] = [(tokenizer.think_end, NORMAL)]
    for marker in tokenizer.structural_markers:
        transitions.setdefault(NORMAL, []).append((marker, NORMAL))
    for state, edges in response.items():
        for marker, target in edges:
            if target == TOOL:
                starts.setdefault(state, []).append(marker)
            elif state != TOOL:
                transitions.setdefault(state, []).append((marker, target))
    template = probe_template(tokenizer)
    detected = ModelFormat(
        transitions,
        tokenizer.response_initial_state or NORMAL,
        tokenizer.think_start,
        template=template,
        think_start_ids=tuple(tokenizer.think_start_tokens or ()),
        renderer=ChatRenderer(tokenizer, template),
    )
    if not tokenizer.has_tool_calling:
        return detected
    if not starts:
        starts[NORMAL] = [tokenizer.tool_call_start]
    if tokenizer.has_thinking:  # some models call a function without closing their reasoning
        starts.setdefault(REASONING, []).append(tokenizer.tool_call_start)
    ends = [(tokenizer.tool_call_end, NORMAL)] if tokenizer.tool_call_end else []
    return replace(
        detected,
        call_starts=starts,
        call_ends=ends + response.get(TOOL, []),
        parse_call=tokenizer.tool_parser,
    )


def choose_call_format(job: GenerationJob, model_format: ModelFormat) -> CallFormat:
    """Choose the format of the tool calls in a job's answer.

    1. No tools, or not a chat: none. Text that looks like a call is content.
    2. A call is required, or a function is named: Hermes, enforced by a grammar.
    3. A function has `strict: true`, or the answer must also match a response format: Hermes, as part of the grammar.
    4. The model has no native format, or its template does not describe the tools: Hermes, explained by our instructions.
    5. Otherwise the native format, which the model was trained on.
    """
    use = job.tool_use
    if use is None or not use.tools or not isinstance(job.prompt, ChatPrompt):
        return CallFormat.NONE
    if use.is_required or use.function is not None:
        return CallFormat.HERMES
    if job.grammar is not None or any(tool["function"].get("strict") for tool in use.tools):
        return CallFormat.HERMES
    return CallFormat.NATIVE if model_format.has_native_calls else CallFormat.HERMES


def template_describes_tools(call_format: CallFormat, model_format: ModelFormat) -> bool:
    """Whether the model's own template describes the tools, and how to call them in this format."""
    return call_format is CallFormat.NATIVE or (
        call_format is CallFormat.HERMES
        and model_format.template.uses_hermes_calls
        and model_format.has_native_calls
    )


def is_reasoning_open(prompt: Sequence[int], model_format: ModelFormat, token_bytes: TokenBytes) -> bool:
    """Whether a prompt ends with the marker that opens reasoning, so that the answer continues it.

    mlx-lm looks for the last marker anywhere in the prompt. Tokens are compared, not text: a user's message may end with the marker's text.

    Args:
        prompt: Token ids.
    """
    marker = model_format.think_start_ids
    end = len(prompt)
    while end > max(0, len(prompt) - _NUM_PROMPT_END_TOKENS) and not token_bytes[prompt[end - 1]].strip():
        end -= 1
    return bool(marker) and tuple(prompt[max(0, end - len(marker)) : end]) == marker


def initial_state(
    job: GenerationJob, model_format: ModelFormat, prompt: Sequence[int], token_bytes: TokenBytes
) -> str:
    """The state in which a job's answer begins.

    Normal text, if it continues the last message; reasoning, if the prompt opens it; normal text, if a grammar demands it; otherwise the
    model's own initial state.

    Args:
        prompt: Token ids.
    """
    if isinstance(job.prompt, ChatPrompt) and job.prompt.continue_final:
        return NORMAL
    if is_reasoning_open(prompt, model_format, token_bytes):
        return REASONING
    is_constrained = job.grammar is not None or (job.tool_use is not None and job.tool_use.is_required)
    return NORMAL if is_constrained else model_format.initial_state


def transitions_with_calls(call_format: CallFormat, model_format: ModelFormat, state: str) -> Transitions:
    """The model's transitions, and those to tool calls in this format.

    Args:
        state: The state in which the answer begins.
    """
    starts: Mapping[str, list[str]] = {}
    if call_format is CallFormat.NATIVE:
        starts = model_format.call_starts
    elif call_format is CallFormat.HERMES:
        # The grammar is not in force in reasoning that the prompt opened: a marker there begins no call.
        states = {NORMAL, state, REASONING} if state != REASONING else {NORMAL}
        starts = {each: [CALL_BEGIN] for each in states if each == NORMAL or each in model_format.transitions}
    return {
        state: [
            *model_format.transitions.get(state, []),
            *((marker, TOOL) for marker in starts.get(state, [])),
        ]
        for state in {*model_format.transitions, *starts}
    }


def answer_grammar(job: GenerationJob, model_format: ModelFormat) -> str | None:
    """The grammar of the answer, tool calls included; None: it is unconstrained.

    If the prompt opens reasoning, the grammar applies to what follows it. A function whose schema is too complex for a grammar may be
    called with any object, unless it is strict: the API refuses that.
    """
    if choose_call_format(job, model_format) is not CallFormat.HERMES or job.tool_use is None:
        return job.grammar
    tools = [
        tool if function_schema.refusal(tool["function"]) is None else _with_any_arguments(tool)
        for tool in job.tool_use.tools
    ]
    return grammars.for_tool_calls(msgspec.structs.replace(job.tool_use, tools=tools), answer=job.grammar)


def _with_any_arguments(tool: dict[str, Any]) -> dict[str, Any]:
    return tool | {"function": tool["function"] | {"parameters": {"type": "object"}}}
