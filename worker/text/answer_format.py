"""How a model's answers are to be read: what thinking and calls look like in them, and which form calls take for a job.

`ModelFormat` is found out once, from mlx-lm's tokenizer; `choose` decides for each job. Knows nothing of MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec

from common.protocol import ChatPrompt, GenerationJob
from common.schema import function_schema
from common.schema import grammar as grammars
from common.schema.grammar import CALL_BEGIN
from worker.text import chat_template
from worker.text.chat_template import TemplateSupport
from worker.text.tool_calls import ParseCall

NORMAL = "normal"
REASONING = "reasoning"
TOOL = "tool"
"""States of mlx-lm's `make_text_state_machine` (0.32). The text of any other one, such as a header's, is dropped."""

Transitions = Mapping[str, list[tuple[str, str | None]]]
"""By state: the markers that end it and the state behind each; None: the answer ends."""


NUM_LAST_TOKENS = 16
"""Of a prompt: enough for what opens thinking, and white space behind it."""


class CallForm(Enum):
    """How calls are written in an answer."""

    NONE = "there are none"
    OWN = "the model's own format"
    UNIVERSAL = "<tool_call>{...}</tool_call>, which a grammar makes sure of"


@dataclass(frozen=True, slots=True)
class ModelFormat:
    """What is known of a model.

    Attributes:
        transitions: Without those to calls.
        initial_state: Where an answer begins, unless thinking is open in its prompt.
        think_start: What opens thinking.
        call_starts: By state: the markers that begin a call in the model's own format.
        call_ends: Those that end it, with the state behind each; none: the end of the answer does.
        parse_call: None: the model has no format of its own.
        template: What its template knows.
    """

    transitions: Transitions = field(default_factory=dict)
    initial_state: str = NORMAL
    think_start: str | None = None
    call_starts: Mapping[str, list[str]] = field(default_factory=dict)
    call_ends: list[tuple[str, str | None]] = field(default_factory=list)
    parse_call: ParseCall | None = None
    template: TemplateSupport = field(default_factory=TemplateSupport)

    @property
    def has_own_calls(self) -> bool:
        """Whether the model was made to call functions: it has a format for it, and its template tells it of them."""
        return self.parse_call is not None and self.template.renders_tools


def detect_format(tokenizer: Any) -> ModelFormat:
    """What mlx-lm's `TokenizerWrapper` says; the facts are those of `make_text_state_machine` (mlx-lm 0.32)."""
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
    if not tokenizer.has_tool_calling:
        return ModelFormat(
            transitions,
            tokenizer.response_initial_state or NORMAL,
            tokenizer.think_start,
            template=chat_template.probe_template(tokenizer),
        )
    if not starts:
        starts[NORMAL] = [tokenizer.tool_call_start]
    if tokenizer.has_thinking:  # some models call without closing their thoughts
        starts.setdefault(REASONING, []).append(tokenizer.tool_call_start)
    ends = [(tokenizer.tool_call_end, NORMAL)] if tokenizer.tool_call_end else []
    return ModelFormat(
        transitions,
        tokenizer.response_initial_state or NORMAL,
        tokenizer.think_start,
        starts,
        ends + response.get(TOOL, []),
        tokenizer.tool_parser,
        template=chat_template.probe_template(tokenizer),
    )


def choose_call_form(job: GenerationJob, model: ModelFormat) -> CallForm:
    """The form of the calls in a job's answer.

    1. No functions, or no chat: none. What looks like a call is text.
    2. A call is required, or a function named: universal; a grammar makes sure of it.
    3. A function has `strict: true`, or the answer has to match a response format beside the tools: universal; the
       grammar of either takes in the calls.
    4. The model has no format of its own, or its template does not tell it of functions: universal; our instructions
       say how to call.
    5. Else the model's own, which it was trained on.
    """
    use = job.tool_use
    if use is None or not use.tools or not isinstance(job.prompt, ChatPrompt):
        return CallForm.NONE
    if use.is_required or use.function is not None:
        return CallForm.UNIVERSAL
    if job.grammar is not None or any(tool["function"].get("strict") for tool in use.tools):
        return CallForm.UNIVERSAL
    return CallForm.OWN if model.has_own_calls else CallForm.UNIVERSAL


def is_told_by_template(form: CallForm, model: ModelFormat) -> bool:
    """Whether the model's own template says what functions there are and how to call them: it says its own format."""
    return form is CallForm.OWN or (
        form is CallForm.UNIVERSAL and model.template.is_universal and model.has_own_calls
    )


def is_thinking_open(end: str, model: ModelFormat) -> bool:
    """Whether a prompt opens thinking, so that the answer goes on with it.

    Not as mlx-lm, which looks for the last marker anywhere: a user's message may hold one.

    Args:
        end: Of the prompt's text.
    """
    return model.think_start is not None and end.rstrip().endswith(model.think_start)


def initial_state(job: GenerationJob, model: ModelFormat, end: str) -> str:
    """Where an answer begins: in thinking that its prompt opened, in text that a grammar demands, or as the model likes it.

    Args:
        end: Of the prompt's text.
    """
    if is_thinking_open(end, model):
        return REASONING
    is_demanded = job.grammar is not None or (job.tool_use is not None and job.tool_use.is_required)
    return NORMAL if is_demanded else model.initial_state


def transitions(form: CallForm, model: ModelFormat, state: str) -> Transitions:
    """The model's transitions, with those to calls.

    Args:
        state: Where the answer begins.
    """
    starts: Mapping[str, list[str]] = {}
    if form is CallForm.OWN:
        starts = model.call_starts
    elif form is CallForm.UNIVERSAL:
        # In thoughts that the prompt opened there is no grammar yet, and a marker in them is but mentioned.
        states = {NORMAL, state, REASONING} if state != REASONING else {NORMAL}
        starts = {each: [CALL_BEGIN] for each in states if each == NORMAL or each in model.transitions}
    return {
        state: [*model.transitions.get(state, []), *((marker, TOOL) for marker in starts.get(state, []))]
        for state in {*model.transitions, *starts}
    }


def answer_grammar(job: GenerationJob, model: ModelFormat) -> str | None:
    """What the answer has to match, calls included. Where thinking is open in the prompt, it holds behind its end.

    A function whose schema is too much for a grammar gets an object as it likes, unless it is strict: that the API refuses.
    """
    if choose_call_form(job, model) is not CallForm.UNIVERSAL or job.tool_use is None:
        return job.grammar
    tools = [
        tool if function_schema.refusal(tool["function"]) is None else _with_any_arguments(tool)
        for tool in job.tool_use.tools
    ]
    return grammars.for_tool_calls(msgspec.structs.replace(job.tool_use, tools=tools), answer=job.grammar)


def _with_any_arguments(tool: dict[str, Any]) -> dict[str, Any]:
    return tool | {"function": tool["function"] | {"parameters": {"type": "object"}}}
