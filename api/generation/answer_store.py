"""The store of answers that outlive their request: who may read one, how it stands, and its events.

An answer is its record, one Redis hash, and the journals of its jobs; nothing is rendered into the store. The record is
written by the script that enqueues the jobs (`JobQueue.submit`); `common.retention` says how long it lives. Used by the
endpoints, and by front ends that serve stored answers. Must not know any one protocol.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

import msgspec
import redis

from api.generation.command_batch import CommandBatch, queue_unavailable
from api.generation.events.choices import as_error
from api.generation.events.followed_answer import FollowedAnswer
from api.generation.events.relay import Relay
from api.generation.job_queue import JobQueue, NewRecord
from api.generation.request import AnswerRecord, Retention
from api.generation.stored_answer import AnswerState, AnswerStatus, StoredAnswer
from common import names, retention
from common.errors import RequestError
from common.protocol import Event, Failed, Finished, GenerationJob, TextPrompt, decode_event
from common.rq import JsonJob
from common.settings import Settings

_LARGE_BYTES = 64 * 1024
"""Details are compressed; larger ones in a thread, to keep the event loop free."""

_MAX_DETAILS_BYTES = 256 * 2**20
"""Of one answer, decompressed: what is in Redis may be anything."""

_BYTES_PER_TOKEN, _BYTES_PER_LOGPROB = 64, 48
"""Of a journal; an estimate until the answer has ended and its journals are measured."""

_BYTES_PER_RECORD = 1024
"""Of the hash, without the record and the front end's details."""

_ENDED_STATUSES = (b"failed", b"finished", b"stopped", b"canceled", None)
"""RQ's statuses of a job that will not get further events. None: it was deleted, or waited too long in the queue."""


class AnswerStore:
    """See the module.

    Args:
        reads: Without `transaction`.
        writes: With `transaction`.
    """

    def __init__(
        self,
        settings: Settings,
        reads: CommandBatch,
        writes: CommandBatch,
        job_queue: JobQueue,
        relay: Relay,
    ) -> None:
        self._settings = settings
        self._reads = reads
        self._writes = writes
        self._job_queue = job_queue
        self._relay = relay

    @property
    def response_ttl_seconds(self) -> int:
        """As `AnswerLookup.response_ttl_seconds`."""
        return self._settings.response_ttl_seconds

    @property
    def max_conversation_bytes(self) -> int:
        """As `AnswerLookup.max_conversation_bytes`."""
        return self._settings.max_body_bytes

    async def new_record(
        self, jobs: list[GenerationJob], options: Retention, owner: str, num_answer_tokens: int
    ) -> NewRecord:
        """The record for `JobQueue.submit`.

        Args:
            owner: Who may read it (`api.generation.stored_answer.owner_of`).
            num_answer_tokens: Estimated, of one job.
        """
        first = jobs[0]
        details = msgspec.json.encode(options.details)
        if len(details) > _LARGE_BYTES:
            details = await asyncio.to_thread(zlib.compress, details, 1)
        else:
            details = zlib.compress(details, 1)
        record = msgspec.json.encode(first.answer)  # may be as large as the request: responses repeat tools
        fields: dict[str, str | bytes | int] = {
            "record": record,
            "job_ids": msgspec.json.encode([job.job_id for job in jobs]),
            "owner": owner,
            "model": first.model,
            "ttl_seconds": options.ttl_seconds,
            "is_detached": int(options.is_detached),
            "details": details,
        }
        logprobs = 0 if first.top_logprobs is None else 1 + first.top_logprobs
        num_bytes = len(jobs) * num_answer_tokens * (_BYTES_PER_TOKEN + logprobs * _BYTES_PER_LOGPROB)
        return NewRecord(
            answer_id=first.job_id,
            num_bytes=num_bytes + len(record) + len(details) + _BYTES_PER_RECORD,
            ttl_seconds=self._settings.queue_seconds + options.ttl_seconds,
            fields=fields,
        )

    async def load(self, answer_id: str, owner: str) -> StoredAnswer:
        """A stored answer.

        Raises:
            RequestError: 404, there is none with this id, it has expired, or it is another key's; 503, Redis is unavailable.
        """
        [fields] = await self._read([("HGETALL", names.answer(answer_id))])
        if not fields or fields.get(b"owner") != owner.encode():
            raise _not_found(answer_id)
        try:
            return await _decoded(fields)
        except (msgspec.MsgspecError, zlib.error, KeyError, ValueError):
            raise _not_found(answer_id) from None  # of another program, or of a newer version

    async def state(self, answer: StoredAnswer) -> AnswerState:
        """How the answer stands, from its journals, RQ's status of its jobs, and its record.

        Raises:
            RequestError: 503, Redis is unavailable.
        """
        job_ids = answer.record.job_ids
        # The status is read first: a job's journal is complete before RQ says that it has ended.
        commands: list[tuple[Any, ...]] = [("HGET", JsonJob.key_for(job_id), "status") for job_id in job_ids]
        commands += [("XRANGE", names.journal(job_id), "-", "+") for job_id in job_ids]
        commands.append(("HGET", names.answer(answer.id), "is_cancelled"))
        replies = await self._read(commands)
        statuses, entries = replies[: len(job_ids)], replies[len(job_ids) : -1]
        choices = [[decode_event(fields[b"d"]) for _, fields in each] for each in entries]
        status, error = _status(choices, statuses, is_cancelled=bool(replies[-1]))
        return AnswerState(status=status, error=error, choices=choices)

    async def cancel(self, answer: StoredAnswer) -> None:
        """Cancel the answer's jobs, queued or running. Its state says `cancelled`, unless it was complete before.

        Raises:
            RequestError: 503, Redis is unavailable.
        """
        key = names.answer(answer.id)
        script = (
            "if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], 'is_cancelled', 1) end"
        )
        await self._write([("EVAL", script, 1, key)])
        self.cancel_jobs(answer)

    def cancel_jobs(self, answer: StoredAnswer) -> None:
        """Cancel the jobs in the background; those that have ended are unaffected."""
        channel = answer.channel or ""
        for job_id in answer.record.job_ids:
            self._job_queue.cancel(
                GenerationJob(
                    job_id=job_id,
                    model=answer.model,
                    channel=channel,
                    prompt=TextPrompt(""),
                    final_ttl_seconds=answer.retention.ttl_seconds,
                    answer_id=answer.id,
                )
            )

    async def delete(self, answer: StoredAnswer) -> None:
        """Delete the answer and its journals; jobs that have not ended are cancelled.

        Raises:
            RequestError: 503, Redis is unavailable.
        """
        self.cancel_jobs(answer)
        await self._write([retention.delete(answer.id, answer.record.job_ids)])

    def follow(self, answer: StoredAnswer) -> FollowedAnswer:
        """As `AnswerLookup.follow`."""
        return FollowedAnswer(answer, self._relay)

    async def _read(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        return await _guarded(self._reads, commands)

    async def _write(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        return await _guarded(self._writes, commands)


async def _guarded(batch: CommandBatch, commands: list[tuple[Any, ...]]) -> list[Any]:
    try:
        return await batch.execute(commands)
    except (redis.RedisError, OSError) as error:
        raise queue_unavailable() from error


async def _decoded(fields: dict[bytes, bytes]) -> StoredAnswer:
    decompressor = zlib.decompressobj()
    data = decompressor.decompress(fields[b"details"], _LARGE_BYTES)
    if decompressor.eof:
        details = _decoded_details(data)
    else:  # a few bytes may be megabytes, decompressed
        details = await asyncio.to_thread(lambda: _decoded_details(_decompressed(fields[b"details"])))
    return StoredAnswer(
        record=msgspec.json.decode(fields[b"record"], type=AnswerRecord),
        model=fields[b"model"].decode(),
        retention=Retention(
            ttl_seconds=int(fields[b"ttl_seconds"]),
            is_detached=fields[b"is_detached"] == b"1",
            details=details,
        ),
        is_cancelled=b"is_cancelled" in fields,
    )


_decoded_details = msgspec.json.Decoder(dict[str, Any] | None).decode


def _decompressed(data: bytes) -> bytes:
    decompressor = zlib.decompressobj()
    content = decompressor.decompress(data, _MAX_DETAILS_BYTES)
    if not decompressor.eof:
        raise ValueError("the details are too large or incomplete")
    return content


def _not_found(answer_id: str) -> RequestError:
    return RequestError(
        f"No answer with the id `{answer_id[:80]}` is stored. It may have expired, or belong to another API key.",
        status=404,
        code="not_found",
    )


def _status(
    choices: list[list[Event]], statuses: list[bytes | None], *, is_cancelled: bool
) -> tuple[AnswerStatus, RequestError | None]:
    """The status that the journals, RQ and the record's mark amount to, and the error of a failed answer.

    1. A failure in a journal: failed, whatever the other choices do.
    2. Each journal has its end: completed, incomplete, or cancelled.
    3. It was cancelled, and the jobs are about to end.
    4. A job has ended, but not its journal: its events are lost, or it waited in the queue for too long.
    5. Else it waits or runs.
    """
    ends = [choice[-1] if choice else None for choice in choices]
    failed = next((end for end in ends if isinstance(end, Failed)), None)
    if failed is not None:  # 1
        return "failed", as_error(failed)
    finished = [end for end in ends if isinstance(end, Finished)]
    was_cancelled = any(end.finish_reason == "cancelled" for end in finished)
    if len(finished) == len(choices) and not was_cancelled:  # 2
        is_cut = any(end.finish_reason == "length" for end in finished)
        return "incomplete" if is_cut else "completed", None
    if was_cancelled or is_cancelled:  # 2, 3
        return "cancelled", None
    open_statuses = [
        status for end, status in zip(ends, statuses, strict=True) if not isinstance(end, Finished)
    ]
    if any(status in _ENDED_STATUSES for status in open_statuses):  # 4
        return "failed", RequestError(
            "The request failed before its answer was complete.",
            status=500,
            type="server_error",
            code="answer_lost",
        )
    has_begun = any(choices) or b"started" in statuses
    return ("in_progress" if has_begun else "queued"), None  # 5


def store_full() -> RequestError:
    """A 503 for an answer that does not fit into the store."""
    return RequestError(
        "The server's store of answers is full; try again later, or without storing the answer.",
        status=503,
        type="server_error",
        code="response_store_full",
        retry_after_seconds=30.0,
    )
