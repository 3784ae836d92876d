"""`/v1/models` and `/v1/models/{id}`: the models that live workers serve."""

from __future__ import annotations

import falcon.asgi
import msgspec

from api.generation.served_model import ModelLookup, ServedModel

OWNER = "mlx-pool"


class ModelObject(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="model"):
    """OpenAI's model object, with fields of our own."""

    id: str
    created: int
    owned_by: str
    context_length: int
    workers: int
    free_slots: int
    quantization: str


class ModelList(msgspec.Struct, frozen=True, tag_field="object", tag="list"):
    """The models that can be used now."""

    data: list[ModelObject]


def _model_object(model: ServedModel, name: str) -> ModelObject:
    return ModelObject(
        id=name,
        created=model.created,
        owned_by=OWNER,
        context_length=model.context_length,
        workers=model.num_workers,
        free_slots=model.free_slots,
        quantization=model.quantization,
    )


class Models:
    """All models that can be used now."""

    def __init__(self, models: ModelLookup) -> None:
        self._lookup = models

    async def on_get(self, _req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        models = [_model_object(model, model.id) for model in self._lookup.current()]
        resp.data = msgspec.json.encode(ModelList(models))

    on_head = on_get


class Model:
    """One of them. Its id may contain slashes; it is returned as it was requested."""

    def __init__(self, models: ModelLookup) -> None:
        self._lookup = models

    async def on_get(self, _req: falcon.asgi.Request, resp: falcon.asgi.Response, model_id: str) -> None:
        model = await self._lookup.resolve(model_id)
        resp.data = msgspec.json.encode(_model_object(model, model_id))

    on_head = on_get
