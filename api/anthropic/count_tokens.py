"""`POST /v1/messages/count_tokens`: the tokens that the prompt of the same request to `/v1/messages` would have.

A falcon resource. A worker's tokenizer counts, tools, system text and template included; nothing is generated.
https://platform.claude.com/docs/en/api/messages-count-tokens
"""

from __future__ import annotations

import falcon.asgi
import msgspec

from api.anthropic.messages.request import parse
from api.generation.served_model import ModelLookup
from api.http.body import parsed, read_json, report_ignored
from api.tokenizing.counting import Tokenizing
from common.settings import Settings


class TokenCount(msgspec.Struct, frozen=True):
    input_tokens: int


class CountTokens:
    """See the module."""

    def __init__(self, models: ModelLookup, tokenizing: Tokenizing, settings: Settings) -> None:
        self._lookup = models
        self._tokenizing = tokenizing
        self._settings = settings

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        body = await read_json(req, self._settings)
        request = await parsed(body, parse)
        report_ignored(req, resp, request.ignored, strict=self._settings.strict_parameters)
        model = await self._lookup.resolve(request.model)
        [prompt] = request.prompts
        tokens = await self._tokenizing.count(
            model, prompt, tool_use=request.tool_use, grammar=request.grammar
        )
        resp.data = msgspec.json.encode(TokenCount(tokens.count))
