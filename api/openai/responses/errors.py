"""OpenAI's error body for the paths of responses: workers name the field `messages`, which is `input` here."""

from __future__ import annotations

import re

from api.openai.errors import error_body
from common.errors import RequestError

_MESSAGES = re.compile(r"^messages\b")


def response_error_body(error: RequestError, request_id: str = "") -> bytes:
    """An `api.http.errors.ErrorFormat`."""
    if error.param is None or not _MESSAGES.match(error.param):
        return error_body(error, request_id)
    renamed = RequestError(
        error.message,
        status=error.status,
        type=error.type,
        param=_MESSAGES.sub("input", error.param),
        code=error.code,
        retry_after_seconds=error.retry_after_seconds,
    )
    return error_body(renamed, request_id)
