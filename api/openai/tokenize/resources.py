"""The falcon resources of `/tokenize` and `/detokenize`."""

from __future__ import annotations

import falcon.asgi
import msgspec

from api.openai.tokenize.request import parse_detokenize, parse_tokenize
from api.tokenizing.endpoint import TokenizingEndpoint
from common.errors import invalid


class TokenizeResponse(msgspec.Struct, frozen=True):
    """As vLLM's."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct, frozen=True):
    """As vLLM's."""

    prompt: str


class Tokenize(TokenizingEndpoint):
    """Text or messages to tokens."""

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        asked = await self._read(req, parse_tokenize)
        model = await self._model(req, resp, asked.ignored, asked.model)
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


class Detokenize(TokenizingEndpoint):
    """Tokens to text."""

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        asked, ignored = await self._read(req, parse_detokenize)
        model = await self._model(req, resp, ignored, asked.model)
        for token_id in asked.tokens:
            if token_id >= model.vocab_size:
                raise invalid(
                    f"`tokens` has the token id {token_id}, which is outside the model's vocabulary of "
                    f"{model.vocab_size} tokens.",
                    "tokens",
                )
        resp.data = msgspec.json.encode(DetokenizeResponse(await self._tokenizing.text(model, asked.tokens)))
