"""An answer is a function of its request's record and its jobs' journals: another process renders the same bytes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.http import sse
from common.protocol import (
    Delta,
    Echo,
    Event,
    Failed,
    Finished,
    GenerationJob,
    Reasoning,
    Started,
    TokenLogprob,
    ToolArguments,
    ToolCall,
    Usage,
)
from tests.e2e.api_pool import HI, MODEL, ApiPool, api_pool, words

_NO_CHOICE = 1000  # sorts last, as the token counts and the end of a stream do

ROOT = Path(__file__).resolve().parent.parent.parent.parent
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOOLS = [{"type": "function", "function": {"name": "f"}}]
SCHEMA = {"name": "a", "schema": {"type": "object"}}


@pytest.fixture(scope="module")
def api() -> Iterator[ApiPool]:
    """Two API processes, either of which may answer; comments are sent in every pause."""
    with api_pool({"MLXPOOL_SSE_COMMENT_SECONDS": "0.5"}, num_processes=2) as pool:
        yield pool


def spoken(job: GenerationJob) -> Iterator[Event | float]:
    """Text that differs from choice to choice, some of it held back, with a pause."""
    yield from words(job, [" a", "", f"é {job.sampling.seed % 7}", "", " end"], pause=0.01)


def slow(job: GenerationJob) -> Iterator[Event | float]:
    """With a pause that is long enough for a comment."""
    yield from words(job, [" a", " b"], pause=1.6)


def called(_job: GenerationJob) -> Iterator[Event | float]:
    """Reasoning, text and two calls."""
    yield Started(0, 5)
    yield Delta(1, 1, pieces=[Reasoning("hm")])
    yield Delta(2, 2, "Look", TokenLogprob(2, -0.5, b"Look"))
    yield Delta(3, 3, pieces=[ToolCall(0, "f")])
    yield Delta(4, 4, "", pieces=[ToolArguments(0, '{"a":1}'), ToolCall(1, "f"), ToolArguments(1, "{}")])
    yield Finished(5, "tool_calls", Usage(5, 4, 1, 1))


def echoed(job: GenerationJob) -> Iterator[Event | float]:
    """The prompt first."""
    own = [TokenLogprob(1, 0.0, b"say"), TokenLogprob(2, -1.0, b" this")]
    yield Started(0, 2)
    yield Echo(1, "say this", own, [[], [TokenLogprob(3, -0.5, b" that")]])
    yield Delta(2, 7, "!", TokenLogprob(7, -0.25 - job.sampling.seed % 5, b"!"))
    yield Finished(3, "length", Usage(2, 1))


def broken(_job: GenerationJob) -> Iterator[Event | float]:
    """An error after a token, late enough that the stream has begun."""
    yield Started(0, 2)
    yield Delta(1, 7, "a")
    yield 0.5
    yield Failed(2, "It broke.", code="broken")


CASES: list[tuple[str, Any, dict[str, Any]]] = [
    (CHAT, spoken, {"messages": HI}),
    (CHAT, spoken, {"messages": HI, "service_tier": "auto", "model": "default_model"}),
    (CHAT, spoken, {"messages": HI, "n": 2}),
    (CHAT, spoken, {"messages": HI, "n": 2, "logprobs": True, "top_logprobs": 2}),
    (CHAT, slow, {"messages": HI}),
    (CHAT, called, {"messages": HI, "tools": TOOLS, "logprobs": True}),
    (CHAT, called, {"messages": HI, "tools": TOOLS, "n": 2}),
    (CHAT, called, {"messages": HI, "functions": [{"name": "f"}]}),
    (CHAT, spoken, {"messages": HI, "response_format": {"type": "json_schema", "json_schema": SCHEMA}}),
    (COMPLETIONS, spoken, {"prompt": "x"}),
    (COMPLETIONS, spoken, {"prompt": ["x", "y"], "n": 2, "logprobs": 3}),
    (COMPLETIONS, echoed, {"prompt": ["x", "y"], "n": 2, "echo": True, "logprobs": 1}),
]
ONLY_COMPLETE: list[tuple[str, Any, dict[str, Any]]] = [
    (COMPLETIONS, echoed, {"prompt": ["x", "y"], "n": 2, "best_of": 4, "logprobs": 1}),
    (COMPLETIONS, spoken, {"prompt": "x", "best_of": 3}),
]
ONLY_STREAMED: list[tuple[str, Any, dict[str, Any]]] = [
    (CHAT, spoken, {"messages": HI, "n": 2, "stream_options": {"include_usage": True}}),
    (COMPLETIONS, spoken, {"prompt": ["x", "y"], "stream_options": {"include_usage": True}}),
    (CHAT, broken, {"messages": HI}),
]
REQUESTS = [
    *((*case, stream) for case in CASES for stream in (False, True)),
    *((*case, False) for case in ONLY_COMPLETE),
    *((*case, True) for case in ONLY_STREAMED),
]


@pytest.mark.parametrize(
    ("path", "script", "fields", "stream"),
    REQUESTS,
    ids=[
        f"{i}-{script.__name__}-{'stream' if stream else 'object'}"
        for i, (_, script, _, stream) in enumerate(REQUESTS)
    ],
)
def test_another_process_renders_the_same_bytes(
    api: ApiPool, path: str, script: Any, fields: dict[str, Any], stream: bool
) -> None:
    """Ids and times included, from Redis alone; comments are not part of an answer."""
    api.follow(script)
    body = json.dumps({"model": MODEL, "stream": stream} | fields).encode()
    response = api.ask("POST", path, body, content_type="application/json")
    assert response.status == 200
    received = re.sub(rb"(?m)^id: .*\n", b"", response.body).replace(sse.KEEP_ALIVE, b"")
    if script is slow and stream:
        assert sse.KEEP_ALIVE in response.body
    again = rendered_again(api, received)
    if stream and len({_index(frame) for frame in received.split(sse.END)} - {_NO_CHOICE}) > 1:
        received = in_order_of_choices(received)
        again = in_order_of_choices(again)
    assert again == received


def rendered_again(api: ApiPool, received: bytes) -> bytes:
    found = re.search(rb'"id":"(?:chatcmpl|cmpl)-([0-9a-f]{30})"', received)
    assert found is not None
    command = [sys.executable, "-m", "tests.e2e.rendered_again", api.pool.redis_url, found[1].decode()]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout


def in_order_of_choices(stream: bytes) -> bytes:
    """The frames, those of one choice after those of another: how they interleave is the order of their arrival."""
    frames = stream.split(sse.END)
    return sse.END.join(sorted(frames, key=_index))


def _index(frame: bytes) -> int:
    found = re.search(rb'"choices":\[\{"index":(\d+)', frame)
    return int(found[1]) if found else _NO_CHOICE
