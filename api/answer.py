"""What is the same in every chunk and every object of one answer, and what both kinds of answers share.

Used by the two renderings. An answer has one id, one time and one model, whatever it is streamed as.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import lru_cache
from typing import Any, Protocol

import msgspec

from common.protocol import Event, Finished, Usage

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"


class Answer(msgspec.Struct, frozen=True):
    """What identifies an answer.

    Attributes:
        id: OpenAI's, such as ``chatcmpl-…``.
        created: Unix seconds.
        model: As the client named it.
        fingerprint: The same for the same model under the same version of mlx-pool.
        service_tier: Only where the client asked for one.
    """

    id: str
    created: int
    model: str
    fingerprint: str
    service_tier: str | None = None

    def head(self, kind: str) -> bytes:
        """The beginning of an object of `kind`, without its closing brace."""
        fields: dict[str, Any] = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        if self.service_tier is not None:
            fields["service_tier"] = self.service_tier
        return msgspec.json.encode(fields)[:-1]


class Rendering(Protocol):
    """How a kind of answer looks; its methods are called in the order of a stream or of a whole answer."""

    def opening(self) -> bytes:
        """The first bytes of a stream; may be empty."""

    def frames(self, events: list[Event]) -> bytes:
        """What a stream's client gets for `events`; may be empty. None of them is `Failed`."""

    def add(self, events: list[Event]) -> None:
        """Keep what `events` say for `body`."""

    def body(self, finished: Finished) -> bytes:
        """The whole answer as one object."""


@lru_cache(maxsize=256)
def fingerprint(model: str, quantization: str) -> str:
    """OpenAI's system_fingerprint: changes when what computes the answer does."""
    return "fp_" + hashlib.sha256(f"{model}\0{quantization}\0{version()}".encode()).hexdigest()[:10]


def version() -> str:
    """mlx-pool's; 0 where it runs without being installed."""
    try:
        return importlib.metadata.version("mlx-pool")
    except importlib.metadata.PackageNotFoundError:
        return "0"


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
