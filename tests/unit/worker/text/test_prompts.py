"""Prompts to token ids, with a tokenizer that records its input."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import RequestError
from common.protocol import ChatPrompt, GenerationJob, TextPrompt, TokenPrompt
from worker.text.prompts import max_prompt_chars, tokenize


class Tokenizer:
    """One token per character; the template renders roles and contents."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    chat_template = "a template"

    def __init__(self, *, has_chat_template: bool = True, error: Exception | None = None) -> None:
        self.has_chat_template = has_chat_template
        self._error = error
        self.num_encoded_chars = 0
        self.num_rendered = 0

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "four": 1, "the": 2}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.num_encoded_chars += len(text)
        return [ord(char) for char in text]

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, tokenize: bool
    ) -> str:
        assert add_generation_prompt
        assert not tokenize
        self.num_rendered += 1
        if self._error is not None:
            raise self._error
        return "".join(f"{m['role']}:{m['content']};" for m in messages)


def read(
    prompt: ChatPrompt | TextPrompt | TokenPrompt, tokenizer: Any = None, context_length: int = 100
) -> list[int]:
    job = GenerationJob(job_id="a", model="m", channel="c", prompt=prompt)
    return tokenize(job, tokenizer or Tokenizer(), context_length)


def text(ids: list[int]) -> str:
    return "".join(map(chr, ids))


HELLO = [{"role": "user", "content": "hi"}]


def test_chat_template() -> None:
    """Messages are rendered by the model's template."""
    assert text(read(ChatPrompt(HELLO))) == "user:hi;"


def test_role_mapping() -> None:
    """Without a template, each message gets the prefix of its role: the request's, or those of mlx_lm.server."""
    base = Tokenizer(has_chat_template=False)
    assert text(read(ChatPrompt(HELLO), base)) == "USER: hi\nASSISTANT:"
    mapping = {"user": "Q: ", "assistant": "A: ", "stop": " | "}
    assert text(read(ChatPrompt(HELLO, mapping), base)) == "Q: hi | A:"


def test_token_ids_and_text_are_unchanged() -> None:
    """A plain prompt is not changed."""
    assert read(TokenPrompt([5, 6])) == [5, 6]
    assert text(read(TextPrompt(" x "))) == " x "


def test_an_empty_prompt_begins_a_document() -> None:
    """As in OpenAI's API: it becomes the beginning-of-text token, or the end-of-text token, or is refused."""
    tokenizer = Tokenizer()
    assert read(TextPrompt(""), tokenizer) == [1]
    tokenizer.bos_token_id = None
    assert read(TextPrompt(""), tokenizer) == [2]
    tokenizer.eos_token_id = None
    with pytest.raises(RequestError) as refused:
        read(TextPrompt(""), tokenizer)
    assert (refused.value.status, refused.value.param) == (400, "prompt")


@pytest.mark.parametrize(
    ("prompt", "param"),
    [(TextPrompt("x" * 100), "prompt"), (ChatPrompt([{"role": "user", "content": "x" * 99}]), "messages")],
)
def test_a_prompt_that_is_too_long(prompt: Any, param: str) -> None:
    """A prompt as long as the context is a 400 that names the parameter."""
    with pytest.raises(RequestError) as refused:
        read(prompt)
    assert (refused.value.status, refused.value.code, refused.value.param) == (
        400,
        "context_length_exceeded",
        param,
    )
    assert len(read(TextPrompt("x" * 99))) == 99


def test_a_template_that_raises() -> None:
    """It is a 400 with the template's message."""
    with pytest.raises(RequestError) as refused:
        read(ChatPrompt(HELLO), Tokenizer(error=ValueError("roles must alternate")))
    assert (refused.value.status, refused.value.param) == (400, "messages")
    assert "roles must alternate" in refused.value.message


@pytest.mark.parametrize(
    ("prompt", "param", "num_rendered"),
    [
        (TextPrompt("x" * 41), "prompt", 0),
        (TextPrompt("x" * 40, "y"), "prompt", 0),
        (ChatPrompt([{"role": "user", "content": "x" * 41}]), "messages", 0),
        (ChatPrompt([{"role": "user", "content": "x" * 40}]), "messages", 2),  # too long once it is rendered
    ],
)
def test_text_that_cannot_fit_is_not_tokenized(
    prompt: ChatPrompt | TextPrompt, param: str, num_rendered: int
) -> None:
    """Ten tokens of at most four characters cover 40 characters: a longer text is refused without the work of tokenizing it."""
    tokenizer = Tokenizer()
    max_chars = max_prompt_chars(tokenizer, 10)
    assert max_chars == 40
    job = GenerationJob(job_id="a", model="m", channel="c", prompt=prompt)
    with pytest.raises(RequestError) as refused:
        tokenize(job, tokenizer, 10, max_chars=max_chars)
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    assert refused.value.param == param
    assert (tokenizer.num_encoded_chars, tokenizer.num_rendered) == (0, num_rendered)


def test_prefixes_of_roles_are_counted_before_they_are_repeated() -> None:
    """A role mapping with long prefixes is refused by the length of all prefixes together."""
    messages = [{"role": "user", "content": ""}] * 9
    prompt = ChatPrompt(messages, {"user": "x" * 5, "stop": ""})
    job = GenerationJob(job_id="a", model="m", channel="c", prompt=prompt)
    tokenizer = Tokenizer(has_chat_template=False)
    with pytest.raises(RequestError, match="your prompt has 45 characters"):
        tokenize(job, tokenizer, 10, max_chars=max_prompt_chars(tokenizer, 10))
    assert tokenizer.num_encoded_chars == 0
