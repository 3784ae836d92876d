"""One accepted request from its subscription to its last byte; and `Generations`, which begins them.

The resources call it with a parsed request. Subscribes, submits, hands events to a rendering, streamed or whole, and lets
go of everything in one place, `Generation.release`, whichever way the request ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

import falcon.asgi

from api.generation import overload
from api.generation.choices import Choices
from api.generation.job_queue import JobQueue, QueueFullError
from api.generation.model_directory import ServedModel
from api.generation.relay import Relay
from api.generation.request import GenerationRequest, check_size
from api.http import errors
from api.http.disconnect import CLIENT, Client
from api.http.headers import timeout_seconds
from api.openai.answer import COMMENT, Rendering, total_usage
from common.errors import RequestError
from common.protocol import Delta, Event, Failed, Finished, GenerationJob
from common.settings import Settings

log = logging.getLogger(__name__)

Taken = list[tuple[int, list[Event]]]
"""Events by the index of their choice; none of the lists is empty."""

_CANCELLED = RequestError(
    "The request was cancelled before its answer was whole.",
    status=503,
    type="server_error",
    code="cancelled",
)


class Generations:
    """Begins generations; shared by the resources."""

    def __init__(self, settings: Settings, relay: Relay, job_queue: JobQueue) -> None:
        self._settings = settings
        self._relay = relay
        self._job_queue = job_queue

    async def begin(
        self, req: falcon.asgi.Request, request: GenerationRequest, model: ServedModel, num_bytes: int
    ) -> Generation:
        """Subscribe, then submit.

        Args:
            num_bytes: The size of the request's body.

        Raises:
            RequestError: 400, a header is wrong; 429, too much waits; 503, Redis is away.
        """
        seconds = timeout_seconds(req, self._settings.request_seconds)
        check_size(request, num_bytes)
        tokens = [overload.estimated_tokens(request, prompt, model, num_bytes) for prompt in request.prompts]
        jobs = request.jobs(model.id, self._relay.channel, tokens)
        generation = Generation(jobs, self._settings, self._relay, self._job_queue, seconds)
        client: Client = req.scope[CLIENT]
        client.at_end(generation.release)
        client.watch()
        try:
            await generation.submit(num_bytes)
        except QueueFullError as full:
            raise overload.refusal(model, full.num_requests, is_tokens=full.is_tokens) from None
        return generation


class Generation:
    """See the module. Its methods raise what a client is to be told only before the first byte went out.

    Args:
        jobs: In the order of the choices; at least one.
        seconds: From now to its deadline.
    """

    def __init__(
        self,
        jobs: list[GenerationJob],
        settings: Settings,
        relay: Relay,
        job_queue: JobQueue,
        seconds: float,
    ) -> None:
        self.job_id = jobs[0].job_id
        self._settings = settings
        self._relay = relay
        self._job_queue = job_queue
        self._choices = Choices(jobs, relay)
        self._is_submitted = False
        self._deadline = asyncio.get_running_loop().call_later(
            seconds, self._choices.give_up, _too_late(seconds)
        )
        self._began_at = time.monotonic()
        self._first_token_at: float | None = None

    async def submit(self, num_bytes: int) -> None:
        """Put the jobs into their queue, all or none.

        Raises:
            QueueFullError: They are not in the queue, because too much is.
            RequestError: 503; Redis is away.
        """
        if not self._relay.is_connected:
            raise errors.queue_unavailable()
        self._is_submitted = True
        try:
            await self._job_queue.submit(self._choices.jobs, num_bytes)
        except QueueFullError:
            self._is_submitted = False
            raise
        self._choices.heard(asyncio.get_running_loop().time())

    def release(self) -> None:
        """Let go of everything; called exactly once, when the request has ended in whatever way."""
        self._deadline.cancel()
        running = self._choices.release()
        for job in running if self._is_submitted else ():
            self._job_queue.cancel(job.job_id, job.model)
        self._log()

    async def answer(self, resp: falcon.asgi.Response, rendering: Rendering, *, stream: bool) -> None:
        """Make the answer the response.

        Raises:
            RequestError: The request failed, before anything was sent.
        """
        resp.status = falcon.HTTP_200
        if not stream:
            resp.data = await self._whole(rendering)
            return
        first = await self._first_events()
        resp.content_type = "text/event-stream; charset=utf-8"
        resp.set_header("cache-control", "no-cache")
        resp.set_header("x-accel-buffering", "no")
        # Not `resp.sse`: falcon 4.4 would watch for a disconnect with a task of its own and serialize what is ready.
        resp.stream = self._frames(first, rendering)

    async def _whole(self, rendering: Rendering) -> bytes:
        while not self._choices.is_done:
            for index, events in await self._take():
                rendering.add(index, events)
        self._raise_failure()
        return rendering.body(self._choices.finished)

    async def _first_events(self) -> Taken:
        """Empty if nothing came in time; the status is still open, so that a request that fails at once says so in it."""
        try:
            async with asyncio.timeout(self._settings.sse_header_seconds):
                while not (taken := await self._take()):
                    pass
        except TimeoutError:
            return []
        self._raise_failure()
        return taken

    async def _frames(self, taken: Taken, rendering: Rendering) -> AsyncIterator[bytes]:
        """The stream's bytes; ends with an error frame where it fails, never just so."""
        try:
            # Not nothing: with these bytes the headers go out.
            frames = rendering.opening() + self._rendered(taken, rendering)
            yield frames or COMMENT
            sent_at = time.monotonic()
            while not self._choices.is_done:
                frames = self._rendered(await self._take(), rendering)
                if not frames and time.monotonic() - sent_at >= self._settings.sse_comment_seconds:
                    frames = COMMENT
                if frames:
                    yield frames
                    sent_at = time.monotonic()
            self._raise_failure()
            yield rendering.closing(self._choices.finished)
        except RequestError as error:
            yield errors.frame(error)
        except Exception:
            log.exception("job %s: its stream failed", self.job_id)
            yield errors.frame(errors.internal())

    def _rendered(self, taken: Taken, rendering: Rendering) -> bytes:
        """What comes before the end of an answer that is not whole is still told."""
        return b"".join(
            rendering.frames(index, events if _is_whole(events[-1]) else events[:-1])
            for index, events in taken
        )

    async def _take(self) -> Taken:
        taken = await self._choices.take()
        if self._first_token_at is None and any(isinstance(e, Delta) for _, events in taken for e in events):
            self._first_token_at = time.monotonic()
        return taken

    def _raise_failure(self) -> None:
        """Raises:
        RequestError: The answer is not whole and never will be.
        """
        if self._choices.failed is not None:
            raise errors.from_event(self._choices.failed)
        if any(finished.finish_reason == "cancelled" for finished in self._choices.finished):
            raise _CANCELLED

    def _log(self) -> None:
        """One line a request; never its text."""
        now = time.monotonic()
        choices = self._choices
        usage = total_usage(choices.finished, len(choices.jobs))
        completion_tokens = choices.num_tokens
        outcome, status = ("client left", "499") if self._is_submitted else ("not queued", "429 or 503")
        if choices.failed is not None:
            outcome, status = (
                f"failed ({choices.failed.code or choices.failed.kind})",
                str(choices.failed.status),
            )
        elif choices.is_done:
            outcome, status = str(choices.finished[0].finish_reason), "200"
            completion_tokens = usage.completion_tokens
        first = self._first_token_at
        rate = (completion_tokens - 1) / (now - first) if first is not None and now > first else 0.0
        # A worker logs each whole answer; what it cannot know, such as a client's view, is said here when it matters.
        log.log(
            logging.DEBUG if status == "200" else logging.INFO,
            "job %s: model %s, %d choices, %d prompt tokens (%d cached), %d completion tokens, first token after %s, "
            "%.3f s, %.1f tokens/s, %s, status %s",
            self.job_id,
            choices.jobs[0].model,
            len(choices.jobs),
            usage.prompt_tokens,
            usage.cached_tokens,
            completion_tokens,
            f"{first - self._began_at:.3f} s" if first is not None else "-",
            now - self._began_at,
            max(0.0, rate),
            outcome,
            status,
        )


def _too_late(seconds: float) -> Failed:
    return Failed(
        0,
        f"The answer was not whole {seconds:g} seconds after the request, which was its deadline.",
        status=504,
        code="deadline_exceeded",
    )


def _is_whole(event: Event) -> bool:
    """Whether an answer may be shown with this event as its last so far."""
    return not (
        isinstance(event, Failed) or (isinstance(event, Finished) and event.finish_reason == "cancelled")
    )
