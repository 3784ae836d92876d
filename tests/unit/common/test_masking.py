"""API keys are masked in log lines and errors."""

from __future__ import annotations

import io
import logging

import msgspec
import pytest

from api.auth import key_file
from api.http import errors
from api.openai.errors import error_body
from common.errors import RequestError
from common.logging import FORMAT, Formatter
from common.masking import masked


@pytest.mark.parametrize(
    "key",
    [key_file.new_key("a")[1], "sk-proj-" + "aB3_-" * 20, "sk-" + "x" * 48],
    ids=["ours", "project", "plain"],
)
def test_keys_are_masked_everywhere(key: str) -> None:
    """Our keys and other services', in messages and parameters of errors, in log lines and tracebacks."""
    for around in ("{}", "Bearer {}", "GET /v1/{} HTTP", "'{}'", "a={}&b", "/{}/{}", "({})"):
        text = around.replace("{}", key)
        assert masked(text) == around.replace("{}", "sk-...")
        error = msgspec.json.decode(
            errors.ErrorFormats(errors.ErrorFormat(error_body)).body("/", RequestError(text, param=text), "")
        )["error"]
        assert (error["message"], error["param"]) == (masked(text), masked(text))
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(Formatter(FORMAT))
    log = logging.getLogger("masking")
    log.addHandler(handler)
    try:
        int(key)
    except ValueError:
        log.exception("it was %s", key)
    log.removeHandler(handler)
    assert key not in written.getvalue()
    assert "ValueError: invalid literal for int() with base 10: 'sk-...'" in written.getvalue()


@pytest.mark.parametrize(
    "text", ["task-oriented-and-rather-long", "sk-short", "risk-sk-", "sk- and then a space"]
)
def test_other_names_are_unchanged(text: str) -> None:
    """Names that resemble a key are not masked."""
    assert masked(text) == text
