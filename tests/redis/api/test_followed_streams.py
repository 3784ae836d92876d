"""Channels of detached requests on a real server: what a relay follows, whatever breaks, and that it follows nothing longer."""

from __future__ import annotations

import asyncio

import pytest

from api.generation.events import relay as module
from api.generation.events.followed_answer import FollowedAnswer
from api.generation.request import AnswerRecord, Retention
from api.generation.stored_answer import StoredAnswer
from common import names
from common.protocol import Delta, Event, Failed, Finished, Usage, encode
from tests.redis.api.test_relay import ALL, END, JOB, Side, run, take_all

CHANNEL = names.stream_channel(JOB)


def answer_of(*job_ids: str) -> StoredAnswer:
    record = AnswerRecord(
        front_end="f", job_ids=list(job_ids), created=0, model="m", fingerprint="x", stream=True
    )
    return StoredAnswer(record=record, model="m", retention=Retention(ttl_seconds=60, is_detached=True))


async def publish(side: Side, event: Event, job_id: str = JOB, channel: str = CHANNEL) -> None:
    await side.write(event, job_id)
    await side.client.publish(channel, encode([(job_id, event)]))


async def num_listeners(side: Side, channel: str = CHANNEL) -> int:
    [(_, num)] = await side.client.pubsub_numsub(channel)
    return int(num)


async def wait_for_listeners(side: Side, num: int) -> None:
    while await num_listeners(side) != num:  # noqa: ASYNC110 (the state is the server's)
        await asyncio.sleep(0.005)


def test_events_before_the_channel_is_subscribed(redis_url: str) -> None:
    """The subscription is not waited for: what is published until then is read from the journal, the end included."""

    async def test(side: Side) -> None:
        subscription = side.relay.subscribe(JOB, CHANNEL)
        for event in ALL:
            await publish(side, event)
        assert await take_all(subscription) == ALL

    run(redis_url, test)


def test_a_channel_is_followed_only_as_long_as_needed(redis_url: str) -> None:
    """One subscription on the server however many clients follow; none after the last one, also if it comes back at once."""

    async def test(side: Side) -> None:
        first, second = side.relay.subscribe(JOB, CHANNEL), side.relay.subscribe(JOB, CHANNEL)
        await wait_for_listeners(side, 1)
        side.relay.unsubscribe(first)
        await publish(side, ALL[0])
        assert await second.take() == [ALL[0]]
        side.relay.unsubscribe(second)
        third = side.relay.subscribe(JOB, CHANNEL)
        side.relay.unsubscribe(third)
        await wait_for_listeners(side, 0)
        fourth = side.relay.subscribe(JOB, CHANNEL)
        await wait_for_listeners(side, 1)
        fourth.read_journal_next()
        while not (taken := await fourth.take()):
            pass
        assert taken == [ALL[0]]
        side.relay.unsubscribe(fourth)
        await wait_for_listeners(side, 0)
        assert side.relay.num_subscriptions == 0
        assert side.relay._followers == {}

    run(redis_url, test)


def test_a_thousand_streams_leave_nothing_behind(redis_url: str) -> None:
    """Neither in the relay nor on the server, and the process's own channel stays."""

    async def test(side: Side) -> None:
        ids = [f"{i:030x}" for i in range(1000)]
        subscriptions = [side.relay.subscribe(each, names.stream_channel(each)) for each in ids]
        await asyncio.sleep(0)
        for subscription in subscriptions:
            side.relay.unsubscribe(subscription)
        while await side.client.pubsub_channels("mlxpool:stream:*"):  # noqa: ASYNC110 (the same)
            await asyncio.sleep(0.005)
        assert side.relay._subscribed == {side.relay.channel.encode()}
        assert await num_listeners(side, side.relay.channel) == 1

    run(redis_url, test)


def test_a_dropped_connection(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Followed channels are subscribed again, and what was missed is read."""
    monkeypatch.setattr(module, "RECONNECT_SECONDS", 0.02)

    async def test(side: Side) -> None:
        subscription = side.relay.subscribe(JOB, CHANNEL)
        taking = asyncio.create_task(take_all(subscription))
        for event in ALL:
            if event.n % 10 == 5:
                await side.kill_subscribed()
            await publish(side, event)
            await asyncio.sleep(0.002)
        await wait_for_listeners(side, 1)
        assert await taking == ALL

    run(redis_url, test)


def test_an_answer_that_is_followed_by_two_clients(redis_url: str) -> None:
    """From the journal's start and then live; one that reads slowly holds little and gets everything."""

    async def test(side: Side) -> None:
        for event in ALL[:20]:
            await side.write(event)
        quick, slow = (FollowedAnswer(answer_of(JOB), side.relay) for _ in range(2))
        events: list[Event] = []
        while len(events) < 20:
            for _, taken in await quick.take():
                events += taken
        for event in ALL[20:]:
            await publish(side, event)
        while not quick.is_done:
            for _, taken in await quick.take():
                events += taken
        assert events == ALL
        assert quick.finished() == [END]
        quick.release()
        pieces: list[list[Event]] = []
        while not slow.is_done:
            pieces += [list(taken) for _, taken in await slow.take()]
        assert max(map(len, pieces)) <= 8
        assert [event for piece in pieces for event in piece] == ALL
        slow.release()
        await wait_for_listeners(side, 0)

    run(redis_url, test, max_events=8)


def test_choices_in_their_order(redis_url: str) -> None:
    """However the jobs' events arrive, every follower gets the same order."""

    async def test(side: Side) -> None:
        other = "f" * 24
        live = FollowedAnswer(answer_of(JOB, other), side.relay)
        await wait_for_listeners(side, 1)
        journal: list[Event] = [Delta(1, 1, "a"), Delta(2, 2, "b"), Finished(3, "stop", Usage(1, 2))]
        for event in journal:
            await publish(side, event, other)
        await publish(side, Finished(1, "stop", Usage(1, 0)))
        late = FollowedAnswer(answer_of(JOB, other), side.relay)
        orders = []
        for follower in (live, late):
            taken: list[tuple[int, int]] = []
            while not follower.is_done:
                taken += [(index, e.n) for index, events in await follower.take() for e in events]
            orders.append(taken)
            follower.release()
        assert orders == [[(0, 1), (1, 1), (1, 2), (1, 3)]] * 2

    run(redis_url, test)


def test_a_shutdown_ends_followers(redis_url: str) -> None:
    """With an error that is marked as this process's own."""

    async def test(side: Side) -> None:
        follower = FollowedAnswer(answer_of(JOB), side.relay)
        side.relay.end_all()
        taken: list[object] = []
        while not follower.is_done:
            taken += [event for _, events in await follower.take() for event in events]
        [failed] = taken
        assert isinstance(failed, Failed)
        assert (failed.code, follower.is_aborted) == ("shutting_down", True)
        follower.release()

    run(redis_url, test)
