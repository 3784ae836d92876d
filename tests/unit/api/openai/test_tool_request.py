"""Functions, calls and reasoning in a request, as OpenAI describes them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.generation.request import GenerationRequest
from api.openai.answer import AnswerOptions
from api.openai.chat import request as chat_request
from common.errors import RequestError
from common.protocol import (
    ChatPrompt,
    ToolUse,
)
from tests.unit.api.openai.records import MODEL

HI = [{"role": "user", "content": "hi"}]
INEXPRESSIBLE = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


def tool(name: Any = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | more}


def custom(name: Any = "run", **more: Any) -> dict[str, Any]:
    return {"type": "custom", "custom": {"name": name} | more}


def grammar(**more: Any) -> dict[str, Any]:
    return {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[a-z]+"} | more}


def parsed(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    """A tool as it is sent to a worker."""
    return tool(
        name,
        parameters=parameters or {"type": "object", "properties": {}, "additionalProperties": False},
        **more,
    )


def lists(levels: int) -> str:
    return "[" * levels + "]" * levels


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(*names: str, mode: str = "auto") -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(n) for n in names]}}


def parse(**fields: Any) -> GenerationRequest:
    return chat_request.parse(json.dumps({"messages": HI} | fields).encode())


def prompt(**fields: Any) -> ChatPrompt:
    (only,) = parse(**fields).prompts
    assert isinstance(only, ChatPrompt)
    return only


F, G = tool("f"), tool("g")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": [tool("f")]}, ToolUse(tools=[parsed("f")])),
        (
            {"tools": [tool("f-1_X", description="d", parameters=SCHEMA, strict=True)]},
            ToolUse(tools=[parsed("f-1_X", SCHEMA, description="d", strict=True)]),
        ),
        ({"tools": [tool("f", parameters={}, strict=None, description=None)]}, ToolUse(tools=[parsed("f")])),
        (
            {"tools": [tool("f", parameters=INEXPRESSIBLE)]},
            ToolUse(tools=[parsed("f", INEXPRESSIBLE)]),
        ),
        ({"tools": [F], "tool_choice": "auto"}, ToolUse(tools=[parsed("f")])),
        ({"tools": [F], "tool_choice": None}, ToolUse(tools=[parsed("f")])),
        ({"tools": [F], "tool_choice": "none"}, None),
        ({"tools": [F], "tool_choice": "required"}, ToolUse(tools=[parsed("f")], is_required=True)),
        (
            {"tools": [F, G], "tool_choice": named("g")},
            ToolUse(tools=[parsed("f"), parsed("g")], is_required=True, function="g", is_parallel=False),
        ),
        ({"tools": [F, G], "tool_choice": allowed("g")}, ToolUse(tools=[parsed("g")])),
        (
            {"tools": [F, G], "tool_choice": allowed("g", "f", mode="required")},
            ToolUse(tools=[parsed("f"), parsed("g")], is_required=True),
        ),
        ({"tools": [F], "parallel_tool_calls": True}, ToolUse(tools=[parsed("f")])),
        ({"tools": [F], "parallel_tool_calls": False}, ToolUse(tools=[parsed("f")], is_parallel=False)),
        ({"functions": [F["function"]]}, ToolUse(tools=[parsed("f")], is_parallel=False)),
        ({"functions": [F["function"]], "function_call": "none"}, None),
        (
            {"functions": [F["function"]], "function_call": {"name": "f"}},
            ToolUse(tools=[parsed("f")], is_required=True, function="f", is_parallel=False),
        ),
        ({"tools": [], "tool_choice": "none"}, None),
        ({}, None),
    ],
    ids=lambda value: json.dumps(value)[:80] if isinstance(value, dict) else "",
)
def test_functions_reach_the_worker(fields: dict[str, Any], expected: ToolUse | None) -> None:
    """Each form of the tool fields is parsed into one value."""
    request = parse(**fields)
    assert request.tool_use == expected
    assert request.jobs("x", MODEL, "c", [1])[0].tool_use == expected
    assert request.options == AnswerOptions(as_function_call="functions" in fields)
    assert request.ignored == []


def assistant(*calls: Any, **more: Any) -> list[dict[str, Any]]:
    return [*HI, {"role": "assistant", "content": None, "tool_calls": list(calls)} | more]


def made(arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    return {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}} | more


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{}]}, "tools[0].function"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "custom"}]}, "tools[0].custom"),
        ({"tools": [custom(format={"type": "x"})]}, "tools[0].custom.format.type"),
        ({"tools": [custom(format={"type": "grammar"})]}, "tools[0].custom.format.syntax"),
        ({"tools": [custom(format=grammar(syntax="bnf"))]}, "tools[0].custom.format.grammar.syntax"),
        ({"tools": [custom(format=grammar(definition=None))]}, "tools[0].custom.format.grammar.definition"),
        ({"tools": [tool("f"), custom("f")]}, "tools[1].custom.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [tool(5)]}, "tools[0].function.name"),
        ({"tools": [tool("")]}, "tools[0].function.name"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("f\n")]}, "tools[0].function.name"),
        ({"tools": [tool("é")]}, "tools[0].function.name"),
        ({"tools": [tool("x" * 129)]}, "tools[0].function.name"),
        ({"tools": [tool(f"f{i}") for i in range(513)]}, "tools"),
        ({"tools": [tool(description=5)]}, "tools[0].function.description"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict"),
        ({"tools": [tool(parameters="{}")]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters"),
        (
            {"tools": [F, tool("g", strict=True, parameters=INEXPRESSIBLE)]},
            "tools[1].function.parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": named("f")}, "tool_choice"),
        ({"tools": [F], "tool_choice": 5}, "tool_choice"),
        (
            {"tools": [F], "tool_choice": {"type": "custom", "custom": {"name": "g"}}},
            "tool_choice.custom.name",
        ),
        ({"tools": [F], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [F], "tool_choice": named("g")}, "tool_choice.function.name"),
        ({"tools": [F], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"tools": [F], "tool_choice": allowed("f", mode="none")}, "tool_choice.allowed_tools.mode"),
        ({"tools": [F], "tool_choice": allowed()}, "tool_choice.allowed_tools.tools"),
        (
            {"tools": [F], "tool_choice": allowed("f", "g")},
            "tool_choice.allowed_tools.tools[1].function.name",
        ),
        ({"tools": [F], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"functions": [F["function"]], "tools": [F]}, "tools"),
        ({"functions": [F["function"]], "tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}, {"name": "f", "description": "d"}]}, "functions[1].name"),
        ({"tools": [F, tool("f", parameters=SCHEMA)]}, "tools[1].function.name"),
        ({"tools": [tool(parameters={"properties": [1]})]}, "tools[0].function.parameters.properties"),
        ({"tools": [{"name": "a b"}]}, "tools[0].name"),
        ({"functions": [{"name": "f", "parameters": {"type": "array"}}]}, "functions[0].parameters"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call.name"),
        ({"functions": [{"name": "f"}], "function_call": "required"}, "function_call"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"messages": [{"role": "tool", "content": "hi", "tool_call_id": 5}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [made()]}]}, "messages[0].tool_calls"),
        ({"messages": assistant({"id": "x"})}, "messages[1].tool_calls[0].function"),
        ({"messages": assistant({"id": "x", "type": "function"})}, "messages[1].tool_calls[0].function"),
        ({"messages": assistant(made(type="custom"))}, "messages[1].tool_calls[0].type"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"reasoning_effort": 5}, "reasoning_effort"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"return_tensors": "np"}}, "chat_template_kwargs.return_tensors"),
        ({"chat_template_kwargs": {"tools": True}}, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token"),
        ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs.a b"),
        ({"chat_template_kwargs": {"__class__": 1}}, "chat_template_kwargs.__class__"),
        ({"chat_template_kwargs": {"x": json.loads(lists(30))}}, "chat_template_kwargs.x"),
        (
            {"chat_template_kwargs": {"add_generation_prompt": False}},
            "chat_template_kwargs.add_generation_prompt",
        ),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"thinking_budget": True}}, "chat_template_kwargs.thinking_budget"),
        ({"chat_template_kwargs": {"reasoning_effort": ["low"]}}, "chat_template_kwargs.reasoning_effort"),
        ({"chat_template_kwargs": {"date_string": "x" * 99_999}}, "chat_template_kwargs"),
        (
            {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"},
            "reasoning_effort",
        ),
    ],
    ids=lambda value: json.dumps(value)[:90] if isinstance(value, dict) else "",
)
def test_invalid_values_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    """A 400 with the path of the value."""
    with pytest.raises(RequestError) as raised:
        parse(**fields)
    assert (raised.value.status, raised.value.type, raised.value.param) == (
        400,
        "invalid_request_error",
        param,
    )


@pytest.mark.parametrize("levels", [250, 800, 955, 960, 965, 970])
@pytest.mark.parametrize(
    ("field", "param"), [("tools", "tools[0].function.parameters"), ("functions", "functions[0].parameters")]
)
def test_deeply_nested_parameters_are_refused(levels: int, field: str, param: str) -> None:
    """A 400, not a failure of the encoder. The deepest ones cannot be decoded, and the error has no parameter."""
    function = '{"name": "f", "parameters": {"default": ' + lists(levels) + "}}"
    item = function if field == "functions" else '{"type": "function", "function": ' + function + "}"
    body = f'{{"messages": {json.dumps(HI)}, "{field}": [{item}]}}'
    with pytest.raises(RequestError) as raised:
        chat_request.parse(body.encode())
    assert raised.value.status == 400
    assert levels > 900 or raised.value.param == param


def test_parameters_of_many_levels() -> None:
    """A function that is not strict may have more than a grammar can have."""
    deep = {"default": json.loads(lists(150))}
    assert parse(tools=[tool(parameters=deep)]).tool_use == ToolUse(tools=[parsed("f", deep)])


@pytest.mark.parametrize("levels", [250, 800, 955, 960, 965, 970])
def test_deeply_nested_arguments_of_a_call_stay_text(levels: int) -> None:
    """An earlier answer can be sent back unchanged, and the job can be encoded."""
    text = '{"a": ' + lists(levels) + "}"
    sent = prompt(messages=assistant(made(text))).messages[1]
    assert sent["tool_calls"][0]["function"]["arguments"] == text


def test_messages_with_calls_in_the_form_that_templates_expect() -> None:
    """Arguments become an object, results get their function's name; reasoning and refusals are kept."""
    messages = [
        *assistant(made('{"a": 1}'), made("", id="y"), reasoning_content="hm"),
        {
            "role": "tool",
            "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}],
            "tool_call_id": "x",
        },
        {"role": "tool", "content": "", "tool_call_id": "?"},
        {"role": "assistant", "content": None, "refusal": "no"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}],
        },
        {"role": "assistant", "content": "c", "tool_calls": []},
    ]

    def call(call_id: str, arguments: Any) -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}

    assert prompt(messages=messages).messages == [
        *HI,
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [call("x", {"a": 1}), call("y", {})],
        },
        {"role": "tool", "content": "12", "tool_call_id": "x", "name": "f"},
        {"role": "tool", "content": "", "tool_call_id": "?"},
        {"role": "assistant", "content": "no"},
        {"role": "assistant", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]


def test_the_deprecated_messages_become_calls_and_results() -> None:
    """The result belongs to the call, though neither has an id."""
    messages = [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "1"},
    ]
    call, result = prompt(messages=messages).messages
    assert call["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert result == {
        "role": "tool",
        "content": "1",
        "name": "f",
        "tool_call_id": call["tool_calls"][0]["id"],
    }


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"chat_template_kwargs": {}}, {}),
        ({"chat_template_kwargs": {"enable_thinking": None}}, {}),
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        (
            {
                "chat_template_kwargs": {"enable_thinking": False, "thinking_budget": 5},
                "reasoning_effort": "low",
            },
            {"enable_thinking": False, "thinking_budget": 5, "reasoning_effort": "low"},
        ),
    ],
)
def test_template_arguments(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    """Reasoning effort and the allowed names."""
    assert prompt(**fields).template_arguments == expected


def _input_schema(request: GenerationRequest) -> Any:
    assert request.tool_use is not None
    (only,) = request.tool_use.tools
    assert only["function"]["strict"], "so that there is nothing but the input"
    return only["function"]["parameters"]["properties"]["input"]


@pytest.mark.parametrize(
    ("given", "schema", "ignored"),
    [
        (custom(), {"type": "string"}, []),
        ({"type": "custom", "name": "run"}, {"type": "string"}, []),
        (custom(format={"type": "text"}), {"type": "string"}, []),
        (custom(format=grammar()), {"type": "string", "pattern": "^(?:[a-z]+)$"}, []),
        (custom(format=grammar(syntax="lark")), {"type": "string"}, ["tools[0].custom.format"]),
        (custom(format=grammar(definition="(?=a)b")), {"type": "string"}, ["tools[0].custom.format"]),
    ],
)
def test_a_custom_tool_is_a_function_with_one_string(
    given: dict[str, Any], schema: dict[str, Any], ignored: list[str]
) -> None:
    """A regular expression is held; what cannot be held is described to the model, and named."""
    request = parse(tools=[given])
    assert _input_schema(request) == schema
    assert request.ignored == ignored
    assert isinstance(request.options, AnswerOptions)
    assert request.options.custom_tools == ["run"]


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "custom", "custom": {"name": "run"}},
        {"type": "custom", "name": "run"},
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "custom", "custom": {"name": "run"}}]},
        },
    ],
)
def test_a_custom_tool_can_be_chosen(choice: dict[str, Any]) -> None:
    """By its name, as a function can."""
    use = parse(tools=[F, custom()], tool_choice=choice).tool_use
    assert use is not None
    assert use.is_required
    assert use.function == "run" or [each["function"]["name"] for each in use.tools] == ["run"]


def test_without_calls_nothing_is_rendered_as_a_custom_tool() -> None:
    """The options of the answer name custom tools only if they can be called."""
    request = parse(tools=[custom()], tool_choice="none")
    assert isinstance(request.options, AnswerOptions)
    assert not request.options.custom_tools
