"""A model that can be used now, and where to look one up.

What protocols (`api.openai`) know of models: they check requests against a `ServedModel` and list models through
`ModelLookup`, which is `api.generation.model_directory.ModelDirectory`. Must not import Redis.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

DEFAULT_MODEL = "default_model"
"""The name by which clients of mlx_lm.server ask for its only model."""

DEFAULT_NAMES = (DEFAULT_MODEL, "default")


class ServedModel(msgspec.Struct, frozen=True):
    """A model with at least one live worker.

    Attributes:
        created: Unix seconds when its first worker loaded it.
        context_length: In tokens; the smallest of its workers'.
        vocab_size: Token ids are below it; the smallest of its workers'.
        num_workers: Live ones.
        free_slots: Of all of them, as of their last heartbeats.
        busy_slots: The same; each generates one choice of a request.
        tokens_per_second: Of all of them, while they were busy lately; 0: unknown.
        mean_tokens: Mean completion tokens of recent answers; 0: unknown.
        can_fill: Whether every worker can fill a gap before a suffix.
        sampling_defaults: Fields of `common.protocol.SamplingParams` that hold where a request is silent.
        can_reason: Whether the model has markers of reasoning.
        can_tokenize: Whether a worker tokenizes for clients; those of older versions do not.
    """

    id: str
    created: int
    context_length: int
    vocab_size: int
    num_workers: int
    free_slots: int
    quantization: str
    tokens_per_second: float = 0.0
    mean_tokens: float = 0.0
    can_fill: bool = False
    busy_slots: int = 0
    sampling_defaults: dict[str, int | float] = {}
    can_reason: bool = False
    can_tokenize: bool = False

    def seconds_for(self, num_requests: int) -> float | None:
        """The estimated time in which its workers answer so many requests; None: unknown."""
        if not (self.tokens_per_second and self.mean_tokens):
            return None
        return num_requests * self.mean_tokens / self.tokens_per_second


class ModelLookup(Protocol):
    """The models that can be used now."""

    @property
    def aliases(self) -> list[tuple[str, ServedModel]]:
        """Other names that a client may choose, and the models that they stand for now."""

    def current(self) -> list[ServedModel]:
        """All of them, by name.

        Raises:
            RequestError: 503; Redis is unavailable.
        """

    async def resolve(self, name: str | None) -> ServedModel:
        """The model that a request names, or that the name is an alias of; None: the default.

        Raises:
            RequestError: 400, no model is named and there is no default; 404, the model is unknown; 503, it has no
                worker now or Redis is unavailable.
        """
