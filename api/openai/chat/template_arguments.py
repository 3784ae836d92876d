"""Arguments for the model's chat template other than the messages: `reasoning_effort` and `chat_template_kwargs`.

Only an allowlist of names is accepted: they become keyword arguments of transformers, some of which would replace the
template or change the type of its result. Used by `api.openai.chat.request`.
"""

from __future__ import annotations

from typing import Any, Literal

from common.errors import invalid

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""OpenAI's (openai-python 3.54)."""

ALLOWED: dict[str, type] = {
    "enable_thinking": bool,  # Qwen 3, GLM 4.5, SmolLM 3
    "thinking": bool,  # DeepSeek V3.1, Kimi K2.5
    "thinking_budget": int,  # Seed-OSS
    "preserve_thinking": bool,  # Qwen
    "clear_thinking": bool,  # GLM 4.7
    "reasoning_effort": str,  # gpt-oss
    "date_string": str,  # Llama 3
}
"""The accepted names, with the type of their value."""

MAX_CHARACTERS = 256
"""Of a value."""

_KINDS = {bool: "a boolean", int: "an integer", str: "a string"}


def template_arguments(
    reasoning_effort: str | None, chat_template_kwargs: dict[str, Any] | None
) -> dict[str, Any]:
    """Keyword arguments for the template.

    Raises:
        RequestError: 400; a name is not allowed, a value has the wrong type, or both fields set a name to different values.
    """
    arguments: dict[str, Any] = {}
    for name, value in (chat_template_kwargs or {}).items():
        path = f"chat_template_kwargs.{name[:64]}"
        if name not in ALLOWED:
            raise invalid(f"`{path}` is not supported. Supported are: {', '.join(ALLOWED)}.", path)
        if value is None:
            continue
        kind = ALLOWED[name]
        if type(value) is not kind:
            raise invalid(f"`{path}` must be {_KINDS[kind]}.", path)
        if isinstance(value, str) and len(value) > MAX_CHARACTERS:
            raise invalid(f"`{path}` is longer than {MAX_CHARACTERS} characters.", path)
        arguments[name] = value
    if reasoning_effort is None:
        return arguments
    asked = {"reasoning_effort": reasoning_effort}
    if reasoning_effort == "none":
        asked["enable_thinking"] = False  # type: ignore[assignment]
    for name, value in asked.items():
        if arguments.get(name, value) != value:
            raise invalid(
                f"`reasoning_effort` and `chat_template_kwargs.{name}` differ; set only one of them.",
                "reasoning_effort",
            )
    return arguments | asked
