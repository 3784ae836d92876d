"""Hooks for what schemathesis cannot know from the description; its command line loads them, see tests/e2e/api/test_openapi.py."""

from __future__ import annotations

import math
from typing import Any

import schemathesis
from schemathesis import Case, CheckContext, HookContext, Response

from bench.fuzz.judge import is_beyond_description

MIN_SECONDS = 10.0
HEADER = "X-Request-Timeout"


@schemathesis.hook
def before_call(_context: HookContext, case: Case, _kwargs: dict[str, Any]) -> None:
    """Request the served model with enough time to answer: 404 and 504 would be valid but test little."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        del case.body["model"]
    if 0 < _seconds((case.headers or {}).get(HEADER)) < MIN_SECONDS:
        del case.headers[HEADER]


def _seconds(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


@schemathesis.check
def valid_is_accepted(_context: CheckContext, response: Response, case: Case) -> None:
    """A 400 for a request that the description allows is only valid for what a schema cannot express."""
    if case.method == "HEAD":  # without a body
        return
    if case.meta is not None and case.meta.generation.mode.is_positive and response.status_code == 400:
        error = response.json()["error"]
        assert is_beyond_description(error), f"valid by the description, and refused: {error}"
