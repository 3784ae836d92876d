"""Bodies of `/tokenize` and `/detokenize`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.openai.chat import request as chat_request
from api.openai.tokenize.request import TokenizeInput, parse_detokenize, parse_tokenize
from common.errors import RequestError
from common.protocol import ChatPrompt, TextPrompt

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def parsed(**body: Any) -> TokenizeInput:
    return parse_tokenize(json.dumps(body).encode())


def refusal(**body: Any) -> RequestError:
    with pytest.raises(RequestError) as raised:
        parsed(**body)
    return raised.value


def test_text() -> None:
    """Raw text, by default with the tokens that the tokenizer adds."""
    text = parsed(model="m", prompt="hi")
    assert (text.model, text.prompt, text.adds_special_tokens, text.returns_strings) == (
        "m",
        TextPrompt("hi"),
        True,
        False,
    )
    bare = parsed(prompt="hi", add_special_tokens=False, return_token_strs=True)
    assert (bare.adds_special_tokens, bare.returns_strings) == (False, True)


def test_messages_are_a_chat_request() -> None:
    """Messages, tools and template arguments become what the same chat request would send to the model."""
    body = {"messages": HI, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    chat = chat_request.parse(json.dumps(body).encode())
    tokens = parsed(**body, return_token_strs=True)
    assert (tokens.prompt, tokens.tool_use) == (chat.prompts[0], chat.tool_use)
    assert tokens.tool_use is not None


@pytest.mark.parametrize(
    ("flags", "opens_turn", "continues"),
    [
        ({}, True, False),
        ({"add_generation_prompt": True}, True, False),
        ({"add_generation_prompt": False}, False, False),
        ({"add_generation_prompt": False, "continue_final_message": True}, False, True),
        ({"continue_final_message": True}, False, True),
    ],
)
def test_the_end_of_a_chat(flags: dict[str, bool], opens_turn: bool, continues: bool) -> None:
    """The assistant's turn is opened, left out, or its last message is continued."""
    prompt = parsed(messages=[*HI, {"role": "assistant", "content": "Hel"}], **flags).prompt
    assert isinstance(prompt, ChatPrompt)
    assert (prompt.opens_turn, prompt.continue_final) == (opens_turn, continues)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "hi", "messages": HI}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": HI, "add_special_tokens": True}, "add_special_tokens"),
        (
            {"messages": HI, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
        ({"messages": HI, "chat_template": "{{ x }}"}, "chat_template"),
        ({"prompt": "hi", "return_token_strs": "yes"}, "return_token_strs"),
    ],
)
def test_what_is_refused(body: dict[str, Any], param: str) -> None:
    """A 400 that names the field."""
    error = refusal(**body)
    assert (error.status, error.param) == (400, param)


def test_messages_are_found_among_many_unknown_fields() -> None:
    """Only so many unknown fields are reported, but all are examined."""
    body = {f"unknown_{i}": 1 for i in range(100)} | {"messages": HI}
    assert isinstance(parsed(**body).prompt, ChatPrompt)


def test_unknown_fields_are_named() -> None:
    """Of both kinds of bodies, and of `/detokenize`."""
    assert parsed(prompt="hi", surprise=1).ignored == ["surprise"]
    assert parsed(messages=HI, surprise=1).ignored == ["surprise"]
    assert parse_detokenize(b'{"tokens": [1], "surprise": 1}')[1] == ["surprise"]


@pytest.mark.parametrize(
    ("tokens", "param"),
    [
        ("null", "tokens"),
        ("[-1]", "tokens[0]"),
        ('["a"]', "tokens[0]"),
        ("[1.5]", "tokens[0]"),
        ("[2147483648]", "tokens[0]"),
    ],
)
def test_tokens_are_token_ids(tokens: str, param: str) -> None:
    """Anything else is a 400 that names the field."""
    with pytest.raises(RequestError) as raised:
        parse_detokenize(f'{{"tokens": {tokens}}}'.encode())
    assert raised.value.param is not None
    assert raised.value.param.replace("[...]", "[0]") == param
