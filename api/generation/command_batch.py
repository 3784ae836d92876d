"""Redis commands of many requests on one connection: those of the same moment are sent together.

Used by everything in the API that sends commands to Redis. redis-py's asyncio pool takes a connection per caller and fails at
a hundred; here a burst of any size takes one connection and few round trips. Independent of what the commands mean.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any

import redis.asyncio

from common.errors import RequestError, unavailable

Command = tuple[Any, ...]
"""Name and arguments."""

MAX_CALLERS = 64
"""In one round trip, so that a burst does not keep Redis from other clients."""


def queue_unavailable() -> RequestError:
    """A 503 while Redis is unavailable."""
    return unavailable("The queue is unavailable; try again in a moment.", code="queue_unavailable")


class CommandBatch:
    """See the module.

    Args:
        transaction: Each round trip is one MULTI.
    """

    def __init__(self, client: redis.asyncio.Redis, *, transaction: bool) -> None:
        self._client = client
        self._transaction = transaction
        self._waiting: deque[tuple[list[Command], asyncio.Future[list[Any]]]] = deque()
        self._sender: asyncio.Task[None] | None = None

    async def execute(self, commands: Iterable[Command]) -> list[Any]:
        """Send `commands` in order and not interleaved with others; calls are sent in the order in which they were made.

        A caller that is cancelled before its turn sends nothing. Nothing is ever sent twice.

        Raises:
            redis.RedisError: They may have been executed or not.
        """
        replies = await self.execute_each(commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def execute_each(self, commands: Iterable[Command]) -> list[Any]:
        """Like `execute`, but the reply of a command that the server refuses is the error.

        Raises:
            redis.RedisError: The connection failed; they may have been executed or not.
        """
        reply: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((list(commands), reply))
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send_all())
        return await reply

    async def _send_all(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(MAX_CALLERS, len(self._waiting)))]
            batch = [caller for caller in batch if not caller[1].done()]
            try:
                await self._send(batch)
            finally:  # a caller without a reply is left only when this task is cancelled
                for _, reply in batch:
                    reply.cancel()

    async def _send(self, batch: list[tuple[list[Command], asyncio.Future[list[Any]]]]) -> None:
        try:
            async with self._client.pipeline(transaction=self._transaction) as pipe:
                for commands, _ in batch:
                    for command in commands:
                        pipe.execute_command(*command)
                results = await pipe.execute(raise_on_error=False)
        except Exception as error:  # noqa: BLE001 (passed on to the callers, whatever it is)
            for _, reply in batch:
                if not reply.done():
                    reply.set_exception(error)
            return
        start = 0
        for commands, reply in batch:
            own = results[start : start + len(commands)]
            start += len(commands)
            if not reply.done():
                reply.set_result(own)
