"""A property of the generation loop: for any interleaving of events, each job that it accepts ends exactly once."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from common.protocol import Failed, Finished, Started
from tests.unit.worker.loop.scripted import LoopHarness, admit, refusal
from worker.loop.messages import Abort, AbortReason, Outcome, Shutdown

JOBS = st.sampled_from("abcd")
ACTIONS = st.one_of(
    st.tuples(st.just("admit"), JOBS, st.integers(1, 40)),
    st.tuples(st.just("abort"), JOBS, st.sampled_from(list(AbortReason))),
    st.tuples(st.just("lose_lease"), JOBS, st.just(0)),
    st.tuples(st.just("refuse"), JOBS, st.booleans()),
    st.tuples(st.just("crash"), JOBS, st.just(0)),
    st.tuples(st.just("fail_sequence"), JOBS, st.just(0)),
    st.tuples(st.just("fill"), JOBS, st.booleans()),
    st.tuples(st.just("shrink"), JOBS, st.integers(0, 3)),
    st.tuples(st.just("run"), JOBS, st.integers(1, 3)),
)


class Scenario:
    """Acts on a loop as intake, clients, operators, a failing engine and an expiring lease do."""

    def __init__(self) -> None:
        self.harness = LoopHarness()
        self.executions: list[str] = []
        self.current: dict[str, str] = {}

    def admit(self, job_id: str, max_tokens: int) -> None:
        """Admit a job; a second time only if its lease is lost or released, with its journal at that time."""
        if job_id in self.current and not self._is_released(self.current[job_id]):
            return
        self.current[job_id] = f"{job_id}-{len(self.executions)}"
        self.executions.append(self.current[job_id])
        journal = self.harness.journal.events(job_id)
        is_poison_candidate = max_tokens % 3 == 0
        self.harness.inbox.put(
            admit(
                job_id,
                self.current[job_id],
                journal,
                max_tokens=max_tokens,
                is_poison_candidate=is_poison_candidate,
                journals_started=job_id in "ab",
            )
        )

    def _is_released(self, execution_id: str) -> bool:
        """Whether the lease is lost or released: the journal refuses whatever the loop still writes for this execution."""
        released = {
            s.execution_id for s in self.harness.job_ends if s.outcome in (Outcome.CRASHED, Outcome.REQUEUED)
        }
        return execution_id in self.harness.journal.refused or execution_id in released

    def fail_sequence(self, job_id: str, _: int) -> None:
        self.harness.engine.sequence_error = (job_id, ValueError("odd"))

    def fill(self, _job_id: str, is_full: bool) -> None:
        self.harness.engine.is_full = is_full

    def shrink(self, _job_id: str, max_sequences: int) -> None:
        self.harness.engine.max_sequences = max_sequences

    def abort(self, job_id: str, reason: AbortReason) -> None:
        self.harness.inbox.put(Abort(job_id, reason))

    def lose_lease(self, job_id: str, _: int) -> None:
        if job_id in self.current:
            self.harness.journal.refused.add(self.current[job_id])

    def refuse(self, job_id: str, is_request_error: bool) -> None:
        self.harness.engine.refused[job_id] = refusal() if is_request_error else ValueError("odd")

    def crash(self, _job_id: str, _: int) -> None:
        if self.harness.engine.sequences:
            self.harness.engine.step_error = RuntimeError("boom")

    def run(self, _job_id: str, times: int) -> None:
        for _ in range(times):
            if self.harness.inbox.empty() and not self.harness.engine.sequences:
                return  # it would block on its inbox
            self.harness.run()


@settings(max_examples=400, deadline=None)
@given(st.lists(ACTIONS, max_size=40))
def test_every_job_ends_exactly_once(actions: list[tuple[str, str, Any]]) -> None:
    """For any interleaving of arrivals, cancels, errors, lost leases, takeovers and shutdown.

    The end of each execution is reported exactly once, each journal is gapless with at most one terminal event, and the engine
    holds no sequence at the end.
    """
    scenario = Scenario()
    for action, job_id, argument in actions:
        getattr(scenario, action)(job_id, argument)
    harness = scenario.harness
    harness.inbox.put(Shutdown())
    harness.loop.run()
    assert sorted(s.execution_id for s in harness.job_ends) == sorted(scenario.executions)
    assert harness.engine.num_sequences == 0
    for job_id in harness.journal.entries:  # the scripted journal asserts that there are no gaps
        events = harness.journal.events(job_id)
        assert not any(isinstance(event, Finished | Failed) for event in events[:-1])
        assert [e.n for e in events if isinstance(e, Started)] == [
            1 for e in events[:1] if isinstance(e, Started)
        ]
    for job_end in harness.job_ends:
        if job_end.terminal is not None:
            assert harness.journal.events(job_end.job_id)[-1] == job_end.terminal
