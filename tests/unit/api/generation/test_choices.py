"""The events of a request's jobs, merged."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from api.generation.choices import Choices
from api.generation.relay import Relay
from api.generation.subscription import Subscription
from common.protocol import Delta, Event, Failed, Finished, GenerationJob, Started, TextPrompt, Usage

END = Finished(2, "stop", Usage(5, 1))


class FakeRelay:
    """Subscriptions that the test feeds."""

    def __init__(self) -> None:
        self.subscriptions: list[Subscription] = []

    def subscribe(self, job_id: str) -> Subscription:
        self.subscriptions.append(Subscription(job_id, self._read_journal, 100))
        return self.subscriptions[-1]

    async def _read_journal(self, *_arguments: Any) -> list[Event]:
        raise AssertionError("no event is missed in these tests")


def choices_of(num_jobs: int) -> tuple[Choices, list[Subscription]]:
    relay = FakeRelay()
    jobs = [
        GenerationJob(job_id=f"{i}", model="m", channel="c", prompt=TextPrompt("")) for i in range(num_jobs)
    ]
    return Choices(jobs, cast("Relay", relay)), relay.subscriptions


async def take_all(choices: Choices) -> dict[int, list[Any]]:
    taken: dict[int, list[Any]] = {}
    while not choices.is_done:
        for index, events in await choices.take():
            taken.setdefault(index, []).extend(events)
    return taken


def test_an_end_that_arrives_while_earlier_events_are_collected() -> None:
    """A choice is complete only once its last events were taken, whenever they arrived: none of them is lost."""

    async def test() -> None:
        choices, (first, second) = choices_of(2)
        reader = asyncio.create_task(take_all(choices))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # both subscriptions are waited for
        first.offer(Delta(1, 7, "a"))
        await asyncio.sleep(0)  # the first take has completed, but its result was not collected yet
        first.offer(END)
        second.offer(Delta(1, 7, "b"))
        second.offer(END)
        assert await reader == {0: [Delta(1, 7, "a"), END], 1: [Delta(1, 7, "b"), END]}
        assert choices.finished == [END, END]

    asyncio.run(test())


def test_a_failure_ends_all_choices() -> None:
    """The request fails with the first job that does; the others may still run."""

    async def test() -> None:
        choices, (first, second) = choices_of(2)
        second.offer(Delta(1, 7, "b"))
        first.offer(Failed(1, "no", 400))
        await take_all(choices)
        assert choices.failed == Failed(1, "no", 400)

    asyncio.run(test())


def test_a_started_event_is_not_part_of_the_answer() -> None:
    """It is not in the journal. It reports the prompt's length, and lets the stream's headers go out."""

    async def test() -> None:
        choices, (only,) = choices_of(1)
        only.offer(Started(0, 5))
        assert await choices.take() == [(0, [])]
        assert choices.prompt_tokens == {0: 5}
        only.offer(Delta(1, 7, "a"))
        only.offer(END)
        assert await choices.take() == [(0, [Delta(1, 7, "a"), END])]

    asyncio.run(test())
