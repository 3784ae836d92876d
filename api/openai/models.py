"""`/v1/models` and `/v1/models/{id}`: the models that live workers serve."""

from __future__ import annotations

import falcon.asgi
import msgspec

from api.generation.served_model import ModelLookup, ServedModel

OWNER = "mlx-pool"


class ModelMeta(msgspec.Struct, frozen=True, kw_only=True):
    """As llama.cpp's."""

    n_ctx: int
    n_vocab: int


class ModelObject(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="model"):
    """OpenAI's model object, with fields of our own and of other servers: `root` and `max_model_len` are vLLM's, `max_context_length` is
    LM Studio's. `root` differs from `id` if that is an alias.
    """

    id: str
    created: int
    owned_by: str
    root: str
    context_length: int
    max_model_len: int
    max_context_length: int
    meta: ModelMeta
    sampling_defaults: dict[str, int | float]
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
        root=model.id,
        context_length=model.context_length,
        max_model_len=model.context_length,
        max_context_length=model.context_length,
        meta=ModelMeta(n_ctx=model.context_length, n_vocab=model.vocab_size),
        sampling_defaults=model.sampling_defaults,
        workers=model.num_workers,
        free_slots=model.free_slots,
        quantization=model.quantization,
    )


class Models:
    """All models that can be used now, then their aliases without wildcards."""

    def __init__(self, models: ModelLookup) -> None:
        self._lookup = models

    async def on_get(self, _req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        named = [(model.id, model) for model in self._lookup.current()]
        models = [_model_object(model, name) for name, model in [*named, *self._lookup.aliases]]
        resp.data = msgspec.json.encode(ModelList(models))

    on_head = on_get


class Model:
    """One of them, by its name or an alias. Its id may contain slashes; it is returned as it was requested."""

    def __init__(self, models: ModelLookup) -> None:
        self._lookup = models

    async def on_get(self, _req: falcon.asgi.Request, resp: falcon.asgi.Response, model_id: str) -> None:
        model = await self._lookup.resolve(model_id)
        resp.data = msgspec.json.encode(_model_object(model, model_id))

    on_head = on_get
