"""What a chat request tells the model's template beside its messages: `reasoning_effort` and `chat_template_kwargs`.

Only names that templates read and nothing else does: what is passed on are keyword arguments of transformers, some of
which would change the template itself or the kind of what comes back. Used by `chat_request`.
"""

from __future__ import annotations

from typing import Any, Literal

from common.errors import invalid

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""OpenAI's (openai-python 3.54)."""

SAFE: dict[str, type] = {
    "enable_thinking": bool,  # Qwen 3, GLM 4.5, SmolLM 3
    "thinking": bool,  # DeepSeek V3.1, Kimi K2.5
    "thinking_budget": int,  # Seed-OSS
    "preserve_thinking": bool,  # Qwen
    "clear_thinking": bool,  # GLM 4.7
    "reasoning_effort": str,  # gpt-oss
    "date_string": str,  # Llama 3
}
"""By name: the type of the value."""

MAX_CHARACTERS = 256
"""Of a value."""

_KINDS = {bool: "a boolean", int: "an integer", str: "a string"}


def template_arguments(
    reasoning_effort: str | None, chat_template_kwargs: dict[str, Any] | None
) -> dict[str, Any]:
    """Keyword arguments for the template.

    Raises:
        RequestError: 400; a name is not among those that are safe, a value is of another type, or the two disagree.
    """
    arguments: dict[str, Any] = {}
    for name, value in (chat_template_kwargs or {}).items():
        place = f"chat_template_kwargs.{name[:64]}"
        if name not in SAFE:
            raise invalid(f"`{place}` is not supported; {', '.join(SAFE)} are.", place)
        if value is None:
            continue
        kind = SAFE[name]
        if type(value) is not kind:
            raise invalid(f"`{place}` must be {_KINDS[kind]}.", place)
        if isinstance(value, str) and len(value) > MAX_CHARACTERS:
            raise invalid(f"`{place}` is longer than {MAX_CHARACTERS} characters.", place)
        arguments[name] = value
    if reasoning_effort is None:
        return arguments
    asked = {"reasoning_effort": reasoning_effort}
    if reasoning_effort == "none":
        asked["enable_thinking"] = False  # type: ignore[assignment]
    for name, value in asked.items():
        if arguments.get(name, value) != value:
            raise invalid(
                f"`reasoning_effort` and `chat_template_kwargs.{name}` say different things; give one of them.",
                "reasoning_effort",
            )
    return arguments | asked
