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

import msgspec
import redis
from redis.exceptions import NoScriptError
from rq.defaults import RQ_KEY_PREFIX

from common import names
from worker.loop.journal import AppendResult, JournalEntry

log = logging.getLogger(__name__)

# ARGV: 1 if the connection was ever lost, else 0; then the entries as MessagePack, each an array of the fields of `JournalEntry`. One
# argument for each field would take the generation thread five times as long to send as one string for all.
# n is 0 for an event that is published only. An entry is accepted if the writer's execution still exists (its key is the
# lease) and XADD accepts its n, which must be larger than any before; or if the writer has written that n before (a repeated
# call). Once a connection was lost, Redis may have lost its last writes too: then n must be exactly the next one (XLEN is the
# last n, since n starts at 1 without gaps). A journal key of another type refuses its own entries only; an error of the server
# (out of memory, read-only) fails the call.
# Returns: {refused executions, for each channel its name and number of subscribers}.
_APPEND = f"""
local lost, refused, listeners, channels, accepted = ARGV[1] == '1', {{}}, {{}}, {{}}, {{}}
for _, entry in ipairs(cmsgpack.unpack(ARGV[2])) do
  local channel, job, execution, n, event, ttl = unpack(entry)
  local ok = redis.call('EXISTS', '{RQ_KEY_PREFIX}:execution:' .. job .. ':' .. execution) == 1
  if ok and n ~= 0 then
    local key, id, writer = '{names.JOURNAL_PREFIX}' .. job, n .. '-0', string.sub(execution, 1, 8)
    ok = not lost or redis.pcall('XLEN', key) == n - 1
    if ok then
      local added = redis.pcall('XADD', key, id, 'x', writer, 'd', event)
      ok = type(added) ~= 'table'
      if not ok and not string.find(added.err, 'equal or smaller') and not string.find(added.err, 'WRONGTYPE') then
        return added
      end
      if ok and ttl ~= 0 then redis.call('EXPIRE', key, ttl) end
    end
    if not ok then
      local written = redis.pcall('XRANGE', key, id, id)[1]
      ok = written ~= nil and written[2][2] == writer
    end
  end
  if ok then
    local events = accepted[channel]
    if not events then
      events = {{}}
      accepted[channel] = events
      channels[#channels + 1] = channel
    end
    events[#events + 1] = '["' .. job .. '",' .. event .. ']'
  else refused[#refused + 1] = execution end
end
for _, channel in ipairs(channels) do
  listeners[#listeners + 1] = channel
  listeners[#listeners + 1] = redis.call('PUBLISH', channel, '[' .. table.concat(accepted[channel], ',') .. ']')
end
return {{refused, listeners}}
"""

_pack = msgspec.msgpack.Encoder().encode

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
        self._pending = b""  # the entries of the call in flight
        self._is_broken = False  # the pending call could not be sent
        self._was_lost = False  # a connection was lost once: Redis may have been restarted

    def send(self, entries: Sequence[JournalEntry]) -> None:
        """As `Journal.send`."""
        self._pending = _pack(entries)
        self._write()

    def collect(self) -> AppendResult:
        """As `Journal.collect`.

        Raises:
            redis.RedisError: Redis is away and `stop_waiting` returned True.
        """
        refused, listeners = self._read()
        self._pending = b""
        return AppendResult(
            {execution_id.decode() for execution_id in refused},
            {listeners[i].decode(): listeners[i + 1] for i in range(0, len(listeners), 2)},
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
                "EVALSHA", self._sha, 0, int(self._was_lost), self._pending
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
