"""`/v1/models` and `/v1/models/{id}`: what live workers serve."""

from __future__ import annotations

from typing import Any

import falcon.asgi
import msgspec

from api.model_directory import ModelDirectory, ServedModel

OWNER = "mlx-pool"


def _model_object(model: ServedModel, name: str) -> dict[str, Any]:
    """OpenAI's model object under the name that was asked for, and what else is good to know."""
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": OWNER,
        "context_length": model.context_length,
        "workers": model.num_workers,
        "free_slots": model.free_slots,
        "quantization": model.quantization,
    }


class Models:
    """All models that can be used now."""

    def __init__(self, directory: ModelDirectory) -> None:
        self._directory = directory

    async def on_get(self, _req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        models = [_model_object(model, model.id) for model in self._directory.current()]
        resp.data = msgspec.json.encode({"object": "list", "data": models})

    on_head = on_get


class Model:
    """One of them; its id may have slashes."""

    def __init__(self, directory: ModelDirectory) -> None:
        self._directory = directory

    async def on_get(self, _req: falcon.asgi.Request, resp: falcon.asgi.Response, model_id: str) -> None:
        model = await self._directory.resolve(model_id)
        resp.data = msgspec.json.encode(_model_object(model, model_id))

    on_head = on_get
