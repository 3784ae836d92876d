"""The exceptions of mlx-pool.

`RequestError` is for the client: raised by the API while it parses and by a worker while it admits, sent over the wire as
`protocol.Failed`, and rendered in `api/http/errors.py`. `StartupError` is for the operator: one sentence on standard error and an
exit status other than 0, never a traceback.
"""

from __future__ import annotations


class MLXPoolError(Exception):
    """Base of every error that mlx-pool raises on purpose."""


class StartupError(MLXPoolError):
    """A process cannot start; the message is one sentence that says what to do."""


class RequestError(MLXPoolError):
    """A request cannot be served; the attributes are those of OpenAI's error object.

    Attributes:
        message: What is wrong, for a human reader.
        status: HTTP status code.
        type: OpenAI's error type, such as ``invalid_request_error``.
        param: The offending field, such as ``messages[0].role``, or None.
        code: Machine-readable code, such as ``context_length_exceeded``, or None.
        retry_after_seconds: When to try again; None if that cannot help.
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
    """A 400: the request is wrong."""
    return RequestError(message, param=param, code=code)


def unavailable(message: str, retry_after_seconds: float = 1.0, code: str | None = None) -> RequestError:
    """A 503: the request cannot be served now, but later."""
    return RequestError(
        message, status=503, type="server_error", code=code, retry_after_seconds=retry_after_seconds
    )


def one_line(error: BaseException) -> str:
    """An exception as the end of a sentence."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
