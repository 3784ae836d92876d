"""The generation loop with a scripted engine and journal: how each job ends, for every event and order of events."""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty
from types import SimpleNamespace
from typing import Any

import pytest

from common.protocol import Delta, Failed, Finished, Started, Usage, decode_event
from tests.unit.worker.loop.scripted import LoopHarness, admit, refusal
from worker.loop.early_aborts import MAX_EARLY_ABORTS
from worker.loop.generation_loop import MAX_BURST_WAIT_SECONDS
from worker.loop.messages import Abort, AbortReason, Outcome, Shutdown
from worker.loop.progress import Work


def texts(harness: LoopHarness, job_id: str) -> str:
    return "".join(event.text for event in harness.journal.events(job_id) if isinstance(event, Delta))


def test_a_job_runs_to_its_end() -> None:
    """Every token is journaled in order, then one terminal event; the end is reported once, after the journal has answered."""
    harness = LoopHarness()
    harness.run(admit("a"))
    harness.run_until(lambda: bool(harness.job_ends))
    assert harness.journal.events("a") == [
        Delta(1, 1, " 1"),
        Delta(2, 2, " 2"),
        Delta(3, 3, " 3"),
        Finished(4, "length", Usage(1, 3)),
    ]
    assert [(s.job_id, s.outcome) for s in harness.job_ends] == [("a", Outcome.FINISHED)]


def test_started_is_published_before_prefill() -> None:
    """`Started` is published before the step that prefills the prompt, and is not in the journal."""
    harness = LoopHarness()
    harness.engine.is_prefilling = True
    harness.run(admit("a"), times=2)
    assert [decode_event(entry.event) for entry in harness.journal.published] == [Started(0, 1, 0)]
    assert harness.journal.events("a") == []


def test_a_burst_starts_together() -> None:
    """An idle loop includes all jobs that arrive within the burst wait in its first step, and waits no longer."""
    harness = LoopHarness()
    harness.engine.burst_wait_seconds = 1.0

    def get(timeout: float) -> Any:
        assert timeout <= 1.0 - harness.now
        harness.now += 0.6
        return admit(f"after {harness.now}")

    inbox = SimpleNamespace(
        get=lambda timeout=None: get(timeout) if timeout else admit("first"), empty=lambda: True
    )
    harness.loop._inbox = inbox  # type: ignore[assignment]  # its timeouts advance the test clock
    harness.run()
    assert list(harness.engine.sequences) == ["first", "after 0.6", "after 1.2"]


@pytest.mark.parametrize(
    ("busy_until_mono", "started"),
    [(0.0, ["first"]), (0.014, ["first", "second", "third"]), (9.0, ["first", "second", "third"])],
)
def test_burst_wait_is_extended_while_intake_is_busy(busy_until_mono: float, started: list[str]) -> None:
    """Jobs that intake is still taking extend the burst wait, up to its maximum; otherwise it ends on time."""
    harness = LoopHarness()
    harness.engine.burst_wait_seconds = 0.002
    arrivals = [(0.006, "second"), (0.013, "third"), (0.027, "too late")]

    def get(_timeout: float) -> Any:
        harness.now += 0.001
        if harness.now < arrivals[0][0]:
            raise Empty
        return admit(arrivals.pop(0)[1])

    harness.loop._inbox = SimpleNamespace(  # type: ignore[assignment]  # its timeouts advance the test clock
        get=lambda timeout=None: get(timeout) if timeout else admit("first"), empty=lambda: True
    )
    harness.loop._is_intake_busy = lambda: harness.now < busy_until_mono
    harness.run()
    assert list(harness.engine.sequences) == started
    assert harness.now <= MAX_BURST_WAIT_SECONDS + 0.001


def test_a_stop_string_ends_a_job() -> None:
    """A stop string that spans tokens is removed, the engine releases the sequence, and the finish reason is stop."""
    harness = LoopHarness({"a": ["one st", "op two", " three"]})
    harness.run(admit("a", stop=["stop"], max_tokens=9))
    harness.run_until(lambda: bool(harness.job_ends))
    assert texts(harness, "a") == "one "
    assert harness.journal.events("a")[-1] == Finished(3, "stop", Usage(1, 2), "stop")
    assert harness.engine.num_sequences == 0


def test_held_back_text_is_released_at_the_end() -> None:
    """Text that was held back as the possible start of a stop string is released with the last token."""
    harness = LoopHarness({"a": ["one", " st"]})
    harness.run(admit("a", stop=["stop"], max_tokens=2))
    harness.run_until(lambda: bool(harness.job_ends))
    assert texts(harness, "a") == "one st"


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        (AbortReason.CANCELLED, Outcome.FINISHED),
        (AbortReason.STOPPED, Outcome.STOPPED),
        (AbortReason.FENCED, Outcome.FENCED),
        (AbortReason.REQUEUED, Outcome.REQUEUED),
    ],
)
def test_aborts(reason: AbortReason, outcome: Outcome) -> None:
    """A running job is removed at once. It has a terminal event only if no other worker continues it."""
    harness = LoopHarness()
    harness.run(admit("a", max_tokens=99), times=3)
    harness.run(Abort("a", reason))
    harness.run_until(lambda: bool(harness.job_ends))
    assert harness.job_ends[0].outcome is outcome
    assert harness.engine.num_sequences == 0
    last = harness.journal.events("a")[-1]
    if reason is AbortReason.CANCELLED:
        assert isinstance(last, Finished)
        assert last.finish_reason == "cancelled"
    elif reason is AbortReason.STOPPED:
        assert isinstance(last, Failed)
        assert last.code == "stopped"
    else:
        assert isinstance(last, Delta)


def test_requeue_waits_for_entries_in_flight() -> None:
    """The next worker starts from the journal: a requeue is reported only when the journal holds every token that was sent."""
    harness = LoopHarness()
    harness.run(admit("a", max_tokens=99), times=3)
    sent = harness.engine.sequences["a"][0]
    harness.run(Abort("a", AbortReason.REQUEUED))
    assert harness.job_ends[0].outcome is Outcome.REQUEUED
    assert len(harness.journal.entries["a"]) == sent


def test_a_cancel_that_arrives_before_its_job() -> None:
    """The job ends as cancelled when it arrives; other jobs are not affected."""
    harness = LoopHarness()
    harness.run(admit("b", max_tokens=99), Abort("a", AbortReason.CANCELLED), admit("a"), times=3)
    assert [s.job_id for s in harness.job_ends] == ["a"]
    assert isinstance(harness.job_ends[0].terminal, Finished)
    assert list(harness.engine.sequences) == ["b"]


def test_early_aborts_are_bounded() -> None:
    """Of the aborts of jobs that never arrive, the oldest are dropped."""
    harness = LoopHarness()
    harness.run(*(Abort(f"{i}", AbortReason.CANCELLED) for i in range(MAX_EARLY_ABORTS + 5)))
    assert len(harness.loop._early_aborts) == MAX_EARLY_ABORTS
    harness.run(admit(f"{MAX_EARLY_ABORTS + 4}"), admit("4", max_tokens=99), times=3)
    assert [s.job_id for s in harness.job_ends] == [f"{MAX_EARLY_ABORTS + 4}"]


def test_a_refused_execution_is_fenced() -> None:
    """A sequence whose entries the journal refuses is removed, ends as fenced, and sends nothing more."""
    harness = LoopHarness()
    harness.run(admit("a", max_tokens=99), admit("b", max_tokens=99), times=3)
    harness.journal.refused.add("a-1")
    before = len(harness.journal.entries["a"])
    harness.run(times=4)
    assert [(s.job_id, s.outcome, s.terminal) for s in harness.job_ends] == [("a", Outcome.FENCED, None)]
    assert len(harness.journal.entries["a"]) <= before + 1
    assert list(harness.engine.sequences) == ["b"]


def test_a_refused_terminal_event_is_fenced() -> None:
    """If the terminal event is refused, another worker owns the job: it ends here as fenced, not as finished."""
    harness = LoopHarness()
    harness.journal.refused.add("a-1")
    harness.run(admit("a", max_tokens=1))
    harness.run_until(lambda: bool(harness.job_ends))
    assert [(s.outcome, s.terminal) for s in harness.job_ends] == [(Outcome.FENCED, None)]


def test_a_job_returns_to_the_worker_that_lost_its_lease() -> None:
    """The old execution is fenced, the new one continues from the end of the journal, and both ends are reported."""
    harness = LoopHarness()
    harness.run(admit("a", max_tokens=5), times=3)
    harness.journal.refused.add("a-1")
    harness.run()
    journal = harness.journal.events("a")
    harness.run(admit("a", "a-2", journal, max_tokens=5))
    harness.run_until(lambda: len(harness.job_ends) == 2)
    assert {s.execution_id: s.outcome for s in harness.job_ends} == {
        "a-1": Outcome.FENCED,
        "a-2": Outcome.FINISHED,
    }
    assert texts(harness, "a") == " 1 2 3 4 5"


def test_a_takeover_restores_held_back_text() -> None:
    """Text that the previous worker held back for a stop string is restored by replaying its tokens; no text is lost."""
    harness = LoopHarness({"a": ["x st", "ill", " stop"]})
    journal = [Delta(1, 1, "x ")]
    harness.journal.entries["a"] = [None]  # type: ignore[list-item]  # written by another worker
    harness.run(admit("a", "a-2", journal, stop=["stop"], max_tokens=9))
    harness.run_until(lambda: bool(harness.job_ends))
    events = [decode_event(entry.event) for entry in harness.journal.entries["a"][1:]]
    assert events == [Delta(2, 2, "still"), Delta(3, 3, " "), Finished(4, "stop", Usage(1, 3), "stop")]


@pytest.mark.parametrize(
    ("terminal", "outcome"),
    [(Finished(2, "length", Usage(1, 1)), Outcome.FINISHED), (Failed(2, "no"), Outcome.FAILED)],
)
def test_a_journal_with_a_terminal_event_only_reports_the_end(terminal: Any, outcome: Outcome) -> None:
    """The previous worker died before RQ bookkeeping: nothing is generated or written again."""
    harness = LoopHarness()
    harness.run(admit("a", "a-2", [Delta(1, 1, " 1"), terminal]))
    assert [(s.outcome, s.terminal) for s in harness.job_ends] == [(outcome, terminal)]
    assert harness.journal.entries == {}


def test_a_takeover_of_an_answer_longer_than_this_context() -> None:
    """A worker with a shorter context takes over a longer answer: it finishes with `length`, not with an error."""
    harness = LoopHarness()
    harness.journal.entries["a"] = [None] * 4  # type: ignore[list-item]  # written by another worker
    harness.run(admit("a", "a-2", [Delta(n, n, f" {n}") for n in range(1, 5)], max_tokens=3))
    harness.run_until(lambda: bool(harness.job_ends))
    assert decode_event(harness.journal.entries["a"][4].event) == Finished(5, "length", Usage(1, 4))
    assert [s.outcome for s in harness.job_ends] == [Outcome.FINISHED]
    assert harness.engine.num_sequences == 0


def test_a_job_that_the_engine_refuses_fails_alone() -> None:
    """A `RequestError` from the engine is the client's error; any other exception is a 500 without internals."""
    harness = LoopHarness()
    harness.engine.refused = {"a": refusal("too long"), "b": KeyError("secret")}
    harness.run(admit("a"), admit("b"), admit("c"))
    harness.run_until(lambda: len(harness.job_ends) == 3)
    assert harness.journal.events("a") == [Failed(1, "too long", 400, "invalid_request_error", "prompt")]
    failed = harness.journal.events("b")[0]
    assert isinstance(failed, Failed)
    assert failed.status == 500
    assert "secret" not in failed.message
    assert texts(harness, "c") == " 1 2 3"


def test_a_failed_step_releases_all_its_sequences() -> None:
    """Any sequence may be the cause: none gets an error, all are retried; a job that arrives later is served."""
    harness = LoopHarness()
    harness.run(admit("a", max_tokens=9), admit("b", max_tokens=9), times=2)
    harness.engine.step_error = RuntimeError("boom")
    harness.run()
    assert [(s.job_id, s.outcome, s.terminal) for s in harness.job_ends] == [
        ("a", Outcome.CRASHED, None),
        ("b", Outcome.CRASHED, None),
    ]
    harness.run(admit("c"))
    harness.run_until(lambda: len(harness.job_ends) == 3)
    assert harness.job_ends[2].outcome is Outcome.FINISHED
    assert not any(isinstance(event, Failed) for event in harness.journal.events("a"))


def test_a_sequence_that_fails_fails_alone() -> None:
    """Its client gets one error without internals; the other sequence loses nothing."""
    harness = LoopHarness()
    harness.run(admit("a", max_tokens=9), admit("b", max_tokens=5), times=2)
    harness.engine.sequence_error = ("a", ValueError("secret"))
    harness.run_until(lambda: len(harness.job_ends) == 2)
    failed = harness.journal.events("a")[-1]
    assert isinstance(failed, Failed)
    assert failed.status == 500
    assert "secret" not in failed.message
    assert texts(harness, "b") == " 1 2 3 4 5"


def test_a_job_without_room_waits() -> None:
    """It starts when there is room, in order of arrival; while it waits it can be aborted, by its own execution only."""
    harness = LoopHarness()
    harness.run(admit("a", max_tokens=5))
    harness.engine.is_full = True
    harness.journal.entries["d"] = [None]  # type: ignore[list-item]  # written by another worker
    harness.run(admit("b"), admit("c"), admit("d", journal=[Delta(1, 1, " 1")]))
    assert list(harness.engine.sequences) == ["a"]
    assert harness.loop.is_admission_blocked
    harness.run(Abort("b", AbortReason.FENCED, "another run"), Abort("d", AbortReason.CANCELLED), times=2)
    assert harness.job_ends[0].terminal == Finished(2, "cancelled", Usage(1, 1))
    harness.engine.is_full = False
    harness.run()
    assert list(harness.engine.sequences)[-2:] == ["b", "c"]
    assert not harness.loop.is_admission_blocked


def test_a_single_job_always_starts() -> None:
    """A job starts without room if nothing else runs: waiting would never end."""
    harness = LoopHarness()
    harness.engine.is_full = True
    harness.run(admit("a"), admit("b"))
    harness.run_until(lambda: len(harness.job_ends) == 2)
    assert [s.outcome for s in harness.job_ends] == [Outcome.FINISHED] * 2


def test_a_poison_candidate_runs_alone() -> None:
    """It starts when nothing else runs; other jobs wait until it has produced a new token, then join."""
    harness = LoopHarness()
    harness.run(admit("a", max_tokens=2))
    harness.run(admit("b", is_poison_candidate=True, max_tokens=9), admit("c", max_tokens=9))
    assert list(harness.engine.sequences) == []
    harness.engine.is_prefilling = True
    harness.run(times=3)
    assert list(harness.engine.sequences) == ["b"]
    assert harness.loop.is_admission_blocked
    harness.engine.is_prefilling = False
    harness.run(times=2)
    assert list(harness.engine.sequences) == ["b", "c"]


@pytest.mark.parametrize("end", ["refused", "crashed", "aborted"])
def test_jobs_start_after_a_poison_candidate_ends(end: str) -> None:
    """However it ends, the jobs that waited for it start."""
    harness = LoopHarness()
    harness.engine.is_prefilling = end == "aborted"
    if end == "refused":
        harness.engine.refused["a"] = refusal()
    elif end == "crashed":
        harness.engine.step_error = RuntimeError("boom")
    harness.run(admit("a", is_poison_candidate=True), admit("b"))
    if end == "aborted":
        harness.run(Abort("a", AbortReason.CANCELLED))
    harness.run()
    assert "b" in harness.engine.sequences


def test_the_youngest_sequences_are_requeued_when_memory_is_short() -> None:
    """The youngest sequences are requeued; the oldest one stays even if it exceeds the budget alone."""
    harness = LoopHarness()
    harness.run(*(admit(job_id, max_tokens=99) for job_id in "abc"))
    harness.engine.max_sequences = 1
    harness.run_until(lambda: len(harness.job_ends) == 2)
    assert [(s.job_id, s.outcome) for s in harness.job_ends] == [
        ("c", Outcome.REQUEUED),
        ("b", Outcome.REQUEUED),
    ]
    harness.engine.max_sequences = 0
    harness.run(times=40)
    assert list(harness.engine.sequences) == ["a"]


def test_progress_names_each_engine_call() -> None:
    """Each call of the engine is recorded with its job and the time it began, and nothing between calls: the watchdog reads it."""
    harness = LoopHarness()
    seen: list[Work | None] = []

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*arguments: Any) -> Any:
            seen.append(harness.loop.progress.work)
            return call(*arguments)

        return recorded

    for name in ("insert", "step", "remove"):
        setattr(harness.engine, name, watched(getattr(harness.engine, name)))
    harness.now = 7.0
    harness.run(admit("a"))
    assert harness.loop.progress.work is None
    harness.run(Abort("a", AbortReason.CANCELLED))
    assert seen == [Work("insert", 7.0, "a"), Work("step", 7.0), Work("remove", 7.0, "a")]


def test_jobs_without_subscribers_are_cancelled() -> None:
    """A channel without subscribers means that its API process died; its jobs are cancelled after the grace period, not before."""
    harness = LoopHarness()
    harness.journal.num_listeners = 0
    harness.run(admit("a", max_tokens=999), times=3)
    harness.now = 9.9
    harness.run(times=2)
    assert harness.job_ends == []
    harness.now = 10.1
    harness.run(times=2)
    assert isinstance(harness.job_ends[0].terminal, Finished)
    assert harness.job_ends[0].terminal.finish_reason == "cancelled"


def test_shutdown_waits_for_running_jobs() -> None:
    """`run` returns after `Shutdown` once every event is journaled and every end reported."""
    harness = LoopHarness()
    for message in (admit("a"), admit("b", max_tokens=5), Shutdown()):
        harness.inbox.put(message)
    harness.loop.run()
    assert {s.job_id: s.outcome for s in harness.job_ends} == {"a": Outcome.FINISHED, "b": Outcome.FINISHED}
