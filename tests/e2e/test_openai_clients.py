"""Unmodified clients against the complete pool: gunicorn, RQ, Redis and a worker with a real model."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from bench.harness.pool import Pool
from tests.conftest import missing

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
PROMPT = "The capital of France is"
NODE_CLIENT = Path(__file__).parent / "node"


def greedy(**options: Any) -> dict[str, Any]:
    return {"model": "demo", "temperature": 0, "max_tokens": 16} | options


@pytest.fixture
def client(pool: Pool) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{pool.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    """The openai SDK gets the right answer, with usage and finish reason."""
    answer = client.chat.completions.create(messages=QUESTION, **greedy())  # type: ignore[arg-type]
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (37, 8)


def test_chat_stream_equals_plain(client: openai.OpenAI) -> None:
    """The streamed text equals the non-streamed one; the role comes once, first; usage comes last, if requested."""
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(messages=QUESTION, **greedy(**options)))  # type: ignore[arg-type]
    assert [c.choices[0].delta.role for c in chunks if c.choices and c.choices[0].delta.role] == ["assistant"]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) > 3
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert len({c.id for c in chunks}) == 1


def test_completion(client: openai.OpenAI) -> None:
    """A legacy completion continues the prompt and keeps the leading space; streamed it is the same."""
    plain = client.completions.create(prompt=PROMPT, **greedy(max_tokens=5))
    streamed = client.completions.create(prompt=PROMPT, stream=True, **greedy(max_tokens=5))
    assert plain.choices[0].text == " Paris.\n\nThe"
    assert plain.choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].text for chunk in streamed) == plain.choices[0].text


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("Paris", "The capital of France is "),
        (["is P", "nothing"], "The capital of France "),
        ("The", ""),
        (" fr", ANSWER),
    ],
)
def test_stop_strings_are_never_emitted(client: openai.OpenAI, stop: Any, text: str) -> None:
    """A stop string ends the text before it, across tokens and at the first character; a partial match is emitted."""
    plain = client.chat.completions.create(messages=QUESTION, **greedy(stop=stop))  # type: ignore[arg-type]
    streamed = client.chat.completions.create(messages=QUESTION, stream=True, **greedy(stop=stop))  # type: ignore[arg-type]
    assert plain.choices[0].message.content == text
    assert plain.choices[0].finish_reason == "stop"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text


def test_logprobs_add_up_to_the_content(client: openai.OpenAI) -> None:
    """One item per token; together they are the content; the greedy token is the likeliest."""
    answer = client.chat.completions.create(messages=QUESTION, **greedy(logprobs=True, top_logprobs=3))  # type: ignore[arg-type]
    assert answer.choices[0].logprobs is not None
    items = answer.choices[0].logprobs.content or []
    assert "".join(item.token for item in items) == ANSWER
    assert b"".join(bytes(item.bytes or []) for item in items).decode() == ANSWER
    for item in items:
        assert item.top_logprobs[0].token == item.token
        assert item.logprob == pytest.approx(item.top_logprobs[0].logprob)
        assert len(item.top_logprobs) == 3


def test_seeds_repeat_next_to_others(client: openai.OpenAI, pool: Pool) -> None:
    """A seed repeats its text, alone and in a batch with other seeds; another seed gives another text."""

    async def ask(seeds: list[int]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{pool.url}/v1", api_key="none", max_retries=0) as asking:
            tasks = [
                asking.chat.completions.create(messages=QUESTION, **greedy(temperature=1.0, seed=seed))  # type: ignore[arg-type]
                for seed in seeds
            ]
            return [answer.choices[0].message.content or "" for answer in await asyncio.gather(*tasks)]

    alone = client.chat.completions.create(messages=QUESTION, **greedy(temperature=1.0, seed=7))  # type: ignore[arg-type]
    together = asyncio.run(ask([7, 8, 9, 7]))
    assert together[0] == together[3] == alone.choices[0].message.content
    assert len(set(together)) == 3


def test_greedy_requests_at_once_equal_one_after_another(client: openai.OpenAI, pool: Pool) -> None:
    """Other requests in the batch do not change a request's text (float32)."""
    questions = [[{"role": "user", "content": f"Count from {i} to {i + 5}."}] for i in range(6)]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{pool.url}/v1", api_key="none", max_retries=0) as asking:
            tasks = [asking.chat.completions.create(messages=q, **greedy()) for q in questions]  # type: ignore[arg-type]
            return [answer.choices[0].message.content or "" for answer in await asyncio.gather(*tasks)]

    one_by_one = [
        client.chat.completions.create(messages=q, **greedy()).choices[0].message.content for q in questions
    ]  # type: ignore[arg-type]
    assert asyncio.run(ask()) == one_by_one


def test_prompt_that_is_too_long_is_a_real_400(client: openai.OpenAI) -> None:
    """The worker's refusal is an HTTP status, also for a stream, not an error frame."""
    long = [{"role": "user", "content": "word " * 9000}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(messages=long, stream=stream, **greedy())  # type: ignore[call-overload]
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")


def test_curl(pool: Pool) -> None:
    """The command that `make up` prints works: frames, then [DONE]."""
    body = json.dumps(greedy(messages=QUESTION, stream=True))
    curl = [
        "curl",
        "-sN",
        f"{pool.url}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    output = subprocess.run(curl, capture_output=True, text=True, timeout=60, check=True).stdout
    frames = [line.removeprefix("data: ") for line in output.splitlines() if line.startswith("data: ")]
    assert frames[-1] == "[DONE]"
    deltas = [json.loads(frame)["choices"][0]["delta"].get("content", "") for frame in frames[:-1]]
    assert "".join(deltas) == ANSWER


def test_openai_for_node(pool: Pool) -> None:
    """The openai client for Node: chat and completion, streamed and not, an error, the list of models."""
    if not (shutil.which("node") and shutil.which("npm")):
        missing("node with npm")
    install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--prefix", str(NODE_CLIENT)]
    subprocess.run(install, check=True, capture_output=True, timeout=180)
    run = ["node", str(NODE_CLIENT / "client.mjs"), f"{pool.url}/v1", "demo"]
    answers = json.loads(subprocess.run(run, capture_output=True, text=True, timeout=120, check=True).stdout)
    assert answers["chat"] == answers["chatStream"] == ANSWER
    assert answers["chatFinishReason"] == "stop"
    assert answers["chatUsage"]["completion_tokens"] == 8
    assert answers["completion"] == answers["completionStream"]
    assert answers["completion"].startswith(" Paris.")
    assert answers["unknownModel"] == {"status": 404, "code": "model_not_found", "param": "model"}
    assert answers["models"] == ["demo"]
