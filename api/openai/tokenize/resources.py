"""The falcon resources of `/tokenize` and `/detokenize`."""

from __future__ import annotations

import falcon.asgi
import msgspec

from api.generation.served_model import ModelLookup
from api.http.body import parsed, read_json, report_ignored
from api.openai.tokenize.request import parse_detokenize, parse_tokenize
from api.tokenizing.counting import Tokenizing
from common.errors import invalid
from common.settings import Settings


class TokenizeResponse(msgspec.Struct, frozen=True):
    """As vLLM's."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct, frozen=True):
    """As vLLM's."""

    prompt: str


class Tokenize:
    """Text or messages to tokens."""

    def __init__(self, models: ModelLookup, tokenizing: Tokenizing, settings: Settings) -> None:
        self._lookup = models
        self._tokenizing = tokenizing
        self._settings = settings

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        body = await read_json(req, self._settings)
        asked = await parsed(body, parse_tokenize)
        report_ignored(req, resp, asked.ignored, strict=self._settings.strict_parameters)
        model = await self._lookup.resolve(asked.model)
        tokens = await self._tokenizing.count(
            model,
            asked.prompt,
            tool_use=asked.tool_use,
            grammar=asked.grammar,
            adds_special_tokens=asked.adds_special_tokens,
            returns_tokens=True,
            returns_strings=asked.returns_strings,
        )
        strings = tokens.token_strings if asked.returns_strings else None
        response = TokenizeResponse(tokens.count, model.context_length, tokens.token_ids, strings)
        resp.data = msgspec.json.encode(response)


class Detokenize:
    """Tokens to text."""

    def __init__(self, models: ModelLookup, tokenizing: Tokenizing, settings: Settings) -> None:
        self._lookup = models
        self._tokenizing = tokenizing
        self._settings = settings

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        body = await read_json(req, self._settings)
        asked, ignored = await parsed(body, parse_detokenize)
        report_ignored(req, resp, ignored, strict=self._settings.strict_parameters)
        model = await self._lookup.resolve(asked.model)
        for token_id in asked.tokens:
            if token_id >= model.vocab_size:
                raise invalid(
                    f"`tokens` has the token id {token_id}, which is outside the model's vocabulary of "
                    f"{model.vocab_size} tokens.",
                    "tokens",
                )
        resp.data = msgspec.json.encode(DetokenizeResponse(await self._tokenizing.text(model, asked.tokens)))
