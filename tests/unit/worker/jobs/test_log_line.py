"""The log line of a finished request."""

from __future__ import annotations

import dataclasses
import logging

import msgspec
import pytest

from common.protocol import Delta
from tests.unit.worker.loop.scripted import LoopHarness, admit
from worker.jobs.finalizer import log_end
from worker.loop.journal import JournalEntry


@pytest.mark.parametrize(("name", "shown"), [("ann", "ann"), (None, "-")])
def test_a_finished_request_is_logged_with_its_key(
    name: str | None, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The name of the client's API key is logged after the model; a dash if there is none."""
    harness = LoopHarness()
    message = admit("a")
    job = msgspec.structs.replace(message.job, api_key_name=name)
    harness.run(dataclasses.replace(message, job=job))
    harness.run_until(lambda: bool(harness.job_ends))
    with caplog.at_level(logging.INFO, "worker.jobs.finalizer"):
        log_end(harness.job_ends[0])
    [record] = caplog.records
    assert record.getMessage().startswith(f"job a: model m, key {shown}, ")


def test_only_tokens_of_this_worker_count_for_its_speed() -> None:
    """After a takeover, the tokens that other workers have generated are not part of tokens/s."""
    harness = LoopHarness()
    harness.journal.entries["a"] = [JournalEntry("c", "a", "old", 1, "")]
    harness.run(admit("a", journal=[Delta(1, 1, " 1")], max_tokens=3))
    harness.run_until(lambda: bool(harness.job_ends))
    sequence = harness.job_ends[0].sequence
    assert sequence is not None
    assert (sequence.num_tokens, sequence.num_generated_here) == (3, 2)
