"""The operator's arguments of the chat template."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import StartupError
from common.protocol import ChatPrompt, TextPrompt
from worker.text.template_defaults import parse, with_defaults


@pytest.mark.parametrize(
    ("own", "arguments"),
    [
        ({}, {"enable_thinking": False, "x": 1}),
        ({"x": 2}, {"enable_thinking": False, "x": 2}),
        ({"enable_thinking": True}, {"enable_thinking": True, "x": 1}),
        ({"thinking": True}, {"thinking": True, "x": 1}),
    ],
)
def test_a_request_comes_first(own: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Also if it uses the other name of the same argument."""
    prompt = with_defaults(ChatPrompt([], template_arguments=own), {"enable_thinking": False, "x": 1})
    assert isinstance(prompt, ChatPrompt)
    assert prompt.template_arguments == arguments


def test_other_prompts() -> None:
    """Raw text has no template."""
    assert with_defaults(TextPrompt("x"), {"x": 1}) == TextPrompt("x")


def test_parse() -> None:
    """A JSON object, or nothing."""
    assert parse(None) == {}
    assert parse('{"enable_thinking": false}') == {"enable_thinking": False}


@pytest.mark.parametrize("text", ["", "x", "[]", "{'a': 1}", "[" * 5000, "\ud800"])
def test_what_is_refused(text: str) -> None:
    """One sentence that names the flag."""
    with pytest.raises(StartupError, match="--chat-template-args must be a JSON object"):
        parse(text)


@pytest.mark.parametrize("name", ["messages", "tokenize", "tools", "chat_template"])
def test_names_that_are_not_arguments_of_templates(name: str) -> None:
    """The worker would start, and every chat would fail."""
    with pytest.raises(StartupError, match=f"--chat-template-args must not set {name}"):
        parse(f'{{"enable_thinking": false, "{name}": 1}}')
