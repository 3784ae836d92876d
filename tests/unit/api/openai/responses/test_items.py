"""The items of a request become the messages of a chat."""

from __future__ import annotations

from typing import Any

import pytest

from api.openai.responses.thoughts import encode_thoughts
from tests.unit.api.openai.responses.requests import messages, parse, refused

USER = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def said(text: str) -> dict[str, Any]:
    """An answer as this API writes it."""
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [part]}


def test_a_string_is_a_message_of_the_user() -> None:
    """The shortest request; the instructions come first."""
    [prompt] = parse(input="hi", instructions="Be brief.").prompts
    assert prompt.messages == [{"role": "system", "content": "Be brief."}, USER]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hi", "hi"),
        (None, ""),
        ([], ""),
        ([{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}], "ab"),
        ([{"type": "text", "text": "a"}, "b"], "ab"),
        ([{"type": "output_text", "text": "a", "annotations": []}], "a"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        ({"type": "input_text", "text": "a"}, "a"),
    ],
)
def test_contents(content: Any, text: str) -> None:
    """A string or parts, also those that are empty or absent."""
    assert messages({"role": "user", "content": content}) == [{"role": "user", "content": text}]


def test_roles_in_any_order() -> None:
    """`developer` is `system`; the order stays, templates are adapted by workers."""
    roles = ["user", "developer", "user", "system", "user"]
    given = [{"type": "message", "role": role, "content": "x", "id": "i"} for role in roles]
    assert [m["role"] for m in messages(*given)] == ["user", "system", "user", "system", "user"]


def test_a_turn_is_one_message() -> None:
    """Thoughts, text and calls of one turn; the result follows with the function's name."""
    thoughts = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "hm"}],
    }
    result = {"type": "function_call_output", "call_id": "c1", "output": "2"}
    assert messages(USER, thoughts, said("Wait."), CALL, CALL | {"call_id": "c2"}, result, said("Two.")) == [
        USER,
        {
            "role": "assistant",
            "content": "Wait.",
            "reasoning_content": "hm",
            "tool_calls": [CALLED, CALLED | {"id": "c2"}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "f"},
        {"role": "assistant", "content": "Two."},
    ]


def test_turns_of_the_assistant_stay_apart() -> None:
    """A text after a text, and thoughts after a call, begin a new message."""
    thoughts = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
    assert [sorted(m) for m in messages(said("a"), said("b"), CALL, thoughts, said("c"))] == [
        ["content", "role"],
        ["content", "role", "tool_calls"],
        ["content", "reasoning_content", "role"],
    ]


@pytest.mark.parametrize(
    ("fields", "thoughts", "ignored"),
    [
        ({"summary": [], "encrypted_content": encode_thoughts("a\né")}, "a\né", []),
        (
            {"summary": [{"type": "summary_text", "text": "a"}, {"type": "summary_text", "text": "b"}]},
            "a\n\nb",
            [],
        ),
        ({"summary": [], "content": [{"type": "reasoning_text", "text": "a"}]}, "a", []),
        (
            {"summary": [{"type": "summary_text", "text": "a"}], "encrypted_content": "gAAAA"},
            "a",
            ["input[0].encrypted_content"],
        ),
        ({"summary": [], "encrypted_content": "mlxpool1.%"}, None, ["input[0].encrypted_content"]),
    ],
)
def test_thoughts(fields: dict[str, Any], thoughts: str | None, ignored: list[str]) -> None:
    """Our own encoded ones, else the text, else the summary; what another server encrypted is named."""
    request = parse(input=[{"type": "reasoning", "id": "rs_1"} | fields, said("x")])
    [prompt] = request.prompts
    [turn] = prompt.messages  # type: ignore[union-attr]
    assert turn.get("reasoning_content") == thoughts
    assert request.ignored == ignored


def test_outputs() -> None:
    """A string, parts, nothing; an image of a tool is replaced by a note and named, since the session has to go on."""
    image = {"type": "input_image", "image_url": "data:…"}
    outputs = ["a", [{"type": "input_text", "text": "b"}, image], [], None, {"content": "c"}]
    items = [{"type": "function_call_output", "call_id": "c1", "output": output} for output in outputs]
    request = parse(input=[CALL, *items])
    [prompt] = request.prompts
    texts = [m["content"] for m in prompt.messages[1:]]  # type: ignore[union-attr]
    assert texts == ["a", "b[an image, which this model cannot read]", "", "", '{"content":"c"}']
    assert request.ignored == ["input[2].output[1]"]


def test_custom_calls() -> None:
    """A custom tool's call is one of the function that stands for it."""
    call = {
        "type": "custom_tool_call",
        "id": "ctc_1",
        "call_id": "c1",
        "name": "run",
        "input": 'print("x")\n',
    }
    result = {"type": "custom_tool_call_output", "call_id": "c1", "output": "x"}
    turn, output = messages(call, result)
    assert turn["tool_calls"][0]["function"] == {"name": "run", "arguments": {"input": 'print("x")\n'}}
    assert (output["name"], output["content"]) == ("run", "x")


def test_calls_in_a_namespace() -> None:
    """They have the name by which the model knows the function."""
    [turn] = messages(CALL | {"namespace": "mcp__files__"})
    assert turn["tool_calls"][0]["function"]["name"] == "mcp__files__f"


def test_a_result_without_an_id_belongs_to_the_last_call() -> None:
    """OpenAI's description lets the id be absent."""
    output = messages(CALL, {"type": "function_call_output", "output": "x", "name": "f"})[1]
    assert (output["tool_call_id"], output["name"]) == ("c1", "f")
    error = refused(input=[{"type": "function_call_output", "output": "x"}])
    assert error.param == "input[0].call_id"


def test_items_of_built_in_tools() -> None:
    """What was asked and what came back is kept as calls and results; the rest is skipped and named."""
    items = [
        USER,
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}},
        {
            "type": "local_shell_call",
            "id": "l",
            "call_id": "c1",
            "action": {"command": ["ls"]},
            "status": "completed",
        },
        {"type": "local_shell_call_output", "id": "c1", "output": "a b"},
        {
            "type": "mcp_call",
            "id": "m1",
            "name": "find",
            "server_label": "s",
            "arguments": '{"q": 1}',
            "output": "r",
        },
        {"type": "compaction", "encrypted_content": "x"},
        {"type": "something_new", "id": "n1"},
    ]
    request = parse(input=items)
    [prompt] = request.prompts
    assert [(m["role"], m["content"]) for m in prompt.messages] == [  # type: ignore[union-attr]
        ("user", "hi"),
        ("assistant", ""),
        ("tool", "a b"),
        ("assistant", ""),
        ("tool", "r"),
    ]
    calls = [m["tool_calls"][0]["function"] for m in prompt.messages if "tool_calls" in m]  # type: ignore[union-attr]
    assert calls == [
        {"name": "local_shell", "arguments": {"command": ["ls"]}},
        {"name": "find", "arguments": {"q": 1}},
    ]
    assert request.ignored == ["input[1]", "input[5]", "input[6]"]


def test_unknown_keys_of_items_are_named() -> None:
    """With their path; those that clients send back with an answer are known."""
    assert parse(input=[USER | {"cache_control": {}}, said("x")]).ignored == ["input[0].cache_control"]


@pytest.mark.parametrize(
    "used",
    [
        {},
        {"content": [{"type": "reasoning_text", "text": "a", "zzz": 1}]},
        {"encrypted_content": encode_thoughts("a")},
    ],
)
def test_unknown_keys_of_thoughts_are_named(used: dict[str, Any]) -> None:
    """Also in the form that is not used, since another one takes precedence."""
    summary = [{"type": "summary_text", "text": "a"}, {"type": "summary_text", "text": "b", "zzz": 1}]
    request = parse(input=[{"type": "reasoning", "summary": summary} | used, said("x")])
    expected = ["input[0].summary[1].zzz", *(["input[0].content[0].zzz"] if "content" in used else [])]
    assert sorted(request.ignored, reverse=True) == expected


def test_unknown_keys_of_built_in_items_are_named() -> None:
    """Not those of OpenAI's items, nor what the model gets as free JSON."""
    shell = {
        "type": "shell_call",
        "id": "s",
        "call_id": "c1",
        "action": {"commands": ["ls"], "zzz": 1},
        "status": "completed",
        "environment": None,
    }
    output = {
        "type": "shell_call_output",
        "id": "o",
        "call_id": "c1",
        "output": [{"stdout": "a"}],
        "max_output_length": 9,
    }
    tools = {"type": "additional_tools", "role": "developer", "tools": []}
    assert parse(input=[USER, shell, output, tools]).ignored == []
    request = parse(input=[USER, *(item | {"zzz": 1} for item in (shell, output, tools))])
    assert request.ignored == ["input[1].zzz", "input[2].zzz", "input[3].zzz"]


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([5], "input[0]"),
        (["hi"], "input[0]"),
        ([USER, {}], "input[1].type"),
        ([{"type": 5}], "input[0].type"),
        ([{"role": "wizard", "content": "x"}], "input[0].role"),
        ([{"role": "user", "content": 5}], "input[0].content"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0].text"),
        ([{"role": "user", "content": [{"text": "x"}]}], "input[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "poem", "text": "x"}]}], "input[0].content[0].type"),
        (
            [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
            "input[0].content[0].type",
        ),
        ([USER, {"type": "function_call", "call_id": "c"}], "input[1].name"),
        ([USER, {"type": "function_call", "name": 5}], "input[1].name"),
        (
            [{"type": "reasoning", "summary": [{"type": "summary_text", "text": 5}]}],
            "input[0].summary[0].text",
        ),
        ([], "input"),
        (None, "input"),
    ],
)
def test_an_error_names_the_path(items: Any, param: str) -> None:
    """With the indices of items and parts."""
    assert refused(input=items).param == param
