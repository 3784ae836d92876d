"""The names of all our Redis keys and channels. RQ's own names stay RQ's (`rq.defaults.RQ_KEY_PREFIX`).

| name | type | written by | read by | time to live |
| --- | --- | --- | --- | --- |
| journal(job)   | stream: one entry per token, id `n-0`, n from 1 without a gap, then the terminal event | worker | API, worker taking over | `journal_ttl_seconds` after the last write |
| cancelled(job) | string | API | worker (intake) | CANCEL_MARK_SECONDS |
| api_channel(process) | channel | worker | the API process | - |
| stream_channel(answer) | channel: the events of a detached request's jobs | worker | API processes that follow the answer | - |
| answer(answer) | hash: an answer that outlives its request (`common.retention`, `api.generation.answer_store`) | API, worker | API | as `common.retention` says |
| ANSWER_EXPIRIES | sorted set: answer id by Unix seconds of its expiry | API, worker | API | - (trimmed with each stored answer) |
| ANSWER_BYTES | hash: the bytes that are reserved for each stored answer, and their `total` | API, worker | API | - (trimmed with each stored answer) |
| control_channel(model) | channel | API | workers of the model | - |
| tokenize_queue(model) | list of request ids | API | worker | TOKENIZE_SECONDS after the last request |
| tokenize_request(id) | string (`protocol.TokenizeRequest`) | API | worker | TOKENIZE_SECONDS |
| tokenized(process) | list of `protocol.TokenizeReply` | worker | the API process | TOKENIZE_SECONDS after the last reply |
| worker_card(worker) | hash (`models.model_card.ModelCard`) | worker | API | CARD_SECONDS, renewed each heartbeat |
| WORKER_CARDS | sorted set: worker name by Unix seconds of its last heartbeat | worker | API | - (trimmed after CARD_NAME_SECONDS) |
| KNOWN_MODELS | sorted set: model id by Unix seconds when it was last served | worker | API | - (trimmed after KNOWN_MODEL_SECONDS) |
"""

from __future__ import annotations

import os
import secrets
import socket

PREFIX = "mlxpool"

CARD_SECONDS = 5
"""Time to live of a card after a heartbeat; several heartbeats fit in."""

CARD_NAME_SECONDS = 3600
"""A worker's name is listed this long after its last heartbeat: far longer than the clocks of two Macs differ."""

CANCEL_MARK_SECONDS = 300
"""Longer than a job can be on its way between two lists."""

TOKENIZE_SECONDS = 30
"""After this time a request for tokens has expired: a worker skips it, and the API process no longer waits for the reply."""

KNOWN_MODEL_SECONDS = 7 * 24 * 3600
"""A request for a model without a worker is a 503 if the model was served within this time, else a 404."""

WORKER_CARDS = f"{PREFIX}:cards"
KNOWN_MODELS = f"{PREFIX}:models"
JOURNAL_PREFIX = f"{PREFIX}:journal:"
ANSWER_PREFIX = f"{PREFIX}:answer:"
ANSWER_EXPIRIES = f"{PREFIX}:answer_expiries"
ANSWER_BYTES = f"{PREFIX}:answer_bytes"

JOB_FUNCTION = "mlxpool.generate"
"""The function name of all our RQ jobs: data for RQ's tools to show, never imported."""


_ID_TOKENS_DIGITS = 6
MAX_ID_TOKENS = 16**_ID_TOKENS_DIGITS - 1


def new_job_id(num_tokens: int) -> str:
    """A new job id, whose last six hexadecimal digits are the estimated number of tokens of the job.

    A queue is a list of ids, so the amount of waiting work can be read from it: a counter would have to stay right through every
    crash.
    """
    return f"{secrets.token_hex(12)}{min(max(num_tokens, 0), MAX_ID_TOKENS):0{_ID_TOKENS_DIGITS}x}"


def estimated_tokens(job_id: str) -> int:
    """The `num_tokens` that was passed to `new_job_id`."""
    return int(job_id[-_ID_TOKENS_DIGITS:], 16)


def journal(job_id: str) -> str:
    """The journal of one job."""
    return JOURNAL_PREFIX + job_id


def cancelled(job_id: str) -> str:
    """The mark that a job's client has disconnected."""
    return f"{PREFIX}:cancel:{job_id}"


def api_channel(process_id: str) -> str:
    """The channel on which an API process receives all events of its requests."""
    return f"{PREFIX}:api:{process_id}"


def stream_channel(answer_id: str) -> str:
    """The channel of a detached request's events, which any API process can follow."""
    return f"{PREFIX}:stream:{answer_id}"


def answer(answer_id: str) -> str:
    """The record of an answer that outlives its request; its id is that of the request's first job."""
    return ANSWER_PREFIX + answer_id


def control_channel(model: str) -> str:
    """The channel on which all workers of a model receive `protocol.Cancel`."""
    return f"{PREFIX}:control:{model}"


def tokenize_queue(model: str) -> str:
    """The ids of the requests for tokens that wait for a worker of the model."""
    return f"{PREFIX}:tokenize:{model}"


def tokenize_request(request_id: str) -> str:
    """One such request."""
    return f"{PREFIX}:tokenize-request:{request_id}"


def tokenized(process_id: str) -> str:
    """The replies to an API process."""
    return f"{PREFIX}:tokenized:{process_id}"


def worker_card(worker_name: str) -> str:
    """The model card of one live worker."""
    return f"{PREFIX}:model:{worker_name}"


def unique_worker_name(model: str) -> str:
    """A name that is never reused: after a kill -9, RQ considers a name in use for a while."""
    readable = "".join(c if c.isalnum() else "-" for c in model.rsplit("/", 1)[-1])
    return f"{readable}.{socket.gethostname().split('.')[0]}.{os.getpid()}.{secrets.token_hex(2)}"
