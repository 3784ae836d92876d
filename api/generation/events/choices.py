"""The jobs of one request, and their events as they arrive.

Owned by an `ActiveRequest` or a `FollowedAnswer`. One job is the usual case and costs no task of its own. Independent of
rendering and HTTP.
"""

from __future__ import annotations

import asyncio

from api.generation.events.choice_order import ChoiceOrder
from api.generation.events.relay import Relay
from api.generation.events.subscription import Subscription
from api.generation.front_end import AnswerEvent, ChoiceEvents
from common.errors import RequestError
from common.protocol import Event, Failed, Finished, Started


class Choices:
    """See the module.

    Args:
        job_ids: In the order of the choices' indices.
        channel: Where the jobs' events are published.
        in_order: Whether the events come in the order of `ChoiceOrder`, in place of that of their arrival.

    Attributes:
        failed: The end of the first job to fail or to be cancelled; the request fails with it.
        is_aborted: Whether that came from this process and not from the job.
        prompt_tokens: By index, of the choices whose prefill has begun.
    """

    def __init__(self, job_ids: list[str], channel: str, relay: Relay, *, in_order: bool = False) -> None:
        self.failed: Failed | None = None
        self.is_aborted = False
        self.prompt_tokens: dict[int, int] = {}
        self._relay = relay
        self._subscriptions: list[Subscription] = [relay.subscribe(job_id, channel) for job_id in job_ids]
        self._order = ChoiceOrder(len(job_ids)) if in_order and len(job_ids) > 1 else None
        self._finished: dict[int, Finished] = {}
        self._takes: dict[int, asyncio.Task[list[Event]]] = {}

    @property
    def is_done(self) -> bool:
        """Whether no more events follow: every job has ended, or one has failed or was cancelled."""
        return self.failed is not None or len(self._finished) == len(self._subscriptions)

    @property
    def finished(self) -> list[Finished]:
        """How the jobs ended, in order; complete once `is_done` and not `failed`."""
        return [self._finished[index] for index in sorted(self._finished)]

    @property
    def num_tokens(self) -> int:
        """Tokens received so far."""
        return sum(subscription.num_tokens for subscription in self._subscriptions)

    def ends(self) -> list[Finished]:
        """As `finished`, once `is_done`.

        Raises:
            RequestError: The answer is incomplete: the request failed or was cancelled.
        """
        if self.failed is not None:
            raise as_error(self.failed)
        return self.finished

    def abort(self, failed: Failed) -> None:
        """End here, whatever the jobs do."""
        for subscription in self._subscriptions:
            subscription.abort(failed)

    def mark_queued(self, now_mono: float) -> None:
        """The jobs are in the queue: silence counts from now, on the event loop's clock."""
        for subscription in self._subscriptions:
            subscription.last_event_mono = now_mono

    def read_journals(self, now_mono: float) -> None:
        """The jobs were queued by another request: begin with what is in their journals."""
        self.mark_queued(now_mono)
        for subscription in self._subscriptions:
            subscription.read_journal_next()

    def unfinished(self) -> list[int]:
        """The indices of the jobs that may still be queued or running."""
        return [
            index
            for index, subscription in enumerate(self._subscriptions)
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
        if len(self._subscriptions) == 1:
            events = await self._subscriptions[0].take()
            return [(0, self._record(0, events))] if events else []
        taken = [(index, events) for index, events in await self._take_any() if events]
        if self._order is not None:
            taken = self._in_order(self._order, taken)
        return [(index, self._record(index, events)) for index, events in taken]

    def _in_order(
        self, order: ChoiceOrder, taken: list[tuple[int, list[Event]]]
    ) -> list[tuple[int, list[Event]]]:
        """What comes next in order; first what is not in the journals, which has no bytes of its own."""
        unnumbered = [(index, events[:1]) for index, events in taken if events[0].n == 0]
        for index, events in taken:
            order.add(index, events[1:] if events[0].n == 0 else events)
        return unnumbered + order.pop()

    def _record(self, index: int, events: list[Event]) -> list[AnswerEvent | Failed]:
        """Note what events mean for the request; returns those that belong to the answer."""
        # Not the subscription's `terminal`: that may have arrived since these events were taken, with others before it.
        last = events[-1]
        if isinstance(last, Finished) and last.finish_reason == "cancelled":
            last = _cancelled(last.n)
            events = [*events[:-1], last]
        if isinstance(last, Finished):
            self._finished[index] = last
        elif isinstance(last, Failed) and self.failed is None:
            self.failed = last
            self.is_aborted = self._subscriptions[index].is_aborted
        first = events[0]  # `Started` is the first event of a subscription, if it comes at all
        if isinstance(first, Started):
            self.prompt_tokens[index] = first.prompt_tokens
            if first.n == 0:
                events = events[1:]
        return events

    async def _take_any(self) -> list[tuple[int, list[Event]]]:
        order = self._order
        for index, subscription in enumerate(self._subscriptions):
            is_needed = index not in self._finished if order is None else order.needs(index)
            if is_needed and index not in self._takes:
                self._takes[index] = asyncio.create_task(subscription.take())
        await asyncio.wait(self._takes.values(), return_when=asyncio.FIRST_COMPLETED)
        done = [index for index, take in self._takes.items() if take.done()]
        return [(index, self._takes.pop(index).result()) for index in sorted(done)]


def as_error(failed: Failed) -> RequestError:
    """The error that a terminal event reports."""
    return RequestError(
        failed.message,
        status=failed.status,
        type=failed.kind,
        param=failed.param,
        code=failed.code,
        retry_after_seconds=failed.retry_after_seconds,
    )


def _cancelled(n: int) -> Failed:
    return Failed(
        n,
        "The request was cancelled before its answer was complete.",
        status=503,
        code="cancelled",
    )
