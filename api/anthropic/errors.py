"""Anthropic's errors: status, type, the body of a response, and the last event of a stream.

The only file that knows their form; `api.protocols` assigns it to the paths. Errors arrive as `RequestError`s, whose status and type
are OpenAI's. https://platform.claude.com/docs/en/api/errors
"""

from __future__ import annotations

import http

import msgspec

from api.http import sse
from common.errors import RequestError

OVERLOADED = 529
"""Not in any RFC. Anthropic's clients try again after it, at the time that `retry-after` says."""

THREAD_UNSUPPORTED = "thread_unsupported_request"
"""A code for which Anthropic's SDKs (1.14 for Node, 2.14 for Python) look: their tool runners send each turn as part of a thread, and
on this error send the complete conversation instead."""

_QUEUE_FULL_CODE = "rate_limit_exceeded"
_FIRST_SERVER_ERROR = 500

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}
"""By status. The others are `invalid_request_error` below 500, and `api_error` from there."""


class ErrorDetails(msgspec.Struct, frozen=True):
    """For programs: the code, and the fields that it is about."""

    error_code: str
    unsupported: list[str]


class ErrorObject(msgspec.Struct, frozen=True):
    """What is wrong; the message names the field, for which Anthropic's error has no key."""

    type: str
    message: str
    details: ErrorDetails | msgspec.UnsetType = msgspec.UNSET


class ErrorEvent(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    """The last event of a stream that fails."""

    error: ErrorObject


class ErrorBody(ErrorEvent, frozen=True, tag_field="type", tag="error"):
    """The body of an error response."""

    request_id: str


def status(error: RequestError) -> int:
    """The HTTP status: 529 if the pool is full, or has no worker or no Redis now; otherwise the error's own."""
    is_full = error.code == _QUEUE_FULL_CODE
    is_away = error.status == http.HTTPStatus.SERVICE_UNAVAILABLE and error.retry_after_seconds is not None
    return OVERLOADED if is_full or is_away else error.status


def error_body(error: RequestError, request_id: str) -> bytes:
    """The body of a response."""
    return msgspec.json.encode(ErrorBody(_object(error), request_id))


def error_frame(error: RequestError) -> bytes:
    """The last event of a stream."""
    return sse.frame(msgspec.json.encode(ErrorEvent(_object(error))), event="error")


def _object(error: RequestError) -> ErrorObject:
    code = status(error)
    default = "invalid_request_error" if code < _FIRST_SERVER_ERROR else "api_error"
    message = error.message
    if error.param is not None and error.param not in message:
        message = f"{error.param}: {message}"
    details: ErrorDetails | msgspec.UnsetType = msgspec.UNSET
    if error.code == THREAD_UNSUPPORTED and error.param is not None:
        details = ErrorDetails(error.code, [error.param])
    return ErrorObject(_TYPES.get(code, default), message, details)
