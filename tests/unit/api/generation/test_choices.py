"""The events of a request's jobs, merged."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.generation.events.choices import Choices
from api.generation.events.relay import Relay
from api.generation.events.subscription import Subscription
from common.protocol import Delta, Event, Failed, Finished, Started, Usage

END = Finished(2, "stop", Usage(5, 1))


class FakeRelay:
    """Subscriptions that the test feeds."""

    def __init__(self) -> None:
        self.subscriptions: list[Subscription] = []

    def subscribe(self, job_id: str, _channel: str) -> Subscription:
        self.subscriptions.append(Subscription(job_id, self._read_journal, 100))
        return self.subscriptions[-1]

    async def _read_journal(self, *_arguments: Any) -> list[Event]:
        raise AssertionError("no event is missed in these tests")


def choices_of(num_jobs: int, *, in_order: bool = False) -> tuple[Choices, list[Subscription]]:
    relay = FakeRelay()
    ids = [f"{i}" for i in range(num_jobs)]
    return Choices(ids, "c", cast("Relay", relay), in_order=in_order), relay.subscriptions


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


def test_a_started_event_of_the_journal_is_part_of_the_answer() -> None:
    """Event 1 of a job that asks for it; it is no token."""

    async def test() -> None:
        choices, (only,) = choices_of(1)
        only.offer(Started(1, 5))
        only.offer(Delta(2, 7, "a"))
        assert await choices.take() == [(0, [Started(1, 5), Delta(2, 7, "a")])]
        assert (choices.prompt_tokens, choices.num_tokens) == ({0: 5}, 1)
        only.offer(Finished(3, "stop", Usage(5, 1)))
        await choices.take()
        assert choices.num_tokens == 1

    asyncio.run(test())


async def take_in_order(choices: Choices) -> list[tuple[int, Any]]:
    taken: list[tuple[int, Any]] = []
    while not choices.is_done:
        for index, events in await choices.take():
            taken += [(index, event) for event in events]
    return taken


@pytest.mark.parametrize("last", [END, Finished(2, "cancelled", Usage(1, 1)), Failed(2, "no", 400)])
@settings(deadline=None)
@given(data=st.data())
def test_the_order_of_resumable_choices(last: Any, data: st.DataObject) -> None:
    """However events arrive, they come out in the same order, the first of each choice first; a failure ends it where it stands."""
    journals: list[list[Any]] = [
        [*(Delta(n, n, str(n)) for n in range(1, num + 1)), msgspec.structs.replace(end, n=num + 1)]
        for num, end in zip((3, 1, 5), (END, last, END), strict=True)
    ]
    arrivals = data.draw(st.permutations([0] * 4 + [1] * 2 + [2] * 6))
    is_collected = data.draw(st.lists(st.booleans(), min_size=12, max_size=12))

    async def test() -> list[tuple[int, Any]]:
        choices, subscriptions = choices_of(3, in_order=True)
        reader = asyncio.create_task(take_in_order(choices))
        for index, is_now in zip(arrivals, is_collected, strict=True):
            subscriptions[index].offer(Started(0, 5))
            position = sum(1 for each in seen if each == index)
            seen.append(index)
            subscriptions[index].offer(journals[index][position])
            if is_now:
                await asyncio.sleep(0)
        return await asyncio.wait_for(reader, 5)

    seen: list[int] = []
    taken = [(index, event.n) for index, event in asyncio.run(test())]
    expected = [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2)]
    if last is END:
        expected += [(2, 2), (0, 3), (2, 3), (0, 4), (2, 4), (2, 5), (2, 6)]
    assert taken == expected


def test_an_abort_in_this_process() -> None:
    """It is told apart from a failure of the job, which another process would see too."""

    async def test() -> None:
        choices, (first, second) = choices_of(2, in_order=True)
        first.offer(Delta(1, 7, "a"))
        choices.abort(Failed(0, "over"))
        assert [index for index, _ in await take_in_order(choices)] == [0, 1]
        assert choices.is_aborted
        other, (only,) = choices_of(1)
        only.offer(Failed(1, "no"))
        await take_in_order(other)
        assert not other.is_aborted
        assert second.terminal is not None

    asyncio.run(test())
