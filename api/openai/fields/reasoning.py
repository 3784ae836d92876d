"""The fields that control a model's reasoning, under the names that OpenAI, OpenRouter, vLLM, llama.cpp, Ollama and others gave them.

All of them come down to three things: arguments of the chat template, a limit on the tokens of reasoning, and whether the answer
shows it. Fields that contradict each other are refused. Used by the parsers of chats and responses.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from api.openai.fields.response_format import FormatFields
from api.openai.fields.template_arguments import ReasoningEffort, template_arguments
from common.errors import invalid

Budget = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
"""In tokens; -1: no limit, 0: no reasoning."""


class ReasoningOptions(msgspec.Struct, frozen=True):
    """OpenRouter's `reasoning`."""

    effort: ReasoningEffort | None = None
    max_tokens: Budget | None = None
    enabled: bool | None = None
    exclude: bool | None = None


class Thinking(msgspec.Struct, frozen=True):
    """Anthropic's, Z.ai's and Moonshot's `thinking`: its type is `enabled`, `disabled`, `adaptive` or `auto`."""

    type: str | None = None
    budget_tokens: Budget | None = None


class ReasoningFields(FormatFields, frozen=True, kw_only=True):
    """`reasoning_effort` is OpenAI's; `enable_thinking` and `thinking_budget` are Qwen's, `thinking_token_budget` and
    `include_reasoning` vLLM's, `reasoning_budget` is llama.cpp's and `think` Ollama's.
    """

    reasoning_effort: ReasoningEffort | None = None
    reasoning: ReasoningOptions | None = None
    thinking: Thinking | bool | None = None
    think: bool | ReasoningEffort | None = None
    enable_thinking: bool | None = None
    thinking_budget: Budget | None = None
    thinking_token_budget: Budget | None = None
    reasoning_budget: Budget | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Reasoning(msgspec.Struct, frozen=True):
    """What a request asks for.

    Attributes:
        template_arguments: For `ChatPrompt`.
        max_tokens: `GenerationJob.max_reasoning_tokens`.
        is_hidden: Whether the answer leaves the reasoning out.
        fields: `GenerationRequest.reasoning_fields`. Arguments of the template, such as `enable_thinking`, are not among them.
    """

    template_arguments: dict[str, Any]
    max_tokens: int | None
    is_hidden: bool
    fields: list[str]


_Given = dict[str, Any]
"""Values by the path of the field that sets them; null ones are left out."""


def reasoning_of(given: ReasoningFields) -> Reasoning:
    """The request's reasoning.

    Raises:
        RequestError: 400; two fields differ, or an argument of the template is refused.
    """
    options = given.reasoning or ReasoningOptions()
    thinking = given.thinking if isinstance(given.thinking, Thinking) else Thinking()
    arguments = template_arguments(None, given.chat_template_kwargs)
    budget = _agreed(
        {
            "thinking_budget": given.thinking_budget,
            "thinking_token_budget": given.thinking_token_budget,
            "reasoning_budget": given.reasoning_budget,
            "thinking.budget_tokens": thinking.budget_tokens,
            "reasoning.max_tokens": options.max_tokens,
            "chat_template_kwargs.thinking_budget": arguments.get("thinking_budget"),
        }
    )
    effort = _agreed(
        {
            "reasoning_effort": given.reasoning_effort,
            "reasoning.effort": options.effort,
            "think": given.think if isinstance(given.think, str) else None,
            "chat_template_kwargs.reasoning_effort": arguments.get("reasoning_effort"),
        }
    )
    is_enabled = _agreed(
        {
            "reasoning_effort": False if effort == "none" else None,
            "thinking_budget": False if budget == 0 else None,
            "enable_thinking": given.enable_thinking,
            "thinking": _switch(given.thinking),
            "think": given.think if isinstance(given.think, bool) else None,
            "reasoning.enabled": options.enabled,
            "chat_template_kwargs.enable_thinking": arguments.get("enable_thinking"),
            "chat_template_kwargs.thinking": arguments.get("thinking"),
        }
    )
    is_limited = budget is not None and budget > 0
    if given.thinking_budget is not None and is_limited:
        arguments["thinking_budget"] = budget
    if effort is not None:
        arguments["reasoning_effort"] = effort
    if is_enabled is not None:
        arguments["enable_thinking"] = is_enabled
    return Reasoning(
        arguments,
        budget if is_limited and is_enabled is not False else None,
        bool(options.exclude) or given.include_reasoning is False,
        _asking(given, options, thinking),
    )


def _asking(given: ReasoningFields, options: ReasoningOptions, thinking: Thinking) -> list[str]:
    """The fields that ask for reasoning or limit it; those that turn it off get what they ask for from any model."""
    asks = {
        "reasoning": options.enabled or options.effort not in (None, "none") or _limits(options.max_tokens),
        "thinking": given.thinking is True or thinking.type == "enabled" or _limits(thinking.budget_tokens),
        "thinking_budget": _limits(given.thinking_budget),
        "thinking_token_budget": _limits(given.thinking_token_budget),
        "reasoning_budget": _limits(given.reasoning_budget),
    }
    return [name for name, is_asking in asks.items() if is_asking]


def _limits(budget: int | None) -> bool:
    return budget is not None and budget > 0


def _switch(thinking: Thinking | bool | None) -> bool | None:
    """Whether `thinking` turns reasoning on or off; None: it leaves that to the model.

    Raises:
        RequestError: 400, the type is unknown.
    """
    if not isinstance(thinking, Thinking):
        return thinking
    if thinking.type in (None, "adaptive", "auto"):
        return None
    if thinking.type not in ("enabled", "disabled"):
        raise invalid("`thinking.type` must be `enabled`, `disabled`, `adaptive` or `auto`.", "thinking.type")
    return thinking.type == "enabled"


def _agreed(given: _Given) -> Any:
    """The value that the fields have in common; None: none is set.

    Raises:
        RequestError: 400, two differ.
    """
    found = [(path, value) for path, value in given.items() if value is not None]
    for path, value in found[1:]:
        if value != found[0][1]:
            raise invalid(f"`{found[0][0]}` and `{path}` differ; set only one of them.", found[0][0])
    return found[0][1] if found else None
