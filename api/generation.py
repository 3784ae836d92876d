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

from api import errors, overload
from api.answer import COMMENT, Rendering
from api.disconnect import CLIENT, Client
from api.generation_request import GenerationRequest
from api.headers import timeout_seconds
from api.job_queue import JobQueue, QueueFullError
from api.model_directory import ServedModel
from api.relay import Relay
from api.subscription import Subscription
from common import names
from common.errors import RequestError
from common.protocol import Delta, Event, Failed, Finished, GenerationJob
from common.settings import Settings

log = logging.getLogger(__name__)

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
        job = GenerationJob(
            job_id=names.new_job_id(overload.estimated_tokens(request, model, num_bytes)),
            model=model.id,
            channel=self._relay.channel,
            prompt=request.prompt,
            max_tokens=request.max_tokens,
            stop=request.stop,
            top_logprobs=request.top_logprobs,
            sampling=request.sampling,
            submitted_at=time.time(),
            tool_use=request.tool_use,
        )
        generation = Generation(job, self._settings, self._relay, self._job_queue, seconds)
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
        seconds: From now to its deadline.
    """

    def __init__(
        self, job: GenerationJob, settings: Settings, relay: Relay, job_queue: JobQueue, seconds: float
    ) -> None:
        self.job = job
        self._settings = settings
        self._relay = relay
        self._job_queue = job_queue
        self._subscription: Subscription = relay.subscribe(job.job_id)
        self._is_submitted = False
        self._deadline = asyncio.get_running_loop().call_later(
            seconds, self._subscription.give_up, _too_late(seconds)
        )
        self._began_at = time.monotonic()
        self._first_token_at: float | None = None
        self._terminal: Finished | Failed | None = None

    async def submit(self, num_bytes: int) -> None:
        """Put the job into its queue.

        Raises:
            QueueFullError: It is not in its queue, because too much is.
            RequestError: 503; Redis is away.
        """
        if not self._relay.is_connected:
            raise errors.queue_unavailable()
        self._is_submitted = True
        try:
            await self._job_queue.submit(self.job, num_bytes)
        except QueueFullError:
            self._is_submitted = False
            raise
        self._subscription.heard_at = asyncio.get_running_loop().time()

    def release(self) -> None:
        """Let go of everything; called exactly once, when the request has ended in whatever way."""
        self._deadline.cancel()
        self._relay.unsubscribe(self._subscription)
        if self._is_submitted and (self._terminal is None or self._subscription.is_given_up):
            self._job_queue.cancel(self.job.job_id, self.job.model)
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
        while self._terminal is None:
            rendering.add(await self._take())
        return rendering.body(_finished(self._terminal))

    async def _first_events(self) -> list[Event]:
        """Empty if nothing came in time; the status is still open, so that a request that fails at once says so in it."""
        try:
            async with asyncio.timeout(self._settings.sse_header_seconds):
                while not (events := await self._take()):
                    pass
        except TimeoutError:
            return []
        if self._terminal is not None:
            _finished(self._terminal)
        return events

    async def _frames(self, events: list[Event], rendering: Rendering) -> AsyncIterator[bytes]:
        """The stream's bytes; ends with an error frame where it fails, never just so."""
        # Not nothing: with these bytes the headers go out.
        yield rendering.opening() + rendering.frames(events) or COMMENT
        sent_at = time.monotonic()
        try:
            while self._terminal is None:
                events = await self._take()
                if self._terminal is not None:
                    if events[:-1]:
                        yield rendering.frames(events[:-1])
                    yield rendering.frames([_finished(self._terminal)])
                    return
                frames = rendering.frames(events) if events else b""
                if not frames and time.monotonic() - sent_at >= self._settings.sse_comment_seconds:
                    frames = COMMENT
                if frames:
                    yield frames
                    sent_at = time.monotonic()
        except RequestError as error:
            yield errors.frame(error)
        except Exception:
            log.exception("job %s: its stream failed", self.job.job_id)
            yield errors.frame(errors.internal())

    async def _take(self) -> list[Event]:
        events = await self._subscription.take()
        self._terminal = self._subscription.terminal  # the last of `events`, if it is there
        if self._first_token_at is None and any(isinstance(event, Delta) for event in events):
            self._first_token_at = time.monotonic()
        return events

    def _log(self) -> None:
        """One line a request; never its text."""
        now = time.monotonic()
        terminal = self._terminal
        prompt_tokens = cached_tokens = 0
        completion_tokens = self._subscription.num_tokens
        outcome, status = ("client left", "499") if self._is_submitted else ("not queued", "429 or 503")
        if isinstance(terminal, Finished):
            outcome, status = str(terminal.finish_reason), "200"
            usage = terminal.usage
            prompt_tokens, cached_tokens = usage.prompt_tokens, usage.cached_tokens
            completion_tokens = usage.completion_tokens
        elif isinstance(terminal, Failed):
            outcome, status = f"failed ({terminal.code or terminal.kind})", str(terminal.status)
        first = self._first_token_at
        rate = (completion_tokens - 1) / (now - first) if first is not None and now > first else 0.0
        # A worker logs each whole answer; what it cannot know, such as a client's view, is said here when it matters.
        log.log(
            logging.DEBUG if isinstance(terminal, Finished) else logging.INFO,
            "job %s: model %s, %d prompt tokens (%d cached), %d completion tokens, first token after %s, "
            "%.3f s, %.1f tokens/s, %s, status %s",
            self.job.job_id,
            self.job.model,
            prompt_tokens,
            cached_tokens,
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


def _finished(terminal: Finished | Failed) -> Finished:
    """The end of an answer that is whole.

    Raises:
        RequestError: It is not.
    """
    if isinstance(terminal, Failed):
        raise errors.from_event(terminal)
    if terminal.finish_reason == "cancelled":
        raise _CANCELLED
    return terminal
