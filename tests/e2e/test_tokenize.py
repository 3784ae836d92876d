"""`/tokenize` and `/detokenize` of a complete pool, with the demo model."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from bench.harness.pool import Pool

HI = [{"role": "user", "content": "Where is Paris?"}]


def post(pool: Pool, path: str, **body: Any) -> Any:
    """The response's JSON object; an error's too, with its status."""
    response = httpx2.post(pool.url + path, json=body, timeout=40)
    answer = response.json()
    return answer if response.is_success else answer["error"] | {"status": response.status_code}


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_text_to_tokens_and_back(pool: Pool, prefix: str) -> None:
    """The tokens of a text, with their strings, give the text again."""
    text = "The capital of France is Paris; naïve 🙂."
    tokens = post(pool, f"{prefix}/tokenize", model="demo", prompt=text, return_token_strs=True)
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"]) > 8
    assert (tokens["max_model_len"], tokens["token_strs"][0]) == (8192, "The")
    assert post(pool, f"{prefix}/detokenize", model="demo", tokens=tokens["tokens"]) == {"prompt": text}
    assert post(pool, f"{prefix}/tokenize", prompt=text)["token_strs"] is None


def test_the_count_of_a_chat_is_its_usage(pool: Pool) -> None:
    """Messages and tools take as many tokens as the same chat request does; and the text is the template's."""
    tool = {"type": "function", "function": {"name": "locate", "description": "Finds a city."}}
    for more in ({}, {"tools": [tool]}):
        body = {"model": "demo", "messages": HI, **more}
        answer = post(pool, "/v1/chat/completions", **body, max_tokens=1)
        tokens = post(pool, "/tokenize", **body)
        assert tokens["count"] == answer["usage"]["prompt_tokens"]
    text = post(pool, "/detokenize", tokens=post(pool, "/tokenize", messages=HI)["tokens"])["prompt"]
    assert text.endswith("<|im_start|>user\nWhere is Paris?<|im_end|>\n<|im_start|>assistant\n")
    bare = post(pool, "/tokenize", messages=HI, add_generation_prompt=False)
    assert post(pool, "/detokenize", tokens=bare["tokens"])["prompt"].endswith("Paris?<|im_end|>\n")


def test_longer_than_the_context(pool: Pool) -> None:
    """A prompt that is too long to be answered is counted all the same: its client learns by how much."""
    tokens = post(pool, "/tokenize", prompt="one two three " * 4000)
    assert tokens["count"] > tokens["max_model_len"]


def test_what_cannot_be_tokenized(pool: Pool) -> None:
    """Errors of the API and of the worker name the field."""
    unknown = post(pool, "/tokenize", model="nothing", prompt="x")
    assert (unknown["status"], unknown["code"]) == (404, "model_not_found")
    outside = post(pool, "/detokenize", tokens=[10**6])
    assert (outside["status"], outside["param"]) == (400, "tokens")
    assert post(pool, "/detokenize", tokens=[]) == {"prompt": ""}
    assert post(pool, "/tokenize", prompt="", add_special_tokens=False)["count"] == 0
