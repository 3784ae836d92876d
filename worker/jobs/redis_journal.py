"""Journal first, then publish: the one script call per decode step, and the only writer of journals.

The generation loop sends a step's events without waiting and reads the answer one step later, while the device works.
A dropped connection is made again here and the unanswered call is repeated; the script knows its own writes, so that nothing
is written twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import redis
from redis.exceptions import NoScriptError
from rq.defaults import RQ_KEY_PREFIX

from common import names

log = logging.getLogger(__name__)

# ARGV: 1 where the connection was ever lost (0 else); then for each channel its name and number of rows, and per row: job id,
# execution id, n, seconds to live (0: leave), event. n is 0 for an event that is published only. A row is accepted if the
# writer's execution still exists (its key is the lease) and XADD takes its n, which is larger than any before; or if the
# writer has written that n before (a repeated call). Redis may have lost its last moments when a connection was lost: then
# n has to be the very next one (XLEN is the last n, since n starts at 1 and has no gap). A journal's key that somebody made
# something else refuses its own rows only; an error of the whole server (no memory, read-only) is answered as such.
# Answer: {refused executions, listeners of each channel}.
_APPEND = f"""
local lost, refused, listeners, i = ARGV[1] == '1', {{}}, {{}}, 2
while i <= #ARGV do
  local channel, last, accepted = ARGV[i], i + 1 + 5 * ARGV[i + 1], {{}}
  i = i + 2
  while i <= last do
    local job, execution, n, ttl, event = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
    local ok = redis.call('EXISTS', '{RQ_KEY_PREFIX}:execution:' .. job .. ':' .. execution) == 1
    if ok and n ~= '0' then
      local key, id, writer = '{names.JOURNAL_PREFIX}' .. job, n .. '-0', string.sub(execution, 1, 8)
      ok = not lost or redis.pcall('XLEN', key) == n - 1
      if ok then
        local added = redis.pcall('XADD', key, id, 'x', writer, 'd', event)
        ok = type(added) ~= 'table'
        if not ok and not string.find(added.err, 'equal or smaller') and not string.find(added.err, 'WRONGTYPE') then
          return added
        end
        if ok and ttl ~= '0' then redis.call('EXPIRE', key, ttl) end
      end
      if not ok then
        local entry = redis.pcall('XRANGE', key, id, id)[1]
        ok = entry ~= nil and entry[2][2] == writer
      end
    end
    if ok then accepted[#accepted + 1] = '["' .. job .. '",' .. event .. ']'
    else refused[#refused + 1] = execution end
    i = i + 5
  end
  listeners[#listeners + 1] =
    #accepted > 0 and redis.call('PUBLISH', channel, '[' .. table.concat(accepted, ',') .. ']') or -1
end
return {{refused, listeners}}
"""

_FIRST_RETRY_SECONDS = 0.05
_LAST_RETRY_SECONDS = 1.0


class Row(msgspec.Struct, frozen=True, gc=False):
    """One event of one job, to be written and published.

    Attributes:
        n: The event's place in the journal; 0: published only.
        event: Encoded, as `common.protocol` says.
        ttl_seconds: What the journal has to live from now on; 0 leaves it.
    """

    channel: str
    job_id: str
    execution_id: str
    n: int
    event: bytes
    ttl_seconds: int = 0


@dataclass(frozen=True, slots=True)
class AppendResult:
    """The answer to one call.

    Attributes:
        refused: Executions that are not ours any more, or whose job's journal went on without us.
        listeners: How many API processes heard each channel's part.
    """

    refused: set[str] = field(default_factory=set)
    listeners: dict[str, int] = field(default_factory=dict)


class Journal(Protocol):
    """What the generation loop needs."""

    def send(self, rows: Sequence[Row]) -> None:
        """Hand over one step's rows; the call before must have been collected."""

    def collect(self) -> AppendResult:
        """The answer to the last `send`; called once for each."""


class RedisJournal:
    """`Journal` on one connection of its own.

    Args:
        client: Its settings are used; its pool is not.
        given_up: Asked while Redis is away; True ends the wait with the connection's error.
    """

    def __init__(self, client: redis.Redis, given_up: Callable[[], bool] = lambda: False) -> None:
        self._connection = client.connection_pool.make_connection()
        self._given_up = given_up
        self._sha: str | None = None
        self._sent: tuple[list[str], list[Any]] = ([], [])  # channels and arguments of the call in flight
        self._broken = False  # nothing could be sent
        self._was_lost = False  # the connection was lost once, and Redis may have been restarted

    def send(self, rows: Sequence[Row]) -> None:
        by_channel: dict[str, list[Row]] = {}
        for row in rows:
            by_channel.setdefault(row.channel, []).append(row)
        arguments: list[Any] = []
        for channel, group in by_channel.items():
            arguments += (channel, len(group))
            for row in group:
                arguments += (row.job_id, row.execution_id, row.n, row.ttl_seconds, row.event)
        self._sent = (list(by_channel), arguments)
        self._write()

    def collect(self) -> AppendResult:
        """As `Journal.collect`.

        Raises:
            redis.RedisError: Redis is away and `given_up` said so.
        """
        refused, listeners = self._read()
        channels, self._sent = self._sent[0], ([], [])
        return AppendResult(
            {execution_id.decode() for execution_id in refused},
            {channel: count for channel, count in zip(channels, listeners, strict=True) if count >= 0},
        )

    def close(self) -> None:
        """Give up the connection."""
        self._connection.disconnect()

    def _write(self) -> None:
        """Send what is to be sent; a failure is mended by `_read`."""
        try:
            if self._sha is None:
                self._connection.send_command("SCRIPT", "LOAD", _APPEND)
                self._sha = self._connection.read_response().decode()
            command = self._connection.pack_command(
                "EVALSHA", self._sha, 0, int(self._was_lost), *self._sent[1]
            )
            self._connection.send_packed_command(command, check_health=False)
            self._broken = False
        except redis.RedisError as error:
            self._lost(error)

    def _read(self) -> Any:
        wait_seconds = _FIRST_RETRY_SECONDS
        while True:
            if not self._broken:
                try:
                    return self._connection.read_response()
                except NoScriptError:  # Redis was restarted, or its scripts were flushed
                    self._sha = None
                    self._write()
                    continue
                except redis.RedisError as error:
                    self._lost(error)
            if self._given_up():
                raise redis.ConnectionError("gave up waiting for Redis")
            time.sleep(wait_seconds)
            wait_seconds = min(wait_seconds * 2, _LAST_RETRY_SECONDS)
            self._write()

    def _lost(self, error: redis.RedisError) -> None:
        """Start again with a fresh connection: what is left on the old one may answer something else."""
        if not self._broken:
            log.warning("Redis does not take the journal (%s); generation waits", error)
        self._broken = self._was_lost = True
        self._sha = None
        self._connection.disconnect()
