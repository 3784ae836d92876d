"""How a model's answers are to be read: what thinking and calls look like in them, and which form calls take for a job.

`ModelFormat` is found out once, from mlx-lm's tokenizer; `choose` decides for each job. Knows nothing of MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from common import grammar
from common.protocol import ChatPrompt, GenerationJob
from worker import chat_template
from worker.chat_template import TemplateAbilities
from worker.tool_calls import ParseCall
from worker.tool_messages import CALL_END, CALL_START

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
        is_universal: Whether its own format is the universal one.
    """

    transitions: Transitions = field(default_factory=dict)
    initial_state: str = NORMAL
    think_start: str | None = None
    call_starts: Mapping[str, list[str]] = field(default_factory=dict)
    call_ends: list[tuple[str, str | None]] = field(default_factory=list)
    parse_call: ParseCall | None = None
    is_universal: bool = False
    template: TemplateAbilities = field(default_factory=TemplateAbilities)

    @property
    def has_own_calls(self) -> bool:
        """Whether the model was made to call functions: it has a format for it, and its template tells it of them."""
        return self.parse_call is not None and self.template.renders_tools


def of_model(tokenizer: Any) -> ModelFormat:
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
            template=chat_template.probe(tokenizer),
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
        is_universal=_is_universal(tokenizer),
        template=chat_template.probe(tokenizer),
    )


def _is_universal(tokenizer: Any) -> bool:
    if (tokenizer.tool_call_start, tokenizer.tool_call_end) != (CALL_START, CALL_END):
        return False
    try:
        call = tokenizer.tool_parser('{"name": "f", "arguments": {"a": 1}}', [])
    except Exception:  # noqa: BLE001 (the same markers hold other things in other formats)
        return False
    return bool(call == {"name": "f", "arguments": {"a": 1}})


def choose(job: GenerationJob, model: ModelFormat) -> CallForm:
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


def grammar_text(job: GenerationJob, model: ModelFormat) -> str | None:
    """What the job's answer is held to; None: nothing."""
    if choose(job, model) is CallForm.UNIVERSAL and job.tool_use is not None:
        return grammar.for_tool_calls(job.tool_use, answer=job.grammar)
    return job.grammar


def is_told_by_template(form: CallForm, model: ModelFormat) -> bool:
    """Whether the model's own template says what functions there are and how to call them: it says its own format."""
    return form is CallForm.OWN or (form is CallForm.UNIVERSAL and model.is_universal and model.has_own_calls)


def is_thinking_open(end: str, model: ModelFormat) -> bool:
    """Whether a prompt opens thinking, so that the answer goes on with it.

    Not as mlx-lm, which looks for the last marker anywhere: a user's message may hold one.

    Args:
        end: Of the prompt's text.
    """
    return model.think_start is not None and end.rstrip().endswith(model.think_start)


def transitions(form: CallForm, model: ModelFormat) -> Transitions:
    """The model's transitions, with those to calls."""
    starts: Mapping[str, list[str]] = {}
    if form is CallForm.OWN:
        starts = model.call_starts
    elif form is CallForm.UNIVERSAL:
        starts = {NORMAL: [CALL_START]}
    return {
        state: [*model.transitions.get(state, []), *((marker, TOOL) for marker in starts.get(state, []))]
        for state in {*model.transitions, *starts}
    }
