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

    def frames(self, index: int, events: list[Event]) -> bytes:
        """What a stream's client gets for `events` of a choice; may be empty. None of them is `Failed`."""

    def closing(self, finished: list[Finished]) -> bytes:
        """The last bytes of a stream, when all choices are whole."""

    def add(self, index: int, events: list[Event]) -> None:
        """Keep what `events` of a choice say for `body`."""

    def body(self, finished: list[Finished]) -> bytes:
        """The whole answer as one object; how each choice ended."""


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


def total_usage(finished: list[Finished], num_choices: int) -> Usage:
    """Of all choices of a request together; each prompt counts once.

    Args:
        num_choices: Of each prompt.
    """
    usages = [each.usage for each in finished]
    prompts = [usages[i : i + max(1, num_choices)] for i in range(0, len(usages), max(1, num_choices))]
    return Usage(
        prompt_tokens=sum(choices[0].prompt_tokens for choices in prompts),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        # Of a prompt's choices one reads it, whichever that is, and the others find it read.
        cached_tokens=sum(min(usage.cached_tokens for usage in choices) for choices in prompts),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
    )


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
