"""OpenAI's error object, as the body of a response and as the last frame of a stream.

The only file that knows its form; `api.protocols` makes it the default of all paths.
https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import msgspec

from api.http import sse
from common.errors import RequestError


class ErrorObject(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """OpenAI's error, always with all four keys."""

    error: ErrorObject


def error_body(error: RequestError, request_id: str = "") -> bytes:  # noqa: ARG001
    """An `api.http.errors.ErrorFormat`."""
    return msgspec.json.encode(ErrorBody(ErrorObject(error.message, error.type, error.param, error.code)))


def error_frame(error: RequestError) -> bytes:
    """The last frame of a stream that fails."""
    return sse.frame(error_body(error))
