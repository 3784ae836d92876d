"""The relay: one pub/sub connection for all requests of this API process.

`subscribe` before the job is enqueued; then each message is decoded once and its events are passed to their subscriptions.
A detached request has a channel of its own, which is subscribed while this process follows it; other jobs' events come on the
process's channel. A dropped or half-open connection is detected and replaced, and every journal is read after that. A job that ends without a
published event is detected by its status. Used by `Choices`. Must not know HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import Any

import msgspec
import redis
import redis.asyncio

from api.generation.command_batch import CommandBatch
from api.generation.events.subscription import Subscription
from common import connections, names
from common.protocol import Event, Failed, decode_event, decode_step
from common.rq import JsonJob

log = logging.getLogger(__name__)

START_SECONDS = 2.0
"""How long a starting process waits for its subscription; without Redis it starts anyway and answers 503."""

PING_SECONDS = 2.0
"""Silence on the channel before a PING: a half-open socket just stays silent."""

PONG_SECONDS = 3.0
RECONNECT_SECONDS = 0.25

TICK_SECONDS = 1.0
"""How often waiting handlers wake up to check the time."""

SILENT_SECONDS = 5.0
"""Silence of one job before its status is read, and between two such reads."""

_SHUTDOWN = Failed(
    0, "The server is shutting down.", status=503, code="shutting_down", retry_after_seconds=1.0
)

_LIVE_STATUSES = (b"queued", b"started", b"deferred", b"scheduled")


class Relay:
    """See the module.

    Attributes:
        channel: Where workers publish for this process; set by `start`, which runs after the fork.
        is_connected: Whether the channel is subscribed now.

    Args:
        reads: For journals and job statuses.
        max_events: Buffered for each job; more are read from the journal.
        queue_seconds: How long a job may wait in the queue, for an error message.
    """

    def __init__(
        self, client: redis.asyncio.Redis, reads: CommandBatch, *, max_events: int, queue_seconds: int
    ) -> None:
        self.channel = ""
        self.is_connected = False
        self._client = client
        self._reads = reads
        self._max_events = max_events
        self._queue_seconds = queue_seconds
        self._subscriptions: dict[str, Subscription] = {}  # on this process's channel, by job id
        self._followers: dict[bytes, list[Subscription]] = {}  # by channel
        self._pubsub: Any = None  # the connection, while it is subscribed
        self._subscribed: set[bytes] = set()  # channels that were sent on it
        self._updater: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._connected = asyncio.Event()

    @property
    def num_subscriptions(self) -> int:
        """Jobs whose events this process waits for."""
        return len(self._all())

    def _all(self) -> list[Subscription]:
        followers = [each for of_channel in self._followers.values() for each in of_channel]
        return [*self._subscriptions.values(), *followers]

    async def start(self) -> None:
        """Start to listen; returns once the channel is subscribed, or after START_SECONDS without Redis."""
        self.channel = names.api_channel(secrets.token_hex(8))
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._tick())]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._connected.wait(), START_SECONDS)

    def end_all(self) -> None:
        """The process ends: abort all subscriptions; the handlers cancel their jobs."""
        for subscription in self._all():
            subscription.abort(_SHUTDOWN)

    async def stop(self) -> None:
        """Stop listening."""
        tasks = [*self._tasks, *([] if self._updater is None else [self._updater])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def subscribe(self, job_id: str, channel: str) -> Subscription:
        """Subscribe to a job, until `unsubscribe`; to one on this process's channel before it is in the queue.

        On any other channel events may be missed until Redis has confirmed it. They are in the journal, which is read then.
        """
        subscription = Subscription(job_id, self._read_journal, self._max_events, channel)
        if channel == self.channel:
            self._subscriptions[job_id] = subscription
        else:
            self._followers.setdefault(channel.encode(), []).append(subscription)
            self._update_channels()
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Drop a job's subscription."""
        if subscription.channel == self.channel:
            self._subscriptions.pop(subscription.job_id, None)
            return
        channel = subscription.channel.encode()
        of_channel = self._followers[channel]
        of_channel.remove(subscription)
        if not of_channel:
            del self._followers[channel]
            self._update_channels()

    def _update_channels(self) -> None:
        if self._pubsub is not None and (self._updater is None or self._updater.done()):
            self._updater = asyncio.create_task(self._send_channels(self._pubsub))

    async def _send_channels(self, pubsub: Any) -> None:
        """Subscribe to what is followed, and to nothing else; one task at a time, so that the order is right."""
        with contextlib.suppress(redis.RedisError, OSError):  # the listener detects it and connects again
            while pubsub is self._pubsub:
                wanted = {self.channel.encode(), *self._followers}
                if new := wanted - self._subscribed:
                    self._subscribed |= new
                    await pubsub.subscribe(*new)
                elif old := self._subscribed - wanted:
                    self._subscribed -= old
                    await pubsub.unsubscribe(*old)
                else:
                    return

    async def _listen(self) -> None:
        is_first_failure = True
        while True:
            pubsub = self._client.pubsub()
            try:
                await self._listen_on(pubsub)
            except (redis.RedisError, OSError) as error:
                if self.is_connected or is_first_failure:
                    log.warning("%s; requests are answered 503 until it is back", self._diagnosis(error))
                is_first_failure = False
            except Exception:
                log.exception("the relay failed and restarts")
            finally:
                self.is_connected = False
                self._pubsub = None
                with contextlib.suppress(redis.RedisError, OSError):
                    await pubsub.aclose()
            await asyncio.sleep(RECONNECT_SECONDS)

    def _diagnosis(self, error: Exception) -> str:
        if isinstance(error, redis.AuthenticationError):
            return connections.refusal(self._client, error)
        return f"Redis is unavailable ({error})"

    async def _listen_on(self, pubsub: Any) -> None:
        """Pass on messages until the connection fails. Every message, a pong too, shows that it is alive."""
        own = self.channel.encode()
        self._subscribed = {own, *self._followers}
        await pubsub.subscribe(*self._subscribed)
        self._pubsub = pubsub
        self._update_channels()  # what was added meanwhile
        while True:
            message = await pubsub.get_message(timeout=PING_SECONDS)
            if message is None:
                await pubsub.ping()
                message = await pubsub.get_message(timeout=PONG_SECONDS)
                if message is None:
                    raise redis.TimeoutError("no reply on the subscribed connection")
            channel = message["channel"]
            if message["type"] == "message":
                if channel == own:
                    self._pass_on(message["data"])
                else:
                    self._pass_on_to_followers(channel, message["data"])
            elif message["type"] == "subscribe":
                if channel == own:
                    self._on_subscribed()
                for subscription in self._followers.get(channel, ()):
                    subscription.read_journal_next()

    def _on_subscribed(self) -> None:
        """The channel is subscribed, perhaps again: what was published since is in the journals."""
        if not self.is_connected:
            log.info("listening on %s", self.channel)
        self.is_connected = True
        self._connected.set()
        self._read_all_journals()

    def _pass_on(self, data: bytes) -> None:
        now = asyncio.get_running_loop().time()
        subscriptions = self._subscriptions
        for job_id, event in self._decoded(data):
            subscription = subscriptions.get(job_id)
            if subscription is not None:
                subscription.last_event_mono = now
                subscription.offer(event)

    def _pass_on_to_followers(self, channel: bytes, data: bytes) -> None:
        """A channel has the jobs of one request, and each client that follows it has a subscription to each of them."""
        now = asyncio.get_running_loop().time()
        followers = self._followers.get(channel, ())
        for job_id, event in self._decoded(data):
            for subscription in followers:
                if subscription.job_id == job_id:
                    subscription.last_event_mono = now
                    subscription.offer(event)

    def _decoded(self, data: bytes) -> list[tuple[str, Event]]:
        """The events of a message; none if it cannot be decoded, and then all journals are read."""
        try:
            return decode_step(data)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            log.exception("a message on %s cannot be decoded", self.channel)
            self._read_all_journals()
            return []

    def _read_all_journals(self) -> None:
        for subscription in self._all():
            subscription.read_journal_next()

    async def _read_journal(self, job_id: str, first_n: int, max_entries: int) -> list[Event]:
        command = ("XRANGE", names.journal(job_id), f"{first_n}-0", "+", "COUNT", max_entries)
        [entries] = await self._reads.execute([command])
        return [decode_event(fields[b"d"]) for _, fields in entries]

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                await self._check_silent()
            except (redis.RedisError, OSError):
                pass  # the listener logs it
            except Exception:
                log.exception("the statuses of silent jobs could not be checked")
            for subscription in self._all():
                subscription.wake()

    async def _check_silent(self) -> None:
        """Read the status of each job without a recent event."""
        now = asyncio.get_running_loop().time()
        silent = [s for s in self._all() if now - s.last_event_mono >= SILENT_SECONDS]
        if not silent:
            return
        for subscription in silent:
            subscription.last_event_mono = now
        commands = [("HGET", JsonJob.key_for(s.job_id), "status") for s in silent]
        for subscription, status in zip(silent, await self._reads.execute(commands), strict=True):
            if status not in _LIVE_STATUSES:
                subscription.read_journal_next(self._verdict(subscription, status))

    def _verdict(self, subscription: Subscription, status: bytes | None) -> Failed:
        """The error for a job that has ended, if its journal has no terminal event."""
        if status is None and not subscription.has_started:
            return Failed(
                0,
                f"The request is no longer in the queue: it waited {self._queue_seconds} seconds, or it was removed.",
                status=503,
                code="queue_timeout",
                retry_after_seconds=10.0,
            )
        if status in (b"stopped", b"canceled"):
            return Failed(0, "The request was stopped by an operator.", status=503, code="stopped")
        return Failed(0, "The request failed before its answer was complete.", code="answer_lost")
