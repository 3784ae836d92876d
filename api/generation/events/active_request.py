"""One accepted request from its subscription to its release.

Made by the endpoint. It subscribes, submits, receives events, and releases everything in one place, `release`, however
the request ends; a detached request's jobs go on after that. `api.generation.delivery` turns its events into a response. Must not know HTTP or any protocol.
"""

from __future__ import annotations

import asyncio
import logging
import time

from api.generation.command_batch import queue_unavailable
from api.generation.events.choices import Choices
from api.generation.events.relay import Relay
from api.generation.front_end import ChoiceEvents, total_usage
from api.generation.job_queue import JobQueue, NewRecord, QueueFullError, StoreFullError
from common.protocol import Delta, Failed, Finished, GenerationJob

log = logging.getLogger(__name__)


class ActiveRequest:
    """See the module.

    Args:
        jobs: In the order of the choices; at least one.
        best_of: How many of them belong to each prompt.
        timeout_seconds: From now to the request's deadline; None: it has none. The jobs of a detached request go on after it.
    """

    def __init__(
        self,
        jobs: list[GenerationJob],
        best_of: int,
        relay: Relay,
        job_queue: JobQueue,
        timeout_seconds: float | None,
    ) -> None:
        self.job_id = jobs[0].job_id
        self._jobs = jobs
        self._is_detached = jobs[0].is_detached
        self._best_of = best_of
        self._relay = relay
        self._job_queue = job_queue
        self._choices = Choices(
            [job.job_id for job in jobs], jobs[0].channel, relay, in_order=self._is_detached
        )
        self._is_submitted = False
        self._is_queued = False
        self._is_accepted = False
        self._cancelled_ids: set[str] = set()
        self._deadline: asyncio.TimerHandle | None = None
        if timeout_seconds is not None:
            self._deadline = asyncio.get_running_loop().call_later(
                timeout_seconds, self._abort, _deadline_exceeded(timeout_seconds)
            )
        self._began_mono = time.monotonic()
        self._first_token_mono: float | None = None

    @property
    def is_done(self) -> bool:
        """Whether no more events follow."""
        return self._choices.is_done

    @property
    def is_aborted(self) -> bool:
        """Whether it failed in this process; its jobs may go on."""
        return self._choices.is_aborted

    async def submit(self, num_bytes: int, record: NewRecord | None = None) -> None:
        """Put the jobs into their queue, all or none.

        Args:
            record: To be stored with them.

        Raises:
            QueueFullError: They are not in the queue; it is full.
            StoreFullError: They are not in the queue; there is no room for `record`.
            RequestError: 503; Redis is unavailable.
        """
        if not self._relay.is_connected:
            raise queue_unavailable()
        self._is_submitted = True
        try:
            await self._job_queue.submit(self._jobs, num_bytes, record)
        except (QueueFullError, StoreFullError):
            self._is_submitted = False
            raise
        self._is_queued = True
        self._choices.mark_queued(asyncio.get_running_loop().time())

    async def take(self) -> ChoiceEvents:
        """Wait for events; empty on a tick of the clock. Must not be called once `is_done`."""
        taken = await self._choices.take()
        if self._first_token_mono is None and any(
            isinstance(event, Delta) for _, events in taken for event in events
        ):
            self._first_token_mono = time.monotonic()
        if self._choices.failed is not None:
            self._cancel_unfinished()  # not only in `release`: a client that does not read delays that
        return taken

    def finished(self) -> list[Finished]:
        """How the choices ended, once `is_done`.

        Raises:
            RequestError: The answer is incomplete: the request failed or was cancelled.
        """
        return self._choices.ends()

    def mark_accepted(self) -> None:
        """The client is answered as soon as the jobs are queued: nothing more is sent to it."""
        self._is_accepted = True

    def release(self) -> None:
        """Release everything; called exactly once, however the request has ended."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._cancel_unfinished()
        self._choices.release()
        self._log_end()

    def _abort(self, failed: Failed) -> None:
        """End the request and cancel its jobs at once, even if its handler waits for a client that does not read."""
        self._choices.abort(failed)
        self._cancel_unfinished()

    def _cancel_unfinished(self) -> None:
        """Cancel the jobs that may still be queued or running; each once, unless it may have been queued since.

        Those of a detached request go on, unless one of them has failed, or the client does not know whether they are queued.
        """
        if not self._is_submitted:
            return
        has_failed = self._choices.failed is not None and not self._choices.is_aborted
        if self._is_detached and self._is_queued and not has_failed:
            return
        for index in self._choices.unfinished():
            job = self._jobs[index]
            if job.job_id not in self._cancelled_ids:
                self._job_queue.cancel(job)
                if self._is_queued:
                    self._cancelled_ids.add(job.job_id)

    def _log_end(self) -> None:
        """One line a request; never its text."""
        now_mono = time.monotonic()
        choices = self._choices
        completion_tokens = choices.num_tokens
        prompt_tokens, cached = self._prompt_tokens(), ""
        outcome, status = ("client left", "499") if self._is_submitted else ("not queued", "429 or 503")
        if self._is_detached and self._is_queued:
            outcome = "client left, generation goes on"
            if self._is_accepted:
                outcome, status = "accepted, to be generated in the background", "200"
        if choices.failed is not None:
            outcome = f"failed ({choices.failed.code or choices.failed.kind})"
            status = str(choices.failed.status)
        elif choices.is_done:
            outcome, status = str(choices.finished[0].finish_reason), "200"
            usage = total_usage(choices.finished, self._best_of)
            completion_tokens, prompt_tokens = usage.completion_tokens, str(usage.prompt_tokens)
            cached = f" ({usage.cached_tokens} cached)"
        first_mono = self._first_token_mono
        rate = (
            (completion_tokens - 1) / (now_mono - first_mono)
            if first_mono is not None and now_mono > first_mono
            else 0.0
        )
        # A worker logs each complete answer. What it cannot know, such as that the client left, is logged here.
        log.log(
            logging.DEBUG if status == "200" else logging.INFO,
            "job %s: model %s, key %s, %d choices, %s prompt tokens%s, %d completion tokens, first token after %s, "
            "%.3f s, %.1f tokens/s, %s, status %s",
            self.job_id,
            self._jobs[0].model,
            self._jobs[0].api_key_name or "-",
            len(self._jobs),
            prompt_tokens,
            cached,
            completion_tokens,
            f"{first_mono - self._began_mono:.3f} s" if first_mono is not None else "-",
            now_mono - self._began_mono,
            max(0.0, rate),
            outcome,
            status,
        )

    def _prompt_tokens(self) -> str:
        """Of the prompts whose prefill has begun; workers report them when it does."""
        by_prompt = {
            index // self._best_of: num_tokens for index, num_tokens in self._choices.prompt_tokens.items()
        }
        return str(sum(by_prompt.values())) if by_prompt else "unknown"


def _deadline_exceeded(timeout_seconds: float) -> Failed:
    return Failed(
        0,
        f"The answer was not complete within {timeout_seconds:g} seconds, the request's deadline.",
        status=504,
        code="deadline_exceeded",
    )
