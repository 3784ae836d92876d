"""Errors in Anthropic's shape: status, type, message and request id."""

from __future__ import annotations

import json

import pytest

from api.anthropic import errors
from api.generation import overload
from api.protocols import ERROR_FORMATS
from common.errors import RequestError, invalid, unavailable
from tests.unit.api.openai.records import MODEL


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (invalid("No."), 400, "invalid_request_error"),
        (RequestError("No.", status=401), 401, "authentication_error"),
        (RequestError("No.", status=403), 403, "permission_error"),
        (RequestError("No.", status=404), 404, "not_found_error"),
        (RequestError("No.", status=405), 405, "invalid_request_error"),
        (RequestError("No.", status=408), 408, "timeout_error"),
        (RequestError("No.", status=413), 413, "request_too_large"),
        (RequestError("No.", status=415), 415, "invalid_request_error"),
        (RequestError("No.", status=429), 429, "rate_limit_error"),
        (RequestError("No.", status=500), 500, "api_error"),
        (RequestError("No.", status=504), 504, "timeout_error"),
        (RequestError("No.", status=503, code="cancelled"), 503, "api_error"),
        (unavailable("No.", 5.0, "model_unavailable"), 529, "overloaded_error"),
        (overload.refusal(MODEL, 3, is_tokens=True), 529, "overloaded_error"),
        (overload.refusal(MODEL, 3, is_tokens=False), 529, "overloaded_error"),
    ],
)
def test_status_and_type(error: RequestError, status: int, kind: str) -> None:
    """Each status has Anthropic's type; a pool that is full or has no worker is 529, not 429 or 503."""
    assert errors.status(error) == status
    body = json.loads(errors.error_body(error, "req_1"))
    assert body == {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": "req_1"}


def test_the_message_names_the_field() -> None:
    """Anthropic's error has no key for it, so it stands in the message, once."""
    assert message(invalid("Must be positive.", "max_tokens")) == "max_tokens: Must be positive."
    assert (
        message(invalid("`max_tokens` must be positive.", "max_tokens")) == "`max_tokens` must be positive."
    )


def test_a_refused_thread_has_the_details_that_tool_runners_look_for() -> None:
    """With them, Anthropic's SDKs send the complete conversation instead; no other error has details."""
    error = json.loads(errors.error_body(invalid("No.", "thread", errors.THREAD_UNSUPPORTED), "req_1"))[
        "error"
    ]
    assert error["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


def message(error: RequestError) -> str:
    return str(json.loads(errors.error_body(error, ""))["error"]["message"])


def test_the_event_of_a_stream() -> None:
    """It is named `error` and has the same error object."""
    frame = errors.error_frame(unavailable("Later.", 5.0))
    name, data = frame.decode().removesuffix("\n\n").split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "Later."},
    }


@pytest.mark.parametrize(
    ("path", "is_anthropic"),
    [
        ("/v1/messages", True),
        ("/messages", True),
        ("/v1/messages/count_tokens", True),
        ("/v1/messages/batches/x", True),
        ("/v1/messages_", False),
        ("/v1/chat/completions", False),
        ("/v1/models", False),
    ],
)
def test_the_paths(path: str, is_anthropic: bool) -> None:
    """Everything below Anthropic's path has its errors, with and without `/v1`."""
    assert (ERROR_FORMATS.find(path).body is errors.error_body) == is_anthropic
