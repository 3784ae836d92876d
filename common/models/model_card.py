"""The card that each live worker publishes about its model: what API processes know of it.

`worker.jobs.heartbeat` writes cards, `api.generation.model_directory` reads them. New fields go last and have defaults, as in
`common.protocol`.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """The description that a live worker publishes: a Redis hash of these fields, as text.

    Attributes:
        id: Model id, the RQ queue's name.
        worker: The worker's name.
        created: Unix seconds when the model was loaded.
        context_length: In tokens, prompt and completion together.
        vocab_size: Token ids are below it.
        max_batch: Sequences decoded together; 1 for a model whose cache cannot batch.
        free_slots: How many of those are free now.
        quantization: Such as ``4-bit, group 32``, or the weights' type.
        has_chat_template: Whether messages are rendered by the model's own template.
        tokens_per_second: Recent speed of generation, while busy.
        mean_tokens: Recent mean length of completed answers; 0: none yet.
        step: Counts decode and prefill steps; stands still only when idle or stuck.
        can_fill: Whether the model can fill a gap before a suffix.
        sampling_defaults: Fields of `SamplingParams` that the model's `generation_config.json` sets, as a JSON object; empty: none.
        can_reason: Whether the model has markers of reasoning.
        can_tokenize: Whether the worker replies to `TokenizeRequest`s.
    """

    id: Annotated[str, Meta(pattern=r"^[^,\x00-\x1f\x7f]+$")]
    worker: str
    created: int
    context_length: Annotated[int, Meta(ge=1)]
    vocab_size: Annotated[int, Meta(ge=1)]
    max_batch: Annotated[int, Meta(ge=1)]
    free_slots: Annotated[int, Meta(ge=0)]
    quantization: str = ""
    has_chat_template: bool = True
    tokens_per_second: float = 0.0
    mean_tokens: float = 0.0
    step: int = 0
    can_fill: bool = False
    sampling_defaults: str = ""
    can_reason: bool = False
    can_tokenize: bool = False

    def to_hash(self) -> dict[Any, Any]:
        """The fields of a Redis hash: text by name."""
        return {k: str(int(v) if isinstance(v, bool) else v) for k, v in msgspec.structs.asdict(self).items()}

    @classmethod
    def from_hash(cls, fields: dict[bytes, bytes]) -> ModelCard:
        """Decode the reply of HGETALL; unknown fields, from a newer worker, are ignored.

        Raises:
            msgspec.ValidationError: A field is missing or is not of its type.
        """
        return msgspec.convert({k.decode(): v.decode() for k, v in fields.items()}, cls, strict=False)
