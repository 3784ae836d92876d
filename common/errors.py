"""The one tree of errors of mlx-pool.

`RequestError` is what a client is told: raised by the API while it parses and by the worker while it admits, carried
over the wire as `protocol.Failed`, and rendered in one file, `api/http/errors.py`. `StartupError` is what an operator is
told: one sentence on standard error and an exit status other than 0, never a traceback.
"""

from __future__ import annotations


class MLXPoolError(Exception):
    """Base of every error that mlx-pool raises on purpose."""


class StartupError(MLXPoolError):
    """A process cannot start; the message is one sentence that says what to do."""


class RequestError(MLXPoolError):
    """A request cannot be served, in the terms of OpenAI's error object.

    Attributes:
        message: What is wrong, for a person.
        status: HTTP status code.
        type: OpenAI's error type, such as ``invalid_request_error``.
        param: The offending field, such as ``messages[0].role``, or None.
        code: Machine-readable code, such as ``context_length_exceeded``, or None.
        retry_after_seconds: When to try again; None where trying again cannot help.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",  # noqa: A002 (OpenAI's field name)
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_seconds = retry_after_seconds


def invalid(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """A 400 for what the client sent."""
    return RequestError(message, param=param, code=code)


def unavailable(message: str, retry_after_seconds: float = 1.0, code: str | None = None) -> RequestError:
    """A 503: the service cannot take this now, and says when to come back."""
    return RequestError(
        message, status=503, type="server_error", code=code, retry_after_seconds=retry_after_seconds
    )


def one_line(error: BaseException) -> str:
    """An exception as the end of a sentence."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
