"""Several choices per request and echoed prompts: the openai SDK against a worker with a real model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from bench.harness.pool import Pool

QUESTION: Any = [{"role": "user", "content": "Name an animal."}]


@pytest.fixture
def client(pool: Pool) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{pool.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def options(**more: Any) -> dict[str, Any]:
    return {"model": "demo", "temperature": 1.0, "seed": 3, "max_tokens": 8} | more


def test_choices(client: openai.OpenAI) -> None:
    """n choices, in order and different; the first equals a single choice; a seed repeats them all."""
    answers = [client.chat.completions.create(messages=QUESTION, **options(n=n)) for n in (1, 4, 4)]
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[1] == texts[2]
    assert texts[1][0] == texts[0][0]
    assert len(set(texts[1])) == 4
    assert [choice.index for choice in answers[1].choices] == [0, 1, 2, 3]
    one, four = answers[0].usage, answers[1].usage
    assert one is not None
    assert four is not None
    assert four.prompt_tokens == one.prompt_tokens
    assert four.completion_tokens > one.completion_tokens
    assert four.total_tokens == four.prompt_tokens + four.completion_tokens


def test_choices_are_streamed_by_index(client: openai.OpenAI) -> None:
    """Chunks of several choices are interleaved; each choice equals the non-streamed one and ends once."""
    plain = client.chat.completions.create(messages=QUESTION, **options(n=3))
    chunks = list(
        client.chat.completions.create(
            messages=QUESTION, stream=True, stream_options={"include_usage": True}, **options(n=3)
        )
    )
    texts, roles, reasons = ["", "", ""], [0, 0, 0], [0, 0, 0]
    for choice in (chunk.choices[0] for chunk in chunks if chunk.choices):
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role is not None
        reasons[choice.index] += choice.finish_reason is not None
    assert texts == [choice.message.content for choice in plain.choices]
    assert roles == reasons == [1, 1, 1]
    assert chunks[-1].usage is not None
    assert plain.usage is not None
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens


def test_prompts_of_every_form(client: openai.OpenAI) -> None:
    """Each text or list of token ids in a list is answered at its index, as it is alone."""
    texts = ["The capital of France is", "One, two, three,"]
    greedy = options(temperature=0, max_tokens=5)
    alone = [client.completions.create(prompt=text, **greedy).choices[0].text for text in texts]
    together = client.completions.create(prompt=texts, n=2, **greedy)
    assert [choice.text for choice in together.choices] == [alone[0]] * 2 + [alone[1]] * 2
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    by_ids = client.completions.create(prompt=[[504, 3575, 282, 4649, 314], [4041, 28]], **greedy)
    assert by_ids.choices[0].text == alone[0]
    streamed = client.completions.create(prompt=texts, stream=True, **greedy)
    parts = ["", ""]
    for chunk in streamed:
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == alone


def test_the_best_of_several(client: openai.OpenAI) -> None:
    """The returned choice has the highest mean log-probability of all generated ones, which usage counts."""
    wide = options(temperature=1.5, max_tokens=6)
    best = client.completions.create(prompt="The sea is", best_of=5, **wide)
    every = client.completions.create(prompt="The sea is", n=5, logprobs=0, **wide)

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    assert best.choices[0].text == max(every.choices, key=mean).text
    assert len(best.choices) == 1
    assert best.usage is not None
    assert best.usage.completion_tokens == 30


def test_an_echo_with_log_probabilities(client: openai.OpenAI) -> None:
    """With max_tokens 0: the prompt, its tokens and their log-probabilities; streamed it is the same."""
    asked: Any = options(prompt="The capital of France is Paris.", echo=True, logprobs=2, max_tokens=0)
    plain = client.completions.create(**asked).choices[0]
    assert plain.text == "The capital of France is Paris."
    assert plain.logprobs is not None
    tokens, numbers = plain.logprobs.tokens or [], plain.logprobs.token_logprobs or []
    assert "".join(tokens) == plain.text
    assert numbers[0] is None
    assert all(number < 0 for number in numbers[1:])
    assert max(numbers[1:]) == numbers[tokens.index(" Paris")]  # it knows
    assert plain.finish_reason == "length"
    chunks = list(client.completions.create(stream=True, **asked))
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.text
    more = client.completions.create(**(asked | {"max_tokens": 4, "logprobs": None}))
    assert more.choices[0].text.startswith(plain.text)
    assert more.usage is not None
    assert more.usage.completion_tokens == 4


def test_penalties(client: openai.OpenAI) -> None:
    """A positive penalty ends a repetition; a negative one starts it."""
    prompt = "one two one two one two one two"
    greedy = options(temperature=0, max_tokens=12)
    free = client.completions.create(prompt=prompt, **greedy).choices[0].text
    penalized = client.completions.create(prompt=prompt, frequency_penalty=2, **greedy).choices[0].text
    rewarded = client.completions.create(prompt=prompt, presence_penalty=-2, **greedy).choices[0].text
    assert free.count("two") > penalized.count("two")
    assert len(set(rewarded.split())) <= len(set(free.split()))
