"""`/v1/models` and `/v1/models/{id}`, a path that two protocols have: Anthropic's shape if its version header is sent, else OpenAI's."""

from __future__ import annotations

import falcon.asgi
import msgspec

from api.anthropic import models as anthropic_models
from api.generation.served_model import ModelLookup
from api.openai import models as openai_models
from api.protocols import ANTHROPIC_HEADER


class Models:
    """All models that can be used now, and their aliases."""

    def __init__(self, models: ModelLookup) -> None:
        self._lookup = models
        self._openai = openai_models.Models(models)

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        if req.get_header(ANTHROPIC_HEADER) is None:
            await self._openai.on_get(req, resp)
        else:
            named = [(model.id, model) for model in self._lookup.current()]
            page = anthropic_models.page([*named, *self._lookup.aliases], req.params)
            resp.data = msgspec.json.encode(page)
        resp.append_header("vary", ANTHROPIC_HEADER)

    on_head = on_get


class Model:
    """One of them. Its id may contain slashes; it is returned as it was requested."""

    def __init__(self, models: ModelLookup) -> None:
        self._lookup = models
        self._openai = openai_models.Model(models)

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, model_id: str) -> None:
        if req.get_header(ANTHROPIC_HEADER) is None:
            await self._openai.on_get(req, resp, model_id)
        else:
            info = anthropic_models.model_info(await self._lookup.resolve(model_id), model_id)
            resp.data = msgspec.json.encode(info)
        resp.append_header("vary", ANTHROPIC_HEADER)

    on_head = on_get
