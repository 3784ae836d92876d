"""What protocols know of tokens: the number and the ids of a prompt's tokens, without generating.

Used by the resources of `api.openai` and other protocols. Implemented by `api.tokenizing.client.TokenizeClient`. Must not import
Redis.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from api.generation.request import Prompt
from api.generation.served_model import ServedModel
from common.protocol import ToolUse


class TokenizedPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt's tokens.

    Attributes:
        count: Their number; it may exceed the model's context.
        token_ids: Empty unless they were asked for, like `token_strings`.
        token_strings: The vocabulary's string of each token.
    """

    count: int
    token_ids: list[int] = []
    token_strings: list[str] = []


class Tokenizing(Protocol):
    """Tokenizes with a model's own tokenizer and template, as a request would be; no slot is needed."""

    async def count(
        self,
        model: ServedModel,
        prompt: Prompt,
        *,
        tool_use: ToolUse | None = None,
        grammar: str | None = None,
        adds_special_tokens: bool = True,
        returns_tokens: bool = False,
        returns_strings: bool = False,
    ) -> TokenizedPrompt:
        """The tokens of a prompt, by default their number alone.

        Args:
            tool_use: As in `common.protocol.GenerationJob`, and the next one: they are part of the prompt.
            adds_special_tokens: Whether raw text gets what the tokenizer adds, such as a first token.

        Raises:
            RequestError: 400, the template refuses the messages, or the text is too long by far; 503, no worker replied in
                time, too many requests wait, or Redis is unavailable.
        """

    async def text(self, model: ServedModel, token_ids: list[int]) -> str:
        """The text of tokens, special tokens included.

        Raises:
            RequestError: As `count`.
        """
