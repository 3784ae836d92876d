"""`POST /v1/responses/input_tokens`: how many tokens the input of a request has, without generating.

A falcon resource, made by `api.app`. The body is that of a response, so that the count is that of the same request.
https://platform.openai.com/docs/api-reference/responses/input-tokens
"""

from __future__ import annotations

from typing import Literal

import falcon.asgi
import msgspec

from api.generation.served_model import ModelLookup
from api.generation.stored_answer import AnswerLookup, owner_of
from api.openai.responses.request import parse
from api.openai.responses.stored.completion import complete
from api.tokenizing.counting import Tokenizing
from api.tokenizing.endpoint import TokenizingEndpoint
from common.settings import Settings


class InputTokensObject(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class InputTokens(TokenizingEndpoint):
    """See the module."""

    def __init__(
        self, models: ModelLookup, tokenizing: Tokenizing, answers: AnswerLookup, settings: Settings
    ) -> None:
        super().__init__(models, tokenizing, settings)
        self._answers = answers

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        request = await complete(await self._read(req, parse), self._answers, owner_of(req))
        model = await self._model(req, resp, request.ignored, request.model)
        tokens = await self._tokenizing.count(
            model, request.prompts[0], tool_use=request.tool_use, grammar=request.grammar
        )
        resp.data = msgspec.json.encode(InputTokensObject(input_tokens=tokens.count))
