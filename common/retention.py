"""Stored answers in Redis: how long their keys live, and the bytes that they take in the complete pool.

The API stores an answer's record in the script that enqueues its jobs; the worker extends it when a job starts and sets its
final time to live when the last job has ended. All of it happens in scripts, so the count of bytes stays exact if a process
dies. Used by `api.generation` and `worker.jobs`. Must not know what a record contains.
"""

from __future__ import annotations

from typing import Any

from common import names
from common.protocol import Finished, Usage, encode

MAX_RUN_SECONDS = 24 * 3600
"""The maximum run time of a job; the record of an unfinished answer lives as long."""

DELETED_JOURNAL_SECONDS = 60
"""How long events live that a running job writes after its answer was deleted; for clients that still follow it."""

Command = tuple[Any, ...]

_KEYS = f"""
local EXPIRIES, BYTES = '{names.ANSWER_EXPIRIES}', '{names.ANSWER_BYTES}'
local function answer_key(id) return '{names.ANSWER_PREFIX}' .. id end
local function journal_key(job) return '{names.JOURNAL_PREFIX}' .. job end
"""

STORE = (
    _KEYS
    + """
local function release(id)
  local bytes = redis.call('HGET', BYTES, id)
  if bytes then
    redis.call('HDEL', BYTES, id)
    redis.call('HINCRBY', BYTES, 'total', -bytes)
  end
  redis.call('ZREM', EXPIRIES, id)
end
local function reserve(id, bytes)
  local before = redis.call('HGET', BYTES, id) or 0
  redis.call('HSET', BYTES, id, bytes)
  return redis.call('HINCRBY', BYTES, 'total', bytes - before)
end
local function now() return tonumber(redis.call('TIME')[1]) end
local function release_expired(limit)
  local expired = redis.call('ZRANGEBYSCORE', EXPIRIES, '-inf', now(), 'LIMIT', 0, limit)
  for _, id in ipairs(expired) do release(id) end
  return #expired
end
local function has_room(bytes, max_bytes)
  release_expired(100)
  while tonumber(redis.call('HGET', BYTES, 'total') or 0) + bytes > max_bytes do
    if release_expired(100) == 0 then return false end
  end
  return true
end
"""
)
"""Functions of scripts that count bytes. An answer whose record has expired has its bytes released when the next answer is stored."""

_END = (
    STORE
    + f"local DELETED_JOURNAL_SECONDS = {DELETED_JOURNAL_SECONDS}"
    + """
local function jobs_of(key) return cjson.decode(redis.call('HGET', key, 'job_ids') or '[]') end
local function end_job(id, job, ttl)
  local key = answer_key(id)
  if redis.call('EXISTS', key) == 0 then
    redis.call('EXPIRE', journal_key(job), math.min(ttl, DELETED_JOURNAL_SECONDS))
    return 0
  end
  if redis.call('HSETNX', key, 'ended:' .. job, 1) == 1 then redis.call('HINCRBY', key, 'num_ended', 1) end
  local jobs = jobs_of(key)
  if tonumber(redis.call('HGET', key, 'num_ended')) < #jobs then
    redis.call('EXPIRE', journal_key(job), math.max(ttl, redis.call('TTL', key)))
    return 1
  end
  -- All samples: by default Redis looks at five fields of a hash, of which a single one may have all the bytes.
  local bytes = redis.call('MEMORY', 'USAGE', key, 'SAMPLES', 0) or 0
  for _, each in ipairs(jobs) do
    redis.call('EXPIRE', journal_key(each), ttl)
    bytes = bytes + (redis.call('MEMORY', 'USAGE', journal_key(each), 'SAMPLES', 0) or 0)
  end
  redis.call('EXPIRE', key, ttl)
  redis.call('ZADD', EXPIRIES, now() + ttl, id)
  reserve(id, bytes)
  return 2
end
"""
)

# ARGV: answer id, seconds. A job of the answer starts: the record lives at least as long.
_ON_START = (
    _KEYS
    + """
local key = answer_key(ARGV[1])
if redis.call('TTL', key) < 0 then return 0 end
if redis.call('TTL', key) < tonumber(ARGV[2]) and not redis.call('HGET', key, 'num_ended') then
  redis.call('EXPIRE', key, ARGV[2])
  redis.call('ZADD', EXPIRIES, redis.call('TIME')[1] + ARGV[2], ARGV[1])
end
return 1
"""
)

# ARGV: answer id, job id, seconds.
_ON_END = _END + "return end_job(ARGV[1], ARGV[2], tonumber(ARGV[3]))"

# ARGV: answer id, job id, seconds, the terminal event before and after its n, its channel, a queue or ''. A job that no worker
# runs is cancelled: if it is in that queue, or none is named, its journal gets the terminal event, unless it has one.
_CANCEL = (
    _END
    + """
local id, job, ttl, before, after, channel, queue = unpack(ARGV)
if queue ~= '' and redis.call('LREM', queue, 1, job) == 0 then return 0 end
local last = redis.call('XREVRANGE', journal_key(job), '+', '-', 'COUNT', 1)[1]
local n = last and tonumber(string.match(last[1], '^%d+')) or 0
local event = last and last[2][4] or ''
if string.sub(event, 1, 4) ~= '["f"' and string.sub(event, 1, 4) ~= '["x"' then
  event = before .. string.format('%d', n + 1) .. after
  redis.call('XADD', journal_key(job), string.format('%d-0', n + 1), 'x', '', 'd', event)
  redis.call('EXPIRE', journal_key(job), ttl)
  redis.call('PUBLISH', channel, '[["' .. job .. '",' .. event .. ']]')
end
end_job(id, job, tonumber(ttl))
return 1
"""
)

# ARGV: answer id, job ids. Deletes the record and the journals, and releases the bytes.
_DELETE = (
    STORE
    + """
release(ARGV[1])
for i = 2, #ARGV do redis.call('UNLINK', journal_key(ARGV[i])) end
return redis.call('UNLINK', answer_key(ARGV[1]))
"""
)

_CANCELLED_EVENT = encode(Finished(0, "cancelled", Usage(0, 0))).split(b"0", 1)
"""What comes before and after its n."""


def on_start(answer_id: str, ttl_seconds: int) -> Command:
    """A job of a stored answer starts: its record lives as long as a job may run.

    Args:
        ttl_seconds: Of the answer, after its end.
    """
    return ("EVAL", _ON_START, 0, answer_id, MAX_RUN_SECONDS + ttl_seconds)


def on_end(answer_id: str, job_id: str, ttl_seconds: int) -> Command:
    """A job of a stored answer has ended; may be repeated. With the last one, the answer's time to live and bytes are final."""
    return ("EVAL", _ON_END, 0, answer_id, job_id, ttl_seconds)


def cancel(answer_id: str, job_id: str, ttl_seconds: int, *, channel: str, queue_key: str = "") -> Command:
    """Cancel a job that no worker runs: its terminal event is journaled and published here. The reply is 1 if it was.

    Args:
        channel: The job's.
        queue_key: Only if the job is in this queue, from which it is removed; "": it is in none.
    """
    return ("EVAL", _CANCEL, 0, answer_id, job_id, ttl_seconds, *_CANCELLED_EVENT, channel, queue_key)


def delete(answer_id: str, job_ids: list[str]) -> Command:
    """Delete a stored answer and its jobs' journals."""
    return ("EVAL", _DELETE, 0, answer_id, *job_ids)
