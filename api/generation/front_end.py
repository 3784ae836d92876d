"""What a protocol provides for one of its endpoints: parsing, checks, and a rendering of the answer.

Implemented by the protocols (`api.protocols` lists them), called by `api.generation.endpoint` and
`api.generation.delivery`, which are the same for all of them. Must not know Redis, RQ or any one protocol.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from api.generation.request import AnswerRecord, GenerationRequest
from api.generation.served_model import ServedModel
from api.generation.stored_answer import AnswerEvent, AnswerLookup, ChoiceEvents
from common.errors import RequestError
from common.protocol import Finished, Usage

__all__ = ["AnswerEvent", "ChoiceEvents", "FrontEnd", "Rendering", "call_id", "total_usage"]

_ID_CHARACTERS = 24
"""As many as the ids of OpenAI's and Anthropic's calls have after their prefix."""


class Rendering(Protocol):
    """An answer as its protocol writes it: a pure function of the request's `AnswerRecord` and its jobs' journals.

    Every byte, ids and times included, follows from those, so that any API process can render the answer again. Frames
    must not depend on how events were batched: ``frames(i, a + b) == frames(i, a) + frames(i, b)``. One instance renders
    one answer once: either `opening`, `frames`, `closing` or `error` of a stream, or `add` and `body`.
    """

    def opening(self) -> bytes:
        """The first bytes of a stream; may be empty."""

    def frames(self, index: int, events: list[AnswerEvent]) -> bytes:
        """The frames of the next events of a choice, in the order of the events; may be empty."""

    def closing(self, finished: list[Finished]) -> bytes:
        """The last bytes of a stream, once all choices are complete; their ends in the order of their indices."""

    def error(self, error: RequestError) -> bytes:
        """The last bytes of a stream that fails."""

    def keep_alive(self) -> bytes:
        """Sent when a stream has been silent for long; not part of the answer."""

    def add(self, index: int, events: list[AnswerEvent]) -> None:
        """Collect the next events of a choice for `body`."""

    def body(self, finished: list[Finished]) -> bytes:
        """The complete answer as one JSON object; how each choice ended, in the order of their indices."""


@dataclass(frozen=True)
class FrontEnd:
    """One endpoint of a protocol.

    Attributes:
        name: Stands in the job's record, so that any API process finds the rendering. Never renamed.
        parse: A request body to a request; raises a RequestError, 400.
        check: What can only be checked with the model, or takes a while; raises a RequestError, 400.
        rendering: A new rendering of the answer that a record describes.
        complete: Completes a request with stored answers, such as the conversation before it, and checks these; also gets the
            owner whose answers it may read.
        accepted: The body for a request that is answered as soon as it is queued (`GenerationRequest.is_background`).
    """

    name: str
    parse: Callable[[bytes], GenerationRequest]
    check: Callable[[GenerationRequest, ServedModel], Awaitable[None]]
    rendering: Callable[[AnswerRecord], Rendering]
    complete: Callable[[GenerationRequest, AnswerLookup, str], Awaitable[GenerationRequest]] | None = None
    accepted: Callable[[AnswerRecord], bytes] | None = None


def call_id(prefix: str, key: str, index: int) -> str:
    """The id of a tool call, derived so that any process renders the same one.

    Args:
        key: Unique to the choice that the call belongs to.
        index: Of the call in its choice.
    """
    return prefix + hashlib.sha256(f"{key}/{index}".encode()).hexdigest()[:_ID_CHARACTERS]


def total_usage(finished: list[Finished], best_of: int) -> Usage:
    """The token counts of all choices of a request; each prompt counts once.

    Args:
        finished: How the choices ended: those of the first prompt, then those of the next.
        best_of: Choices of each prompt, at least 1.
    """
    usages = [each.usage for each in finished]
    prompts = [usages[i : i + best_of] for i in range(0, len(usages), best_of)]
    return Usage(
        prompt_tokens=sum(choices[0].prompt_tokens for choices in prompts),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        # One of a prompt's choices prefills it, whichever that is; the others find it cached.
        cached_tokens=sum(min(usage.cached_tokens for usage in choices) for choices in prompts),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
    )
