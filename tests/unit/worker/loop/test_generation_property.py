"""The generation loop under whatever may happen, in any order: each job that it takes ends exactly once."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from common.protocol import Failed, Finished
from tests.unit.worker.loop.scripted import Bench, admit, refusal
from worker.loop.messages import Abort, AbortReason, Outcome, Shutdown

JOBS = st.sampled_from("abcd")
ACTIONS = st.one_of(
    st.tuples(st.just("admit"), JOBS, st.integers(1, 40)),
    st.tuples(st.just("withdraw"), JOBS, st.sampled_from(list(AbortReason))),
    st.tuples(st.just("lose"), JOBS, st.just(0)),
    st.tuples(st.just("poison"), JOBS, st.booleans()),
    st.tuples(st.just("crash"), JOBS, st.just(0)),
    st.tuples(st.just("fail_row"), JOBS, st.just(0)),
    st.tuples(st.just("fill"), JOBS, st.booleans()),
    st.tuples(st.just("shrink"), JOBS, st.integers(0, 3)),
    st.tuples(st.just("turn"), JOBS, st.integers(1, 3)),
)


class Play:
    """Acts on a loop as intake, clients, operators, Redis and bad luck do."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.executions: list[str] = []
        self.current: dict[str, str] = {}

    def admit(self, job_id: str, max_tokens: int) -> None:
        """A job comes; again only when another worker may have it, with what is in its journal by then."""
        if job_id in self.current and not self._has_moved_on(self.current[job_id]):
            return
        self.current[job_id] = f"{job_id}-{len(self.executions)}"
        self.executions.append(self.current[job_id])
        journal = self.bench.journal.events(job_id)
        is_poison_candidate = max_tokens % 3 == 0
        self.bench.inbox.put(
            admit(
                job_id,
                self.current[job_id],
                journal,
                max_tokens=max_tokens,
                is_poison_candidate=is_poison_candidate,
            )
        )

    def _has_moved_on(self, execution_id: str) -> bool:
        """Whether the lease is lost, or was given up: what is left of the run in the loop is refused by the journal."""
        given_up = {
            s.execution_id for s in self.bench.settled if s.outcome in (Outcome.CRASHED, Outcome.REQUEUED)
        }
        return execution_id in self.bench.journal.refused or execution_id in given_up

    def fail_row(self, job_id: str, _: int) -> None:
        self.bench.engine.row_error = (job_id, ValueError("odd"))

    def fill(self, _job_id: str, is_full: bool) -> None:
        self.bench.engine.is_full = is_full

    def shrink(self, _job_id: str, max_rows: int) -> None:
        self.bench.engine.max_rows = max_rows

    def withdraw(self, job_id: str, why: AbortReason) -> None:
        self.bench.inbox.put(Abort(job_id, why))

    def lose(self, job_id: str, _: int) -> None:
        if job_id in self.current:
            self.bench.journal.refused.add(self.current[job_id])

    def poison(self, job_id: str, is_told: bool) -> None:
        self.bench.engine.refused[job_id] = refusal() if is_told else ValueError("odd")

    def crash(self, _job_id: str, _: int) -> None:
        if self.bench.engine.rows:
            self.bench.engine.step_error = RuntimeError("boom")

    def turn(self, _job_id: str, times: int) -> None:
        for _ in range(times):
            if self.bench.inbox.empty() and not self.bench.engine.rows:
                return  # it would wait for a message
            self.bench.turn()


@settings(max_examples=400, deadline=None)
@given(st.lists(ACTIONS, max_size=40))
def test_every_job_ends_exactly_once(actions: list[tuple[str, str, Any]]) -> None:
    """For any interleaving of arrivals, cancels, errors, lost leases, takeovers and the end.

    Each run of a job is settled exactly once, a journal is gapless with at most one terminal event, and no row is left.
    """
    play = Play()
    for action, job_id, argument in actions:
        getattr(play, action)(job_id, argument)
    bench = play.bench
    bench.inbox.put(Shutdown())
    bench.loop.run()
    assert sorted(s.execution_id for s in bench.settled) == sorted(play.executions)
    assert bench.engine.num_sequences == 0
    for job_id in bench.journal.entries:  # that they are gapless, the journal itself asserts
        events = bench.journal.events(job_id)
        assert not any(isinstance(event, Finished | Failed) for event in events[:-1])
    for job_end in bench.settled:
        if job_end.terminal is not None:
            assert bench.journal.events(job_end.job_id)[-1] == job_end.terminal
