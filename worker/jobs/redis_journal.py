"""`Journal` on Redis: one script call per decode step appends its events and publishes them. The only writer of journals.

The generation loop sends a step's entries without waiting and reads the reply one step later, while the device computes.
A lost connection is made again here and the call without a reply is repeated; the script recognizes its own writes, so nothing is
written twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis
from redis.exceptions import NoScriptError
from rq.defaults import RQ_KEY_PREFIX

from common import names
from worker.loop.journal import AppendResult, JournalEntry

log = logging.getLogger(__name__)

# ARGV: 1 if the connection was ever lost, else 0; then for each channel its name and number of entries, and per entry: job
# id, execution id, n, time to live in seconds (0: unchanged), event. n is 0 for an event that is published only. An entry is
# accepted if the writer's execution still exists (its key is the lease) and XADD accepts its n, which must be larger than any
# before; or if the writer has written that n before (a repeated call). Once a connection was lost, Redis may have lost its
# last writes too: then n must be exactly the next one (XLEN is the last n, since n starts at 1 without gaps). A journal key of
# another type refuses its own entries only; an error of the server (out of memory, read-only) fails the call.
# Returns: {refused executions, number of subscribers of each channel}.
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


class RedisJournal:
    """`Journal` on one connection of its own.

    Args:
        client: Its settings are used, its connection pool is not.
        stop_waiting: Called while Redis is away; True ends the wait with the connection's error.
    """

    def __init__(self, client: redis.Redis, stop_waiting: Callable[[], bool] = lambda: False) -> None:
        self._connection = client.connection_pool.make_connection()
        self._stop_waiting = stop_waiting
        self._sha: str | None = None
        self._pending: tuple[list[str], list[Any]] = ([], [])  # channels and arguments of the call in flight
        self._is_broken = False  # the pending call could not be sent
        self._was_lost = False  # a connection was lost once: Redis may have been restarted

    def send(self, entries: Sequence[JournalEntry]) -> None:
        """As `Journal.send`."""
        by_channel: dict[str, list[JournalEntry]] = {}
        for entry in entries:
            by_channel.setdefault(entry.channel, []).append(entry)
        arguments: list[Any] = []
        for channel, group in by_channel.items():
            arguments += (channel, len(group))
            for entry in group:
                arguments += (entry.job_id, entry.execution_id, entry.n, entry.ttl_seconds, entry.event)
        self._pending = (list(by_channel), arguments)
        self._write()

    def collect(self) -> AppendResult:
        """As `Journal.collect`.

        Raises:
            redis.RedisError: Redis is away and `stop_waiting` returned True.
        """
        refused, listeners = self._read()
        channels, self._pending = self._pending[0], ([], [])
        return AppendResult(
            {execution_id.decode() for execution_id in refused},
            {channel: count for channel, count in zip(channels, listeners, strict=True) if count >= 0},
        )

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()

    def _write(self) -> None:
        """Send the pending call; `_read` recovers from a failure."""
        try:
            if self._sha is None:
                self._connection.send_command("SCRIPT", "LOAD", _APPEND)
                self._sha = self._connection.read_response().decode()
            command = self._connection.pack_command(
                "EVALSHA", self._sha, 0, int(self._was_lost), *self._pending[1]
            )
            self._connection.send_packed_command(command, check_health=False)
            self._is_broken = False
        except redis.RedisError as error:
            self._reset(error)

    def _read(self) -> Any:
        wait_seconds = _FIRST_RETRY_SECONDS
        while True:
            if not self._is_broken:
                try:
                    return self._connection.read_response()
                except NoScriptError:  # Redis was restarted, or its scripts were flushed
                    self._sha = None
                    self._write()
                    continue
                except redis.RedisError as error:
                    self._reset(error)
            if self._stop_waiting():
                raise redis.ConnectionError("Redis is away, and this worker ends")
            time.sleep(wait_seconds)
            wait_seconds = min(wait_seconds * 2, _LAST_RETRY_SECONDS)
            self._write()

    def _reset(self, error: redis.RedisError) -> None:
        """Start over with a new connection: a reply left on the old one may belong to another call."""
        if not self._is_broken:
            log.warning("the journal cannot be written (%s); generation waits for Redis", error)
        self._is_broken = self._was_lost = True
        self._sha = None
        self._connection.disconnect()
