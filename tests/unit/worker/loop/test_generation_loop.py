"""The generation loop with everything scripted around it: what becomes of each job, whatever happens in whatever order."""

from __future__ import annotations

from queue import Empty
from types import SimpleNamespace
from typing import Any

import pytest

from common.protocol import Delta, Failed, Finished, Started, Usage, decode_event
from tests.unit.worker.loop.scripted import Bench, admit, refusal
from worker.loop.generation_loop import LONGEST_GATHER_SECONDS, MAX_EARLY_ABORTS
from worker.loop.messages import Abort, AbortReason, Outcome, Shutdown


def texts(bench: Bench, job_id: str) -> str:
    return "".join(event.text for event in bench.journal.events(job_id) if isinstance(event, Delta))


def test_a_job_runs_to_its_end() -> None:
    """Every token is journaled in order, then one terminal event; it is settled once, after its answer came."""
    bench = Bench()
    bench.turn(admit("a"))
    bench.turn_until(lambda: bool(bench.settled))
    assert bench.journal.events("a") == [
        Delta(1, 1, " 1"),
        Delta(2, 2, " 2"),
        Delta(3, 3, " 3"),
        Finished(4, "length", Usage(1, 3)),
    ]
    assert [(s.job_id, s.outcome) for s in bench.settled] == [("a", Outcome.FINISHED)]


def test_started_does_not_wait_for_a_long_prompt() -> None:
    """`Started` is published before a step that reads a prompt; it is not in the journal."""
    bench = Bench()
    bench.engine.is_reading = True
    bench.turn(admit("a"), times=2)
    assert [decode_event(row.event) for row in bench.journal.published] == [Started(0, 1, 0)]
    assert bench.journal.events("a") == []


def test_a_burst_starts_together() -> None:
    """After a rest, what comes within the engine's gathering time is in its first step, and it waits no longer."""
    bench = Bench()
    bench.engine.burst_wait_seconds = 1.0

    def get(timeout: float) -> Any:
        assert timeout <= 1.0 - bench.now
        bench.now += 0.6
        return admit(f"after {bench.now}")

    inbox = SimpleNamespace(
        get=lambda timeout=None: get(timeout) if timeout else admit("first"), empty=lambda: True
    )
    bench.loop._inbox = inbox  # type: ignore[assignment]  # the clock is ours too
    bench.turn()
    assert list(bench.engine.rows) == ["first", "after 0.6", "after 1.2"]


@pytest.mark.parametrize(
    ("taking_until", "started"),
    [(0.0, ["first"]), (0.014, ["first", "second", "third"]), (9.0, ["first", "second", "third"])],
)
def test_a_burst_that_is_still_being_taken_is_waited_for(taking_until: float, started: list[str]) -> None:
    """Jobs on their way from the queue prolong the gathering, up to its bound; without any it ends as it is."""
    bench = Bench()
    bench.engine.burst_wait_seconds = 0.002
    arrivals = [(0.006, "second"), (0.013, "third"), (0.027, "too late")]

    def get(_timeout: float) -> Any:
        bench.now += 0.001
        if bench.now < arrivals[0][0]:
            raise Empty
        return admit(arrivals.pop(0)[1])

    bench.loop._inbox = SimpleNamespace(  # type: ignore[assignment]  # the clock is ours too
        get=lambda timeout=None: get(timeout) if timeout else admit("first"), empty=lambda: True
    )
    bench.loop._more_coming = lambda: bench.now < taking_until
    bench.turn()
    assert list(bench.engine.rows) == started
    assert bench.now <= LONGEST_GATHER_SECONDS + 0.001


def test_a_stop_string_ends_a_job() -> None:
    """A stop string across tokens is cut out, the row leaves the engine, the reason is stop."""
    bench = Bench({"a": ["one st", "op two", " three"]})
    bench.turn(admit("a", stop=["stop"], max_tokens=9))
    bench.turn_until(lambda: bool(bench.settled))
    assert texts(bench, "a") == "one "
    assert bench.journal.events("a")[-1] == Finished(3, "stop", Usage(1, 2))
    assert bench.engine.num_sequences == 0


def test_what_only_looked_like_a_stop_string_comes_out() -> None:
    """Text that was held back is released with the last token."""
    bench = Bench({"a": ["one", " st"]})
    bench.turn(admit("a", stop=["stop"], max_tokens=2))
    bench.turn_until(lambda: bool(bench.settled))
    assert texts(bench, "a") == "one st"


@pytest.mark.parametrize(
    ("why", "outcome"),
    [
        (AbortReason.CANCELLED, Outcome.FINISHED),
        (AbortReason.STOPPED, Outcome.STOPPED),
        (AbortReason.FENCED, Outcome.FENCED),
        (AbortReason.REQUEUED, Outcome.REQUEUED),
    ],
)
def test_withdrawals(why: AbortReason, outcome: Outcome) -> None:
    """A running job leaves at once; it has a terminal event only if nobody goes on with it."""
    bench = Bench()
    bench.turn(admit("a", max_tokens=99), times=3)
    bench.turn(Abort("a", why))
    bench.turn_until(lambda: bool(bench.settled))
    assert bench.settled[0].outcome is outcome
    assert bench.engine.num_sequences == 0
    last = bench.journal.events("a")[-1]
    if why is AbortReason.CANCELLED:
        assert isinstance(last, Finished)
        assert last.finish_reason == "cancelled"
    elif why is AbortReason.STOPPED:
        assert isinstance(last, Failed)
        assert last.code == "stopped"
    else:
        assert isinstance(last, Delta)


def test_a_hand_over_waits_for_what_is_in_flight() -> None:
    """Whoever goes on reads the journal: it is told only when the last token that was sent is in it."""
    bench = Bench()
    bench.turn(admit("a", max_tokens=99), times=3)
    sent = bench.engine.rows["a"][0]
    bench.turn(Abort("a", AbortReason.REQUEUED))
    assert bench.settled[0].outcome is Outcome.REQUEUED
    assert len(bench.journal.entries["a"]) == sent


def test_a_cancel_that_is_faster_than_its_job() -> None:
    """A job whose client left while it was on its way ends as cancelled as soon as it comes; later jobs are not touched."""
    bench = Bench()
    bench.turn(admit("b", max_tokens=99), Abort("a", AbortReason.CANCELLED), admit("a"), times=3)
    assert [s.job_id for s in bench.settled] == ["a"]
    assert isinstance(bench.settled[0].terminal, Finished)
    assert list(bench.engine.rows) == ["b"]


def test_early_aborts_are_bounded() -> None:
    """Of the aborts for jobs that never come, the oldest are forgotten."""
    bench = Bench()
    bench.turn(*(Abort(f"{i}", AbortReason.CANCELLED) for i in range(MAX_EARLY_ABORTS + 5)))
    assert len(bench.loop._early) == MAX_EARLY_ABORTS
    bench.turn(admit(f"{MAX_EARLY_ABORTS + 4}"), admit("4", max_tokens=99), times=3)
    assert [s.job_id for s in bench.settled] == [f"{MAX_EARLY_ABORTS + 4}"]


def test_a_lost_lease_is_seen_in_the_answer() -> None:
    """A row that the journal refuses is given up, settled as fenced, and nothing more of it is sent."""
    bench = Bench()
    bench.turn(admit("a", max_tokens=99), admit("b", max_tokens=99), times=3)
    bench.journal.refused.add("a-1")
    before = len(bench.journal.entries["a"])
    bench.turn(times=4)
    assert [(s.job_id, s.outcome, s.terminal) for s in bench.settled] == [("a", Outcome.FENCED, None)]
    assert len(bench.journal.entries["a"]) <= before + 1
    assert list(bench.engine.rows) == ["b"]


def test_a_refused_end_is_no_end() -> None:
    """If the last token is refused, another worker has the job: ours is settled as fenced, not as finished."""
    bench = Bench()
    bench.journal.refused.add("a-1")
    bench.turn(admit("a", max_tokens=1))
    bench.turn_until(lambda: bool(bench.settled))
    assert [(s.outcome, s.terminal) for s in bench.settled] == [(Outcome.FENCED, None)]


def test_a_job_that_comes_back_to_the_worker_that_lost_it() -> None:
    """The old run is fenced, the new one goes on where the journal ends, and both are settled."""
    bench = Bench()
    bench.turn(admit("a", max_tokens=5), times=3)
    bench.journal.refused.add("a-1")
    bench.turn()
    journal = bench.journal.events("a")
    bench.turn(admit("a", "a-2", journal, max_tokens=5))
    bench.turn_until(lambda: len(bench.settled) == 2)
    assert {s.execution_id: s.outcome for s in bench.settled} == {
        "a-1": Outcome.FENCED,
        "a-2": Outcome.FINISHED,
    }
    assert texts(bench, "a") == " 1 2 3 4 5"


def test_a_takeover_replays_what_was_held_back() -> None:
    """The stop-string holdback of the worker before is rebuilt from token ids: the text goes on without a break."""
    bench = Bench({"a": ["x st", "ill", " stop"]})
    journal = [Delta(1, 1, "x ")]
    bench.journal.entries["a"] = [None]  # type: ignore[list-item]  # written by another worker
    bench.turn(admit("a", "a-2", journal, stop=["stop"], max_tokens=9))
    bench.turn_until(lambda: bool(bench.settled))
    events = [decode_event(row.event) for row in bench.journal.entries["a"][1:]]
    assert events == [Delta(2, 2, "still"), Delta(3, 3, " "), Finished(4, "stop", Usage(1, 3))]


@pytest.mark.parametrize(
    ("terminal", "outcome"),
    [(Finished(2, "length", Usage(1, 1)), Outcome.FINISHED), (Failed(2, "no"), Outcome.FAILED)],
)
def test_a_journal_that_has_ended_only_needs_the_books(terminal: Any, outcome: Outcome) -> None:
    """A worker died between the last token and RQ's books: nothing is generated or written again."""
    bench = Bench()
    bench.turn(admit("a", "a-2", [Delta(1, 1, " 1"), terminal]))
    assert [(s.outcome, s.terminal) for s in bench.settled] == [(outcome, terminal)]
    assert bench.journal.entries == {}


def test_more_was_generated_than_there_is_room_for_here() -> None:
    """A worker with less memory takes over an answer longer than its own context: it ends by its length, not as an error."""
    bench = Bench()
    bench.journal.entries["a"] = [None] * 4  # type: ignore[list-item]  # written by another worker
    bench.turn(admit("a", "a-2", [Delta(n, n, f" {n}") for n in range(1, 5)], max_tokens=3))
    bench.turn_until(lambda: bool(bench.settled))
    assert decode_event(bench.journal.entries["a"][4].event) == Finished(5, "length", Usage(1, 4))
    assert [s.outcome for s in bench.settled] == [Outcome.FINISHED]
    assert bench.engine.num_sequences == 0


def test_a_refused_request_fails_alone() -> None:
    """What the engine says to one request is that request's error; whatever else it raises is a 500 without internals."""
    bench = Bench()
    bench.engine.refused = {"a": refusal("too long"), "b": KeyError("secret")}
    bench.turn(admit("a"), admit("b"), admit("c"))
    bench.turn_until(lambda: len(bench.settled) == 3)
    assert bench.journal.events("a") == [Failed(1, "too long", 400, "invalid_request_error", "prompt")]
    failed = bench.journal.events("b")[0]
    assert isinstance(failed, Failed)
    assert failed.status == 500
    assert "secret" not in failed.message
    assert texts(bench, "c") == " 1 2 3"


def test_a_step_that_raises_sends_its_rows_back() -> None:
    """Any of its rows may be the reason: none is told anything, each is tried again; a job that comes later is served."""
    bench = Bench()
    bench.turn(admit("a", max_tokens=9), admit("b", max_tokens=9), times=2)
    bench.engine.step_error = RuntimeError("boom")
    bench.turn()
    assert [(s.job_id, s.outcome, s.terminal) for s in bench.settled] == [
        ("a", Outcome.CRASHED, None),
        ("b", Outcome.CRASHED, None),
    ]
    bench.turn(admit("c"))
    bench.turn_until(lambda: len(bench.settled) == 3)
    assert bench.settled[2].outcome is Outcome.FINISHED
    assert not any(isinstance(event, Failed) for event in bench.journal.events("a"))


def test_a_row_that_fails_fails_alone() -> None:
    """Its client gets one error without internals; its neighbour misses nothing."""
    bench = Bench()
    bench.turn(admit("a", max_tokens=9), admit("b", max_tokens=5), times=2)
    bench.engine.row_error = ("a", ValueError("secret"))
    bench.turn_until(lambda: len(bench.settled) == 2)
    failed = bench.journal.events("a")[-1]
    assert isinstance(failed, Failed)
    assert failed.status == 500
    assert "secret" not in failed.message
    assert texts(bench, "b") == " 1 2 3 4 5"


def test_what_has_no_room_waits() -> None:
    """It starts when there is room, in its turn; it can be withdrawn meanwhile, with its own run only."""
    bench = Bench()
    bench.turn(admit("a", max_tokens=5))
    bench.engine.is_full = True
    bench.journal.entries["d"] = [None]  # type: ignore[list-item]  # written by another worker
    bench.turn(admit("b"), admit("c"), admit("d", journal=[Delta(1, 1, " 1")]))
    assert list(bench.engine.rows) == ["a"]
    assert bench.loop.is_admission_blocked
    bench.turn(Abort("b", AbortReason.FENCED, "another run"), Abort("d", AbortReason.CANCELLED), times=2)
    assert bench.settled[0].terminal == Finished(2, "cancelled", Usage(1, 1))
    bench.engine.is_full = False
    bench.turn()
    assert list(bench.engine.rows)[-2:] == ["b", "c"]
    assert not bench.loop.is_admission_blocked


def test_no_room_at_all_is_no_reason_to_wait() -> None:
    """A job that is alone always starts: waiting for others would be for ever."""
    bench = Bench()
    bench.engine.is_full = True
    bench.turn(admit("a"), admit("b"))
    bench.turn_until(lambda: len(bench.settled) == 2)
    assert [s.outcome for s in bench.settled] == [Outcome.FINISHED] * 2


def test_a_suspect_is_tried_alone() -> None:
    """It waits until nobody is there whom it could harm; the others wait until it has a new token, then join."""
    bench = Bench()
    bench.turn(admit("a", max_tokens=2))
    bench.turn(admit("b", is_poison_candidate=True, max_tokens=9), admit("c", max_tokens=9))
    assert list(bench.engine.rows) == []
    bench.engine.is_reading = True
    bench.turn(times=3)
    assert list(bench.engine.rows) == ["b"]
    assert bench.loop.is_admission_blocked
    bench.engine.is_reading = False
    bench.turn(times=2)
    assert list(bench.engine.rows) == ["b", "c"]


@pytest.mark.parametrize("end", ["refused", "crashed", "withdrawn"])
def test_a_suspect_that_ends_lets_others_start(end: str) -> None:
    """Whatever becomes of it, whoever waited behind it is served."""
    bench = Bench()
    bench.engine.is_reading = end == "withdrawn"
    if end == "refused":
        bench.engine.refused["a"] = refusal()
    elif end == "crashed":
        bench.engine.step_error = RuntimeError("boom")
    bench.turn(admit("a", is_poison_candidate=True), admit("b"))
    if end == "withdrawn":
        bench.turn(Abort("a", AbortReason.CANCELLED))
    bench.turn()
    assert "b" in bench.engine.rows


def test_memory_that_runs_short() -> None:
    """The youngest rows go back to the queue; the oldest stays, even if there is no room for it."""
    bench = Bench()
    bench.turn(*(admit(job_id, max_tokens=99) for job_id in "abc"))
    bench.engine.max_rows = 1
    bench.turn_until(lambda: len(bench.settled) == 2)
    assert [(s.job_id, s.outcome) for s in bench.settled] == [
        ("c", Outcome.REQUEUED),
        ("b", Outcome.REQUEUED),
    ]
    bench.engine.max_rows = 0
    bench.turn(times=40)
    assert list(bench.engine.rows) == ["a"]


def test_the_clock_of_a_step() -> None:
    """It runs while the engine steps and at no other time: the watchdog goes by it."""
    bench = Bench()
    seen: list[float | None] = []
    step = bench.engine.step

    def watched() -> Any:
        seen.append(bench.loop.step_began_at)
        return step()

    bench.engine.step = watched  # type: ignore[method-assign]
    bench.now = 7.0
    bench.turn(admit("a"))
    assert seen == [7.0]
    assert bench.loop.step_began_at is None


def test_jobs_that_nobody_listens_to_are_cancelled() -> None:
    """An API process that has not listened for a while has died; only its jobs stop, and only after the grace period."""
    bench = Bench()
    bench.journal.num_listeners = 0
    bench.turn(admit("a", max_tokens=999), times=3)
    bench.now = 9.9
    bench.turn(times=2)
    assert bench.settled == []
    bench.now = 10.1
    bench.turn(times=2)
    assert isinstance(bench.settled[0].terminal, Finished)
    assert bench.settled[0].terminal.finish_reason == "cancelled"


def test_quit_lets_running_jobs_end() -> None:
    """`Shutdown` returns from `run` when everything is written and settled."""
    bench = Bench()
    for message in (admit("a"), admit("b", max_tokens=5), Shutdown()):
        bench.inbox.put(message)
    bench.loop.run()
    assert {s.job_id: s.outcome for s in bench.settled} == {"a": Outcome.FINISHED, "b": Outcome.FINISHED}
