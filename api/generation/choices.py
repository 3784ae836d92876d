"""The jobs of one request, and their events as they arrive.

Owned by an `ActiveRequest`. One job is the usual case and costs no task of its own. Independent of rendering and HTTP.
"""

from __future__ import annotations

import asyncio

from api.generation.front_end import AnswerEvent
from api.generation.relay import Relay
from api.generation.subscription import Subscription
from common.protocol import Event, Failed, Finished, GenerationJob, Started

ChoiceEvents = list[tuple[int, list[AnswerEvent | Failed]]]
"""Events in order, by the index of their choice. An empty list of events: the choice's prefill has begun."""


class Choices:
    """See the module.

    Attributes:
        jobs: In the order of the choices' indices.
        failed: The end of the first job to fail or to be cancelled; the request fails with it.
        prompt_tokens: By index, of the choices whose prefill has begun.
    """

    def __init__(self, jobs: list[GenerationJob], relay: Relay) -> None:
        self.jobs = jobs
        self.failed: Failed | None = None
        self.prompt_tokens: dict[int, int] = {}
        self._relay = relay
        self._subscriptions: list[Subscription] = [relay.subscribe(job.job_id) for job in jobs]
        self._finished: dict[int, Finished] = {}
        self._takes: dict[int, asyncio.Task[list[Event]]] = {}

    @property
    def is_done(self) -> bool:
        """Whether no more events follow: every job has ended, or one has failed or was cancelled."""
        return self.failed is not None or len(self._finished) == len(self.jobs)

    @property
    def finished(self) -> list[Finished]:
        """How the jobs ended, in order; complete once `is_done` and not `failed`."""
        return [self._finished[index] for index in sorted(self._finished)]

    @property
    def num_tokens(self) -> int:
        """Tokens received so far."""
        return sum(subscription.num_tokens for subscription in self._subscriptions)

    def abort(self, failed: Failed) -> None:
        """End here, whatever the jobs do."""
        for subscription in self._subscriptions:
            subscription.abort(failed)

    def mark_queued(self, now_mono: float) -> None:
        """The jobs are in the queue: silence counts from now, on the event loop's clock."""
        for subscription in self._subscriptions:
            subscription.last_event_mono = now_mono

    def unfinished(self) -> list[GenerationJob]:
        """The jobs that may still be queued or running."""
        return [
            job
            for job, subscription in zip(self.jobs, self._subscriptions, strict=True)
            if subscription.terminal is None or subscription.is_aborted
        ]

    def release(self) -> None:
        """Unsubscribe."""
        for take in self._takes.values():
            take.cancel()
        for subscription in self._subscriptions:
            self._relay.unsubscribe(subscription)

    async def take(self) -> ChoiceEvents:
        """Wait for events of any job; a terminal event is the last of its choice. Empty on a tick of the relay.

        Must not be called once `is_done`.
        """
        if len(self.jobs) == 1:
            events = await self._subscriptions[0].take()
            return [(0, self._record(0, events))] if events else []
        return [(index, self._record(index, events)) for index, events in await self._take_any() if events]

    def _record(self, index: int, events: list[Event]) -> list[AnswerEvent | Failed]:
        """Note what events mean for the request; returns those that belong to the answer."""
        # Not the subscription's `terminal`: that may have arrived since these events were taken, with others before it.
        last = events[-1]
        if isinstance(last, Finished) and last.finish_reason == "cancelled":
            last = _cancelled(last.n)
            events = [*events[:-1], last]
        if isinstance(last, Finished):
            self._finished[index] = last
        elif isinstance(last, Failed):
            self.failed = self.failed or last
        first = events[0]  # `Started` is the first event of a subscription, if it comes at all
        if isinstance(first, Started):
            self.prompt_tokens[index] = first.prompt_tokens
            events = events[1:]
        return events  # type: ignore[return-value]

    async def _take_any(self) -> list[tuple[int, list[Event]]]:
        for index, subscription in enumerate(self._subscriptions):
            if index not in self._takes and index not in self._finished:
                self._takes[index] = asyncio.create_task(subscription.take())
        await asyncio.wait(self._takes.values(), return_when=asyncio.FIRST_COMPLETED)
        done = [index for index, take in self._takes.items() if take.done()]
        return [(index, self._takes.pop(index).result()) for index in sorted(done)]


def _cancelled(n: int) -> Failed:
    return Failed(
        n,
        "The request was cancelled before its answer was complete.",
        status=503,
        code="cancelled",
    )
