"""Jobs whose clients may come back: no orphans, a time to live of their own, and `Started` in the journal."""

from __future__ import annotations

import pytest

from common.protocol import Delta, Failed, Finished, Started, Usage, decode_event, encode
from tests.unit.worker.loop.scripted import LoopHarness, admit, refusal
from worker.loop.journal import JournalEntry
from worker.loop.messages import Abort, AbortReason, Outcome


def test_a_detached_job_has_no_orphan_rule() -> None:
    """Without a subscriber, the attached job is cancelled after a while, and the detached one runs to its end."""
    harness = LoopHarness()
    harness.journal.num_listeners = 0
    harness.run(
        admit("attached", channel="api", max_tokens=20),
        admit("detached", channel="own", max_tokens=20, is_detached=True),
    )
    for _ in range(4):
        harness.now += 5.0
        harness.run()
    assert [(end.job_id, end.outcome) for end in harness.job_ends] == [("attached", Outcome.FINISHED)]
    assert isinstance(harness.journal.events("attached")[-1], Finished)
    harness.run_until(lambda: len(harness.job_ends) == 2)
    assert harness.journal.events("detached")[-1] == Finished(21, "length", Usage(1, 20))
    assert harness.loop._no_listeners_since_mono == {}


@pytest.mark.parametrize("is_refused", [False, True])
def test_the_journal_lives_as_long_as_the_job_asks(is_refused: bool) -> None:
    """After its terminal event, also if the job never ran; others have the worker's setting."""
    harness = LoopHarness()
    if is_refused:
        harness.engine.refused = {"a": refusal(), "b": refusal()}
    harness.run(admit("a", final_ttl_seconds=7), admit("b"))
    harness.run_until(lambda: len(harness.job_ends) == 2)
    assert [harness.journal.entries[job_id][-1].ttl_seconds for job_id in "ab"] == [7, 300]


def test_started_is_journaled_if_the_job_asks() -> None:
    """As event 1, before the prompt is prefilled; the tokens follow, and their count is right."""
    harness = LoopHarness()
    harness.engine.is_prefilling = True
    harness.run(admit("a", journals_started=True), times=2)
    assert harness.journal.events("a") == [Started(1, 1, 0)]
    assert harness.journal.entries["a"][0].ttl_seconds == 900
    harness.engine.is_prefilling = False
    harness.run_until(lambda: bool(harness.job_ends))
    assert harness.journal.events("a")[1:] == [
        *(Delta(n + 1, n, f" {n}") for n in (1, 2, 3)),
        Finished(5, "length", Usage(1, 3)),
    ]


@pytest.mark.parametrize(
    "written", [[Started(1, 9, 4)], [Started(1, 9, 4), Delta(2, 1, " 1")], [Delta(1, 1, " 1")]]
)
def test_started_is_journaled_once_over_takeovers(written: list[Started | Delta]) -> None:
    """The next worker only publishes its own, also after an older one that wrote none, and continues with the next token."""
    harness = LoopHarness()
    harness.journal.entries["a"] = [
        JournalEntry("c", "a", "old", event.n, encode(event).decode()) for event in written
    ]
    harness.run(admit("a", journal=list(written), journals_started=True))
    harness.run_until(lambda: bool(harness.job_ends))
    events = harness.journal.events("a")
    assert events[: len(written)] == written
    assert decode_event(harness.journal.published[0].event) == Started(0, 1, 0)
    assert [event.token_id for event in events if isinstance(event, Delta)] == [1, 2, 3]
    assert not any(isinstance(event, Started) for event in events[len(written) :])
    assert isinstance(events[-1], Finished)
    assert events[-1].usage.completion_tokens == 3


def test_a_job_that_is_stopped_before_it_starts() -> None:
    """An operator stops it while it waits: one terminal event, which lives as long as the job asks."""
    harness = LoopHarness()
    harness.engine.is_full = True
    harness.run(admit("first"), admit("a", final_ttl_seconds=7, is_detached=True, journals_started=True))
    harness.run(Abort("a", AbortReason.STOPPED), times=2)
    [failed] = harness.journal.events("a")
    assert isinstance(failed, Failed)
    assert (failed.n, failed.code, harness.journal.entries["a"][0].ttl_seconds) == (1, "stopped", 7)
