"""Anthropic's protocol through a deployed API, with a scripted worker: messages, streams, errors, models, token counts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common import connections
from common.protocol import (
    Delta,
    Event,
    Failed,
    Finished,
    GenerationJob,
    Reasoning,
    Started,
    ToolArguments,
    ToolCall,
    Usage,
)
from common.rq import JsonQueue
from tests.e2e.api_pool import HI, MODEL, ApiPool, Response, api_pool, request, words
from tests.fake_worker import FakeWorker, Script
from tests.redis.pool_of_workers import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent.parent
PATH = "/v1/messages"
VERSION = {"anthropic_version": "2023-06-01"}
TOOLS = [{"name": "f", "input_schema": {"type": "object"}}]
PING = b'event: ping\ndata: {"type":"ping"}\n\n'


@pytest.fixture(scope="module")
def api() -> Iterator[ApiPool]:
    """Two API processes; a queue of two requests; a ping in every pause."""
    environ = {"MLXPOOL_SSE_COMMENT_SECONDS": "0.5", "MLXPOOL_MAX_QUEUED_REQUESTS": "2"}
    with api_pool(environ, num_processes=2) as pool:
        yield pool


def body(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "max_tokens": 100, "messages": HI} | fields).encode()


def ask(api: ApiPool, path: str = PATH, **fields: Any) -> Response:
    return api.ask("POST", path, body(**fields), content_type="application/json", **VERSION)


def events(response: Response) -> list[Any]:
    """The data of a stream's events, each checked to have its name."""
    found = []
    for frame in response.body.decode().removesuffix("\n\n").split("\n\n"):
        lines = dict(line.split(": ", 1) for line in frame.split("\n"))
        data = json.loads(lines["data"])
        assert lines["event"] == data["type"]
        found.append(data)
    return found


def error(response: Response, status: int, kind: str) -> str:
    """The message of an error, checked to have Anthropic's shape, status and request id."""
    assert response.status == status
    assert response.headers["content-type"] == "application/json"
    assert set(response.json) == {"type", "error", "request_id"}
    assert response.json["type"] == "error"
    assert response.json["error"]["type"] == kind
    assert response.headers["request-id"] == response.json["request_id"] == response.headers["x-request-id"]
    return str(response.json["error"]["message"])


def journaled(script: Script) -> Script:
    """The events of a job whose journal begins with `Started`."""

    def numbered(job: GenerationJob) -> Iterator[Event | float]:
        assert job.journals_started
        for event in script(job):
            yield event if isinstance(event, float) else msgspec.structs.replace(event, n=event.n + 1)

    return numbered


def spoken(job: GenerationJob) -> Iterator[Event | float]:
    yield from words(job, [" a", "", "é", "", " end"], pause=0.01)


@journaled
def called(_job: GenerationJob) -> Iterator[Event | float]:
    """Thoughts, text and two calls."""
    yield Started(0, 7, 2)
    yield Delta(1, 1, pieces=[Reasoning("hm")])
    yield Delta(2, 2, "Look")
    yield Delta(3, 3, pieces=[ToolCall(0, "f")])
    yield Delta(4, 4, "", pieces=[ToolArguments(0, '{"a":1}'), ToolCall(1, "f"), ToolArguments(1, "{}")])
    yield Finished(5, "tool_calls", Usage(7, 4, 2, 1))


def slow(job: GenerationJob) -> Iterator[Event | float]:
    yield from words(job, [" a", " b"], pause=1.6)


@journaled
def broken(_job: GenerationJob) -> Iterator[Event | float]:
    """An error after a token, late enough that the stream has begun."""
    yield Started(0, 2)
    yield Delta(1, 7, "a")
    yield 0.5
    yield Failed(2, "It broke.", code="broken")


def test_a_message(api: ApiPool) -> None:
    """An object with text and token counts, cached ones apart; beta parameters of the URL and headers are accepted."""
    api.follow(words)
    answer = api.ask(
        "POST",
        PATH + "?beta=true",
        body(system="S", thinking={"type": "adaptive"}, context_management={"edits": []}),
        content_type="application/json",
        anthropic_version="2099-01-01",
        anthropic_beta="a-1,b-2",
        x_api_key="none",
    )
    assert answer.status == 200
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert answer.headers["x-ignored-parameters"] == "context_management"
    message = answer.json
    assert re.fullmatch("msg_[0-9a-f]{30}", message["id"])
    assert message["content"] == [{"type": "text", "text": "Hello there, café!", "citations": None}]
    assert (message["model"], message["stop_reason"]) == (MODEL, "end_turn")
    usage = message["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (5, 2, 6)
    [job] = api.worker.jobs
    assert job.journals_started
    assert job.sampling.temperature == 0.25  # the model's own default


def test_a_stream(api: ApiPool) -> None:
    """It begins with the message and its prompt's tokens, and ends with its stop."""
    api.follow(spoken)
    answer = ask(api, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    kinds = [event["type"] for event in events(answer)]
    assert kinds[:2] == ["message_start", "ping"]
    assert events(answer)[0]["message"]["usage"]["input_tokens"] == 5
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    texts = [event["delta"]["text"] for event in events(answer) if event["type"] == "content_block_delta"]
    assert "".join(texts) == " aé end"


def test_silence_is_filled_with_pings(api: ApiPool) -> None:
    """Claude Code gives up on a stream without events; comments are not events."""
    api.follow(slow)
    assert ask(api, stream=True).body.count(PING) > 1


def test_an_error_in_a_stream(api: ApiPool) -> None:
    """The last event is the error; no end of the message follows."""
    api.follow(broken)
    last = events(ask(api, stream=True))[-1]
    assert last == {"type": "error", "error": {"type": "api_error", "message": "It broke."}}


ANSWERS: list[tuple[Any, dict[str, Any]]] = [
    (spoken, {}),
    (called, {"tools": TOOLS, "thinking": {"type": "enabled", "budget_tokens": 9}}),
    (called, {"tools": TOOLS, "thinking": {"type": "adaptive", "display": "omitted"}}),
    (called, {"tools": TOOLS}),
]


@pytest.mark.parametrize(
    ("script", "fields", "stream"),
    [*((*each, stream) for each in ANSWERS for stream in (False, True)), (broken, {}, True)],
)
def test_another_process_renders_the_same_bytes(api: ApiPool, script: Any, fields: Any, stream: bool) -> None:
    """Ids and signatures included, from Redis alone; keep-alives are not part of an answer."""
    api.follow(script)
    response = ask(api, stream=stream, **fields)
    found = re.search(rb'"id":"msg_([0-9a-f]{30})"', response.body)
    assert response.status == 200
    assert found is not None
    command = [sys.executable, "-m", "tests.e2e.rendered_again", api.pool.redis_url, found[1].decode()]
    again = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    assert without_ids(again).replace(PING, b"") == without_ids(response.body).replace(PING, b"")


def without_ids(data: bytes) -> bytes:
    """A stream without the numbers of its frames, which are not the rendering's."""
    return re.sub(rb"(?m)^id: .*\n", b"", data)


def test_errors(api: ApiPool) -> None:
    """In Anthropic's shape, whichever part of the server refuses; the message names the field."""
    assert "max_tokens" in error(ask(api, max_tokens="x"), 400, "invalid_request_error")
    assert "messages[0].content[0]" in error(
        ask(api, messages=[{"role": "user", "content": [{"type": "image"}]}]), 400, "invalid_request_error"
    )
    error(ask(api, model="zzz"), 404, "not_found_error")
    error(ask(api, path=f"{PATH}/batches"), 404, "not_found_error")
    error(api.ask("GET", PATH), 405, "invalid_request_error")
    error(api.ask("POST", PATH, b"x", content_type="text/plain"), 415, "invalid_request_error")
    error(api.ask("POST", PATH, content_length="99999999999"), 413, "request_too_large")
    error(api.ask("POST", PATH, content_type="application/json"), 400, "invalid_request_error")
    error(api.ask("GET", "/v1/files", **VERSION), 404, "not_found_error")
    error(api.ask("GET", "/v1/models/zzz", **VERSION), 404, "not_found_error")
    assert set(api.ask("GET", "/v1/models/zzz").json) == {"error"}


def test_a_full_pool_and_one_without_a_worker(api: ApiPool) -> None:
    """529 with `retry-after`, which Anthropic's clients obey."""
    with connections.connect(api.pool.redis_url) as client:
        queue = JsonQueue("slow", connection=client)
        idle_worker = FakeWorker(api.pool.redis_url, "slow")  # shows a card but takes no job
        idle_worker.show_card()
        waiting = []
        for _ in range(2):
            waiting.append(api.connect())
            waiting[-1].sendall(request("POST", PATH, body(model="slow", stream=True)))
        wait_until(lambda: queue.count == 2)
        refused = ask(api, model="slow")
        error(refused, 529, "overloaded_error")
        assert int(refused.headers["retry-after"]) >= 1
        assert "x-should-retry" not in refused.headers
        for connection in waiting:
            connection.close()
        wait_until(lambda: queue.count == 0)
        client.zadd("mlxpool:models", {"gone": 2e9})
    wait_until(lambda: ask(api, model="gone").status == 529)
    away = ask(api, model="gone")
    error(away, 529, "overloaded_error")
    assert int(away.headers["retry-after"]) >= 1


def test_models(api: ApiPool) -> None:
    """In Anthropic's shape if its version header is sent, otherwise in OpenAI's."""
    listed = api.ask("GET", "/v1/models?limit=1", **VERSION).json
    assert set(listed) == {"data", "has_more", "first_id", "last_id"}
    one = api.ask("GET", f"/v1/models/{MODEL.replace(' ', '%20')}", **VERSION)
    assert one.json in api.ask("GET", "/v1/models?limit=1000", **VERSION).json["data"]
    assert (one.json["type"], one.json["id"], one.json["max_input_tokens"]) == ("model", MODEL, 4096)
    assert "anthropic-version" in one.headers["vary"].lower()
    assert api.ask("HEAD", "/v1/models", **VERSION).status == 200
    assert api.ask("GET", "/v1/models").json["object"] == "list"
    error(api.ask("GET", "/v1/models?limit=0", **VERSION), 400, "invalid_request_error")


def test_token_counts(api: ApiPool) -> None:
    """A number, for the body of a message; errors as there."""
    counted = ask(api, path=f"{PATH}/count_tokens", system="S", tools=TOOLS)
    assert counted.status == 200
    assert set(counted.json) == {"input_tokens"}
    assert counted.json["input_tokens"] > 0
    error(ask(api, path=f"{PATH}/count_tokens", messages=[]), 400, "invalid_request_error")
