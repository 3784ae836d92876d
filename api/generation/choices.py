"""The jobs of one request, and their events as they come.

Owned by a generation. One job is the usual case and costs no task of its own. Knows no rendering and no HTTP.
"""

from __future__ import annotations

import asyncio

from api.generation.relay import Relay
from api.generation.subscription import Subscription
from common.protocol import Event, Failed, Finished, GenerationJob


class Choices:
    """See the module.

    Attributes:
        jobs: In the order of the choices' indices.
        failed: What the first job to fail said; the request fails with it.
    """

    def __init__(self, jobs: list[GenerationJob], relay: Relay) -> None:
        self.jobs = jobs
        self.failed: Failed | None = None
        self._relay = relay
        self._subscriptions: list[Subscription] = [relay.subscribe(job.job_id) for job in jobs]
        self._finished: dict[int, Finished] = {}
        self._takes: dict[int, asyncio.Task[list[Event]]] = {}

    @property
    def is_done(self) -> bool:
        """Whether nothing more comes: every job has ended, or one has failed."""
        return self.failed is not None or len(self._finished) == len(self.jobs)

    @property
    def finished(self) -> list[Finished]:
        """How the jobs ended; those of all of them once `is_done` and not `failed`."""
        return [self._finished[index] for index in sorted(self._finished)]

    @property
    def num_tokens(self) -> int:
        """That came so far."""
        return sum(subscription.num_tokens for subscription in self._subscriptions)

    def give_up(self, failed: Failed) -> None:
        """End here, whatever the jobs do."""
        for subscription in self._subscriptions:
            subscription.give_up(failed)

    def heard(self, at: float) -> None:
        """They are in the queue: silence counts from now, on the event loop's clock."""
        for subscription in self._subscriptions:
            subscription.heard_at = at

    def release(self) -> list[GenerationJob]:
        """Listen no more; the jobs that may still be somewhere."""
        for take in self._takes.values():
            take.cancel()
        running = []
        for job, subscription in zip(self.jobs, self._subscriptions, strict=True):
            self._relay.unsubscribe(subscription)
            if subscription.terminal is None or subscription.is_given_up:
                running.append(job)
        return running

    async def take(self) -> list[tuple[int, list[Event]]]:
        """Wait for events of any job: (its index, events in order), the terminal one last. Empty when time has moved on.

        Not to be called once `is_done`.
        """
        if len(self.jobs) == 1:
            taken = [(0, await self._subscriptions[0].take())]
        else:
            taken = await self._take_any()
        for index, _ in taken:
            terminal = self._subscriptions[index].terminal
            if isinstance(terminal, Failed):
                self.failed = self.failed or terminal
            elif terminal is not None:
                self._finished[index] = terminal
        return [each for each in taken if each[1]]

    async def _take_any(self) -> list[tuple[int, list[Event]]]:
        for index, subscription in enumerate(self._subscriptions):
            if index not in self._takes and index not in self._finished:
                self._takes[index] = asyncio.create_task(subscription.take())
        await asyncio.wait(self._takes.values(), return_when=asyncio.FIRST_COMPLETED)
        done = [index for index, take in self._takes.items() if take.done()]
        return [(index, self._takes.pop(index).result()) for index in sorted(done)]
