"""A stored answer as endpoints and front ends see it: its record, how it stands, and where to look one up.

`api.generation.answer_store` implements `AnswerLookup`. Must not import Redis, so that protocols can import it.
"""

from __future__ import annotations

from typing import Literal, Protocol

import falcon.asgi
import msgspec

from api.generation.request import AnswerRecord, Retention
from common import names
from common.errors import RequestError
from common.protocol import Delta, Echo, Event, Failed, Finished, Started

AnswerEvent = Started | Echo | Delta | Finished
"""What an answer is rendered from. `Started` is among them only if the request asks for it in the journal (n is 1)."""

ChoiceEvents = list[tuple[int, list[AnswerEvent | Failed]]]
"""Events in order, by the index of their choice. An empty list of events: the choice's prefill has begun."""

AnswerStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
"""`incomplete`: complete, but a choice was cut off by its maximum length."""

OPEN_API = "open"
"""The owner of answers while the API needs no keys."""


def owner_of(req: falcon.asgi.Request) -> str:
    """Who may read what this request stores: the API key, by its name and fingerprint."""
    return getattr(req.context, "owner", OPEN_API)


class StoredAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A stored answer, without its events.

    Attributes:
        record: What a rendering needs.
        model: The model id, which is also the queue's name.
        retention: As the request set it; its `details` are the front end's own data.
        is_cancelled: Whether `AnswerStore.cancel` was called.
    """

    record: AnswerRecord
    model: str
    retention: Retention
    is_cancelled: bool = False

    @property
    def id(self) -> str:
        """The first job's id."""
        return self.record.job_ids[0]

    @property
    def channel(self) -> str | None:
        """Where its events are published; None: only to the API process that accepted the request."""
        return names.stream_channel(self.id) if self.retention.is_detached else None


class AnswerState(msgspec.Struct, frozen=True, kw_only=True):
    """How a stored answer stood at one moment.

    Attributes:
        error: Of a failed answer, else None.
        choices: The events of each choice so far, without gaps, the terminal one included; in the order of the choices.
    """

    status: AnswerStatus
    error: RequestError | None
    choices: list[list[Event]]

    @property
    def is_ended(self) -> bool:
        """Whether no more events follow."""
        return self.status not in ("queued", "in_progress")

    @property
    def finished(self) -> list[Finished]:
        """How the choices ended; complete if the status is `completed` or `incomplete`."""
        return [choice[-1] for choice in self.choices if choice and isinstance(choice[-1], Finished)]


class EventSource(Protocol):
    """Where a response's events come from: a request of this process, or an answer that it follows."""

    @property
    def job_id(self) -> str:
        """The first job's, which names the answer."""

    @property
    def is_done(self) -> bool:
        """Whether no more events follow."""

    @property
    def is_aborted(self) -> bool:
        """Whether it failed in this process; its jobs may go on."""

    async def take(self) -> ChoiceEvents:
        """Wait for events; empty on a tick of the clock. Must not be called once `is_done`."""

    def finished(self) -> list[Finished]:
        """How the choices ended, once `is_done`.

        Raises:
            RequestError: The answer is incomplete: the request failed or was cancelled.
        """

    def release(self) -> None:
        """Unsubscribe; called exactly once."""


class AnswerLookup(Protocol):
    """The stored answers of all API processes. Each method raises a RequestError, 503, while Redis is unavailable."""

    @property
    def response_ttl_seconds(self) -> int:
        """How long a response that a client stores is kept after its end."""

    @property
    def max_conversation_bytes(self) -> int:
        """Of a request together with what it refers to in the store: as much as it could have in its body."""

    async def load(self, answer_id: str, owner: str) -> StoredAnswer:
        """A stored answer.

        Raises:
            RequestError: 404, there is none with this id, it has expired, or it is another key's.
        """

    async def state(self, answer: StoredAnswer) -> AnswerState:
        """How the answer stands."""

    async def cancel(self, answer: StoredAnswer) -> None:
        """Cancel the answer's jobs, queued or running. Its state says `cancelled`, unless it was complete before."""

    async def delete(self, answer: StoredAnswer) -> None:
        """Delete the answer and its journals; jobs that have not ended are cancelled."""

    def follow(self, answer: StoredAnswer) -> EventSource:
        """Its events from the journals' start, then live until its end if it is detached. Give `release` to `Client.on_end`."""
