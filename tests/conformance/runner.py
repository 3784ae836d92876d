"""Looks at one behaviour after another, and says what was seen.

A server that dies is waited for, and its death is told with the behaviour; the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import msgspec

from tests.conformance.catalogue import Behaviour
from tests.conformance.server import MAX_SECONDS, Broken, NotShown, Server

BACK_SECONDS = 30.0
"""What a server that died gets to be back."""

_PROBE_SECONDS = 10.0
_GONE_SECONDS = 2.0
_POLL_SECONDS = 0.5


class Result(msgspec.Struct, frozen=True):
    """What was seen; `reason` is why it is not shown, None where it is."""

    behaviour: Behaviour
    reason: str | None
    seconds: float
    died: bool = False

    @property
    def shown(self) -> bool:
        return self.reason is None


def run(
    server: Server,
    behaviours: Iterable[Behaviour],
    max_seconds: float = float("inf"),
    tell: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """Look at all of them.

    Args:
        max_seconds: For all together; what is left then is not shown.
        tell: Called with each result as it is there.
    """
    ends_at = time.monotonic() + max_seconds
    results: list[Result] = []
    is_gone = False
    for behaviour in behaviours:
        if time.monotonic() > ends_at:
            result = Result(behaviour, f"no time was left of {max_seconds:g} s", 0.0)
        elif is_gone and not _is_alive(server, _GONE_SECONDS):
            result = Result(behaviour, "the server died before, and is not back", 0.0)
        else:
            result, is_gone = _look_at(server, behaviour)
        results.append(result)
        tell(result)
    return results


def _look_at(server: Server, behaviour: Behaviour) -> tuple[Result, bool]:
    """The result, and whether the server is gone for good."""
    server.give(MAX_SECONDS)
    began_at = time.monotonic()
    reason: str | None = None
    may_be_dead = False
    try:
        behaviour.check(server)
    except NotShown as error:
        reason, may_be_dead = str(error), isinstance(error, Broken)
    except Exception as error:  # noqa: BLE001 (there is no form that an answer of some server might not have)
        reason = f"the answer is of another form: {type(error).__name__} {error}"[:120]
    seconds = time.monotonic() - began_at
    if not may_be_dead or _is_alive(server, _PROBE_SECONDS):
        return Result(behaviour, reason, seconds), False
    is_gone = not _is_back(server)
    return Result(behaviour, f"the server died of it; {reason}", seconds, died=True), is_gone


def _is_alive(server: Server, seconds: float) -> bool:
    """It answers a chat of one token, whatever it answers."""
    server.give(seconds)
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
