"""Arguments of the chat template that the operator sets for all requests: the setting `MLXPOOL_CHAT_TEMPLATE_ARGS`.

Used where prompts are tokenized (`worker.mlx.generation`, `worker.text.prompt_tokenizer`). Independent of MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from common.errors import StartupError
from common.protocol import RESERVED_TEMPLATE_ARGUMENTS, ChatPrompt, TextPrompt, TokenPrompt

_SAME = (("enable_thinking", "thinking"), ("thinking", "enable_thinking"))
"""Two names of the same argument: the request's value replaces the operator's, whichever name each uses."""


def parse(text: str | None) -> dict[str, Any]:
    """The setting's value; empty if it is not set.

    Raises:
        StartupError: It is not a JSON object, or has a name with which no template could be rendered.
    """
    if text is None:
        return {}
    try:
        arguments = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeEncodeError):
        example = '{"enable_thinking": false}'
        raise StartupError(
            f"--chat-template-args must be a JSON object such as {example}, not {text!r}"
        ) from None
    if reserved := sorted(arguments.keys() & RESERVED_TEMPLATE_ARGUMENTS):
        raise StartupError(
            f"--chat-template-args must not set {', '.join(reserved)}: not a template argument"
        )
    return arguments


def with_defaults(
    prompt: ChatPrompt | TextPrompt | TokenPrompt, defaults: Mapping[str, Any]
) -> ChatPrompt | TextPrompt | TokenPrompt:
    """A prompt with the operator's arguments where the request sets none."""
    if not defaults or not isinstance(prompt, ChatPrompt):
        return prompt
    own = prompt.template_arguments
    replaced = {other for name, other in _SAME if name in own}
    arguments = {name: value for name, value in defaults.items() if name not in replaced} | own
    return msgspec.structs.replace(prompt, template_arguments=arguments)
