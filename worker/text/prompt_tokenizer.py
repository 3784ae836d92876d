"""A model's tokenizer for the tokenizing thread: a copy of its own that encodes prompts exactly as jobs do.

`MLXEngine.make_prompt_tokenizer` creates it. transformers' tokenizers keep state between calls, so that a thread needs its own.
Independent of MLX.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from common.errors import RequestError, invalid
from common.protocol import ChatPrompt, GenerationJob, TextPrompt, TokenPrompt, ToolUse
from worker.text import prompts, truncation
from worker.text.answer_format import ModelFormat
from worker.text.template_defaults import with_defaults
from worker.text.templates.renderer import ChatRenderer

_UNLIMITED = 2**62
_MIN_LIMIT_CHARS = 2**22
"""Accepted even if the context is short; tokenizing that many takes a few seconds."""


class OwnPromptTokenizer:
    """See `worker.loop.engine.PromptTokenizer`.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`; only copied.
        max_prompt_chars: See `prompts.max_prompt_chars`.
        template_arguments: See `worker.text.template_defaults`.
    """

    def __init__(
        self,
        tokenizer: Any,
        model_format: ModelFormat,
        max_prompt_chars: int,
        template_arguments: Mapping[str, Any],
    ) -> None:
        # mlx-lm's wrapper forwards unknown attributes, which confuses `deepcopy`.
        self._tokenizer = copy.copy(tokenizer)
        self._tokenizer._tokenizer = copy.deepcopy(tokenizer._tokenizer)  # noqa: SLF001
        self._format = replace(model_format, renderer=ChatRenderer(self._tokenizer, model_format.template))
        self._template_arguments = template_arguments
        self._max_chars = max(max_prompt_chars, _MIN_LIMIT_CHARS)

    def encode(
        self,
        prompt: ChatPrompt | TextPrompt | TokenPrompt,
        *,
        tool_use: ToolUse | None,
        grammar: str | None,
        adds_special_tokens: bool,
    ) -> list[int]:
        if isinstance(prompt, TextPrompt) and prompt.suffix is None and not adds_special_tokens:
            if len(prompt.text) > self._max_chars:
                raise self._too_long("prompt")
            return list(self._tokenizer.encode(prompt.text, add_special_tokens=False))
        prompt = with_defaults(prompt, self._template_arguments)
        job = GenerationJob(
            job_id="", model="", channel="", prompt=prompt, tool_use=tool_use, grammar=grammar
        )
        try:
            return prompts.tokenize(job, self._tokenizer, _UNLIMITED, self._format, self._max_chars)
        except RequestError as error:
            # The context is not the limit here.
            raise self._too_long(error.param) if error.code == truncation.TOO_LONG else error from None

    def _too_long(self, param: str | None) -> RequestError:
        return invalid(f"The text is longer than {self._max_chars} characters.", param)

    def token_strings(self, token_ids: list[int]) -> list[str]:
        # A model's vocabulary may be padded beyond its tokenizer's.
        return [str(token or "") for token in self._tokenizer.convert_ids_to_tokens(token_ids)]

    def decode(self, token_ids: list[int]) -> str:
        try:
            return str(self._tokenizer.decode(token_ids))
        except (OverflowError, ValueError, TypeError):
            raise invalid(
                "`tokens` has a token id that is not in the model's vocabulary.", "tokens"
            ) from None
