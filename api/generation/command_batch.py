"""Redis commands of many requests on one connection: those of the same moment travel together.

Called by whatever of the API talks to Redis. redis-py's asyncio pool takes a connection for each caller and breaks at a
hundred; here a burst of any size is one connection and few round trips. Knows nothing of what the commands mean.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any

import redis.asyncio

Command = tuple[Any, ...]
"""Name and arguments."""

MAX_CALLERS = 64
"""In one round trip, so that a burst does not keep Redis from everybody else."""


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
        """Send `commands`, next to each other and in order; calls are sent in the order in which they came.

        A caller that is cancelled before its turn sends nothing. Nothing is ever sent twice.

        Raises:
            redis.RedisError: They may have been carried out or not.
        """
        answers = await self.execute_each(commands)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    async def execute_each(self, commands: Iterable[Command]) -> list[Any]:
        """As `execute`, but a command that the server refuses has its error in place of an answer.

        Raises:
            redis.RedisError: The server could not be asked; they may have been carried out or not.
        """
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((list(commands), answer))
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send_all())
        return await answer

    async def _send_all(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(MAX_CALLERS, len(self._waiting)))]
            batch = [caller for caller in batch if not caller[1].done()]
            try:
                await self._send(batch)
            finally:  # only when we are cancelled is somebody still without an answer
                for _, answer in batch:
                    answer.cancel()

    async def _send(self, batch: list[tuple[list[Command], asyncio.Future[list[Any]]]]) -> None:
        try:
            async with self._client.pipeline(transaction=self._transaction) as pipe:
                for commands, _ in batch:
                    for command in commands:
                        pipe.execute_command(*command)
                results = await pipe.execute(raise_on_error=False)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is the callers' to hear)
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        start = 0
        for commands, answer in batch:
            own = results[start : start + len(commands)]
            start += len(commands)
            if not answer.done():
                answer.set_result(own)
