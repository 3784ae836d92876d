"""The openai SDK against gunicorn, Redis and a scripted worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from common.protocol import Delta, Event, Failed, Finished, GenerationJob, Started, TokenPrompt, Usage
from tests.e2e.api_pool import HI, MODEL, ApiPool, api_pool
from tests.fake_worker import PROMPT_TOKENS, WORDS, words

TEXT = "".join(WORDS)


@pytest.fixture(scope="module")
def running() -> Iterator[ApiPool]:
    with api_pool() as pool:
        yield pool


@pytest.fixture
def api(running: ApiPool) -> ApiPool:
    running.follow(words)
    return running


@pytest.fixture
def client(api: ApiPool) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=api.url, api_key="none", max_retries=0, timeout=20) as client:
        yield client


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(messages=HI, **({"model": MODEL} | options))  # type: ignore[call-overload]


def test_chat(client: openai.OpenAI) -> None:
    """Text, usage, finish reason, and the model name of the request."""
    answer = chat(client)
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", MODEL, "chatcmpl-")
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert choice.logprobs is None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (PROMPT_TOKENS, len(WORDS))
    assert usage.total_tokens == PROMPT_TOKENS + len(WORDS)
    assert usage.prompt_tokens_details.cached_tokens == 2
    assert answer.system_fingerprint.startswith("fp_")


def test_chat_stream(client: openai.OpenAI) -> None:
    """The same text as without streaming, in chunks of one id; the role only in the first, usage in the last."""
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    *rest, last = chunks
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert [c.choices[0].delta.role for c in rest] == ["assistant"] + [None] * (len(rest) - 1)
    assert [c.choices[0].delta.content for c in rest[1:-1]] == WORDS
    assert [c.choices[0].finish_reason for c in rest] == [None] * (len(rest) - 1) + ["stop"]
    assert all(c.usage is None for c in rest)
    assert (last.choices, last.usage.completion_tokens) == ([], len(WORDS))


def test_max_tokens(client: openai.OpenAI) -> None:
    """Both names of the limit reach the worker; the finish reason is `length`."""
    for options in ({"max_tokens": 2}, {"max_completion_tokens": 2}):
        answer = chat(client, **options)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (
            "Hello there",
            "length",
        )


def test_chat_logprobs(client: openai.OpenAI) -> None:
    """Streamed and not: one item per token; together they are the text."""
    plain = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    streamed = [
        item
        for chunk in chat(client, logprobs=True, top_logprobs=2, stream=True)
        if chunk.choices[0].logprobs
        for item in chunk.choices[0].logprobs.content
    ]
    assert streamed == plain
    assert "".join(item.token for item in plain) == TEXT
    assert bytes(byte for item in plain for byte in item.bytes) == TEXT.encode()
    assert all(len(item.top_logprobs) == 2 for item in plain)


def test_completion(client: openai.OpenAI, api: ApiPool) -> None:
    """Legacy completions, streamed and not, of text and token ids, with OpenAI's default of 16 tokens."""
    answer = client.completions.create(model=MODEL, prompt=[1, 2, 3], logprobs=1)
    assert (answer.object, answer.id[:5], answer.choices[0].text) == ("text_completion", "cmpl-", TEXT)
    logprobs: Any = answer.choices[0].logprobs
    assert logprobs.tokens == WORDS
    assert logprobs.text_offset == [0, 5, 11, 12, 16, 17]
    assert (api.worker.jobs[0].prompt, api.worker.jobs[0].max_tokens) == (TokenPrompt([1, 2, 3]), 16)
    chunks = list(client.completions.create(model=MODEL, prompt="hi", stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == [*WORDS, ""]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_models(client: openai.OpenAI) -> None:
    """Models are listed and retrieved, with a slash in the id; an unknown one is the SDK's NotFoundError."""
    [model] = client.models.list()
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "mlx-pool")
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("org/other")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


def test_errors_have_the_sdks_classes(client: openai.OpenAI, api: ApiPool) -> None:
    """A bad value is a BadRequestError, an unknown model a NotFoundError; neither reaches the worker."""
    with pytest.raises(openai.BadRequestError) as bad:
        chat(client, temperature=3)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as unknown:
        chat(client, model="unknown")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert api.worker.jobs == []


def too_long(_job: GenerationJob) -> Iterator[Event | float]:
    yield 0.05
    yield Failed(
        1,
        "too long",
        status=400,
        kind="invalid_request_error",
        param="messages",
        code="context_length_exceeded",
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_by_the_worker_is_a_status(client: openai.OpenAI, api: ApiPool, stream: bool) -> None:
    """A prompt that is too long is a 400, streamed or not: the headers wait for the first event."""
    api.follow(too_long)
    with pytest.raises(openai.BadRequestError) as raised:
        chat(client, stream=stream)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "messages")


def breaks(_job: GenerationJob) -> Iterator[Event | float]:
    yield Started(0, 5)
    yield Delta(1, 1, "Hel")
    yield 0.1
    yield Failed(2, "broke", status=500, code="broken")


def test_a_failure_in_the_middle(client: openai.OpenAI, api: ApiPool) -> None:
    """A stream has the text so far, then an error that the SDK raises; a request that is not streamed is a 500."""
    api.follow(breaks)
    got = []
    with pytest.raises(openai.APIError) as raised:
        got += [chunk.choices[0].delta.content for chunk in chat(client, stream=True)]
    assert raised.value.code == "broken"
    stream = chat(client, stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "Hel"]
    stream.close()
    with pytest.raises(openai.InternalServerError) as plain:
        chat(client)
    assert (plain.value.status_code, plain.value.code) == (500, "broken")
    assert plain.value.response.headers["x-should-retry"] == "false"


def cancelled(_job: GenerationJob) -> Iterator[Event | float]:
    yield Started(0, 5)
    yield Finished(1, "cancelled", Usage(5, 0))


def test_a_cancelled_response_is_an_error(client: openai.OpenAI, api: ApiPool) -> None:
    """OpenAI has no finish reason for it, and an incomplete response must not look complete."""
    api.follow(cancelled)
    with pytest.raises(openai.InternalServerError) as plain:
        chat(client)
    assert (plain.value.status_code, plain.value.code) == (503, "cancelled")
    with pytest.raises(openai.APIError) as streamed:
        list(chat(client, stream=True))
    assert streamed.value.code == "cancelled"


def test_concurrent_streams(client: openai.OpenAI, api: ApiPool) -> None:
    """Tokens of concurrent streams do not mix."""

    def numbered(job: GenerationJob) -> Iterator[Event | float]:
        return words(job, [f"{job.sampling.seed} "] * 20, pause=0.002)

    api.follow(numbered)
    streams = [chat(client, stream=True, seed=seed) for seed in range(12)]
    for seed, stream in enumerate(streams):
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == f"{seed} " * 20
