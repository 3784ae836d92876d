"""Arguments for the model's chat template other than the messages: `chat_template_kwargs` and `reasoning_effort`.

Templates of different models name different arguments; those that a template does not name have no effect. Arguments are data: names
that transformers would take as options of its own are refused. Used by the parsers of chats and responses.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from common.errors import invalid
from common.protocol import RESERVED_TEMPLATE_ARGUMENTS
from common.schema import limits

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""OpenAI's (openai-python 3.54)."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_SPECIAL_TOKEN = re.compile(r".*_tokens?")
"""Such as `bos_token`: a template writes it into the prompt, where it would count as a control token."""

TYPES: dict[str, type] = {
    "enable_thinking": bool,  # Qwen 3, GLM 4.5, SmolLM 3
    "thinking": bool,  # DeepSeek V3.1, Kimi K2.5
    "thinking_budget": int,  # Seed-OSS
    "preserve_thinking": bool,  # Qwen
    "clear_thinking": bool,  # GLM 4.7
    "reasoning_effort": str,  # gpt-oss
    "date_string": str,  # Llama 3
}
"""Of well-known arguments: with a value of another type a template would do something else than was meant."""

MAX_BYTES = 16 * 1024
"""Of all arguments together, as JSON."""

MAX_LEVELS = 20
"""Of a value."""

_KINDS = {bool: "a boolean", int: "an integer", str: "a string"}


def template_arguments(
    reasoning_effort: str | None, chat_template_kwargs: dict[str, Any] | None
) -> dict[str, Any]:
    """Keyword arguments for the template.

    Raises:
        RequestError: 400; a name is reserved, a value has the wrong type or is too large, or both fields set a name to different
            values.
    """
    arguments = {name: value for name, value in (chat_template_kwargs or {}).items() if value is not None}
    for name, value in arguments.items():
        _check(name, value)
    if arguments and len(msgspec.json.encode(arguments)) > MAX_BYTES:
        raise invalid(f"`chat_template_kwargs` is longer than {MAX_BYTES} bytes.", "chat_template_kwargs")
    if reasoning_effort is None:
        return arguments
    asked: dict[str, Any] = {"reasoning_effort": reasoning_effort}
    if reasoning_effort == "none":
        asked["enable_thinking"] = False
    for name, value in asked.items():
        if arguments.get(name, value) != value:
            raise invalid(
                f"`reasoning_effort` and `chat_template_kwargs.{name}` differ; set only one of them.",
                "reasoning_effort",
            )
    return arguments | asked


def _check(name: str, value: Any) -> None:
    path = f"chat_template_kwargs.{name[:64]}"
    if name in RESERVED_TEMPLATE_ARGUMENTS or not _NAME.fullmatch(name) or _SPECIAL_TOKEN.fullmatch(name):
        raise invalid(f"`{path}` is not supported: it is not an argument that a template can be given.", path)
    kind = TYPES.get(name)
    if kind is not None and type(value) is not kind:
        raise invalid(f"`{path}` must be {_KINDS[kind]}.", path)
    if limits.is_deeper(value, MAX_LEVELS):
        raise invalid(f"`{path}` has more than {MAX_LEVELS} levels.", path)
