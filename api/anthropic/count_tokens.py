"""`POST /v1/messages/count_tokens`: the tokens that the prompt of the same request to `/v1/messages` would have.

A falcon resource. A worker's tokenizer counts, tools, system text and template included; nothing is generated.
https://platform.claude.com/docs/en/api/messages-count-tokens
"""

from __future__ import annotations

import falcon.asgi
import msgspec

from api.anthropic.messages.request import parse
from api.tokenizing.endpoint import TokenizingEndpoint


class TokenCount(msgspec.Struct, frozen=True):
    input_tokens: int


class CountTokens(TokenizingEndpoint):
    """See the module."""

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        request = await self._read(req, parse)
        model = await self._model(req, resp, request.ignored, request.model)
        [prompt] = request.prompts
        tokens = await self._tokenizing.count(
            model, prompt, tool_use=request.tool_use, grammar=request.grammar
        )
        resp.data = msgspec.json.encode(TokenCount(tokens.count))
