"""Checks one behavior after another and returns the results.

If the server dies, the run waits for it to come back, reports the death with the behavior that caused it, and continues.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import msgspec

from tests.conformance.catalogue import Behavior
from tests.conformance.server import MAX_SECONDS, Broken, NotShown, Server

BACK_SECONDS = 30.0
"""How long a server that died may take to come back."""

_PROBE_SECONDS = 10.0
_GONE_SECONDS = 2.0
_POLL_SECONDS = 0.5


class Result(msgspec.Struct, frozen=True):
    """The outcome of one behavior; `reason` says why it is not shown, None if it is."""

    behavior: Behavior
    reason: str | None
    seconds: float
    died: bool = False

    @property
    def shown(self) -> bool:
        return self.reason is None


def run(
    server: Server,
    behaviors: Iterable[Behavior],
    max_seconds: float = float("inf"),
    on_result: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """Check all behaviors.

    Args:
        max_seconds: Limit for the whole run; behaviors that are left then are not shown.
        on_result: Called with each result.
    """
    ends_at = time.monotonic() + max_seconds
    results: list[Result] = []
    is_gone = False
    for behavior in behaviors:
        if time.monotonic() > ends_at:
            result = Result(behavior, f"the limit of {max_seconds:g} s was reached", 0.0)
        elif is_gone and not _is_alive(server, _GONE_SECONDS):
            result = Result(behavior, "the server died earlier and has not come back", 0.0)
        else:
            result, is_gone = _check(server, behavior)
        results.append(result)
        on_result(result)
    return results


def _check(server: Server, behavior: Behavior) -> tuple[Result, bool]:
    """The result, and whether the server is gone for good."""
    server.set_deadline(MAX_SECONDS)
    began_at = time.monotonic()
    reason: str | None = None
    may_be_dead = False
    try:
        behavior.check(server)
    except NotShown as error:
        reason, may_be_dead = str(error), isinstance(error, Broken)
    except Exception as error:  # noqa: BLE001 (an arbitrary server may answer in any form)
        reason = f"the answer has an unexpected form: {type(error).__name__} {error}"[:120]
    seconds = time.monotonic() - began_at
    if not may_be_dead or _is_alive(server, _PROBE_SECONDS):
        return Result(behavior, reason, seconds), False
    is_gone = not _is_back(server)
    return Result(behavior, f"the server died of it; {reason}", seconds, died=True), is_gone


def _is_alive(server: Server, seconds: float) -> bool:
    """Whether it answers a chat of one token, with any status."""
    server.set_deadline(seconds)
    try:
        server.chat()
    except Broken:
        return False
    return True


def _is_back(server: Server) -> bool:
    ends_at = time.monotonic() + BACK_SECONDS
    while time.monotonic() < ends_at:
        if _is_alive(server, _GONE_SECONDS):
            return True
        time.sleep(_POLL_SECONDS)
    return False
