"""The tools of a request become the functions of its job."""

from __future__ import annotations

from typing import Any

import pytest

from api.openai.responses.tools import flat_name
from common.protocol import ToolUse
from tests.unit.api.openai.responses.requests import parse, refused

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
F = {"type": "function", "name": "f", "description": "d", "parameters": PARAMETERS, "strict": False}
G = {"type": "function", "name": "g", "parameters": None, "strict": None}
RUN = {"type": "custom", "name": "run", "description": "Runs code."}
SPACE = {"type": "namespace", "name": "mcp__x__", "description": "X.", "tools": [F, RUN]}
SEARCH = {"type": "web_search", "external_web_access": False}


def use(*tools: Any, **fields: Any) -> ToolUse:
    """What the job may call."""
    use = parse(tools=list(tools), **fields).tool_use
    assert use is not None
    return use


def names(use: ToolUse) -> list[str]:
    return [tool["function"]["name"] for tool in use.tools]


def called(**fields: Any) -> Any:
    """What the model's functions are to the client."""
    options: Any = parse(**fields).options
    return options.called


def test_functions() -> None:
    """As templates expect them; missing parameters are those of a function without any."""
    f, g = use(F, G).tools
    assert f == {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": PARAMETERS, "strict": False},
    }
    assert g["function"]["parameters"]["properties"] == {}
    assert called(tools=[F, G]) == {}


def test_functions_as_in_chats() -> None:
    """Nested in `function`, as chat completions have them."""
    assert names(use({"type": "function", "function": {"name": "f", "parameters": PARAMETERS}})) == ["f"]


def test_a_custom_tool_is_a_function_with_one_string() -> None:
    """Strict, so that the model writes nothing else."""
    [tool] = use(RUN).tools
    assert tool["function"] == {
        "name": "run",
        "description": "Runs code.",
        "parameters": {
            "type": "object",
            "properties": {"input": {"type": "string"}},
            "required": ["input"],
            "additionalProperties": False,
        },
        "strict": True,
    }
    assert called(tools=[RUN]) == {"run": ["run", None, True]}


def test_grammars_of_custom_tools() -> None:
    """A regular expression is enforced; a Lark grammar is shown to the model, and named."""
    regex = RUN | {"format": {"type": "grammar", "syntax": "regex", "definition": "[ab]+"}}
    request = parse(tools=[regex])
    assert request.tool_use is not None
    assert request.tool_use.tools[0]["function"]["parameters"]["properties"]["input"] == {
        "type": "string",
        "pattern": "^(?:[ab]+)$",
    }
    assert request.ignored == []
    lark = RUN | {"format": {"type": "grammar", "syntax": "lark", "definition": "start: /a+/"}}
    request = parse(tools=[lark])
    assert request.tool_use is not None
    assert request.tool_use.tools[0]["function"]["description"].endswith("Lark grammar:\nstart: /a+/")
    assert request.ignored == ["tools[0].format"]
    wrong = RUN | {"format": {"type": "grammar", "syntax": "yacc", "definition": "x"}}
    assert refused(tools=[wrong]).param == "tools[0].format.syntax"


def test_namespaces() -> None:
    """Functions and custom tools inside are served under joined names, and are the client's own in calls."""
    assert names(use(G, SPACE)) == ["g", "mcp__x__f", "mcp__x__run"]
    assert called(tools=[G, SPACE]) == {
        "mcp__x__f": ["f", "mcp__x__", False],
        "mcp__x__run": ["run", "mcp__x__", True],
    }
    first, second = use(SPACE).tools
    assert first["function"]["description"] == "X.\n\nd"
    assert second["function"]["description"] == "Runs code."


@pytest.mark.parametrize(
    ("namespace", "name", "flat"),
    [
        (None, "f", "f"),
        ("", "f", "f"),
        ("a", "f", "a__f"),
        ("a__", "_f", "a__f"),
        ("a b", "f", "a_b__f_"),
        ("n" * 60, "function", "n" * 55 + "_"),
    ],
)
def test_flat_names(namespace: str | None, name: str, flat: str) -> None:
    """Codex's form; what is no valid name gets a digest, so that two of them differ."""
    made = flat_name(namespace, name)
    assert made.startswith(flat)
    assert len(made) <= 64
    assert (made == flat) == (namespace in (None, "", "a", "a__"))


def test_built_in_tools_are_skipped_and_named() -> None:
    """Next to functions, and alone."""
    request = parse(tools=[SEARCH, F, {"type": "mcp", "server_label": "s"}])
    assert request.tool_use is not None
    assert names(request.tool_use) == ["f"]
    assert request.ignored == ["tools[0]", "tools[2]"]
    alone = parse(tools=[SEARCH], tool_choice="auto")
    assert (alone.tool_use, alone.ignored) == (None, ["tools[0]"])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, (["f", "g"], False, None)),
        ("auto", (["f", "g"], False, None)),
        ({"type": "auto"}, (["f", "g"], False, None)),
        ("required", (["f", "g"], True, None)),
        ({"type": "required"}, (["f", "g"], True, None)),
        ({"type": "function", "name": "g"}, (["g"], True, "g")),
        ({"type": "function", "function": {"name": "g"}}, (["g"], True, "g")),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}, SEARCH]},
            (["f"], False, None),
        ),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
            (["f"], True, None),
        ),
    ],
)
def test_tool_choice(choice: Any, expected: tuple[list[str], bool, str | None]) -> None:
    """Every form of it; a named function is called once."""
    made = use(F, G, tool_choice=choice)
    assert (names(made), made.is_required, made.function) == expected
    assert made.is_parallel == (made.function is None)


def test_no_calls() -> None:
    """`none` offers no function; `parallel_tool_calls: false` allows one call."""
    assert parse(tools=[F], tool_choice="none").tool_use is None
    assert parse(tools=[F], tool_choice={"type": "none"}).tool_use is None
    assert not use(F, parallel_tool_calls=False).is_parallel
    assert parse(tools=[], tool_choice="auto", parallel_tool_calls=True).tool_use is None


@pytest.mark.parametrize(
    "choice",
    [{"type": "custom", "name": "run"}, {"type": "function", "name": "run", "namespace": "mcp__x__"}],
)
def test_a_choice_in_a_namespace(choice: Any) -> None:
    """By its own name if that is unique, or with its namespace."""
    assert use(F, SPACE, tool_choice=choice).function == "mcp__x__run"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [SEARCH], "tool_choice": "required"}, "tools[0].type"),
        ({"tools": [F, SEARCH], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tools": [F], "tool_choice": {"type": "mcp", "server_label": "s"}}, "tool_choice.type"),
        ({"tools": [F], "tool_choice": {"type": "function", "name": "h"}}, "tool_choice.name"),
        ({"tools": [F], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [F], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [F], "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools"),
        ({"tools": [F], "tool_choice": {"type": "allowed_tools", "tools": [F]}}, "tool_choice.mode"),
        (
            {
                "tools": [F],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "h"}],
                },
            },
            "tool_choice.tools[0].name",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [F, F | {"description": "other"}]}, "tools[1].name"),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function", "name": 5}]}]},
            "tools[0].tools[0].name",
        ),
        ({"tools": [F | {"parameters": {"type": "string"}}]}, "tools[0].parameters"),
        (
            {"tools": [F | {"strict": True, "parameters": {"type": "object", "not": {}}}]},
            "tools[0].parameters",
        ),
        ({"tools": [{"type": "function", "name": f"f{i}"} for i in range(513)]}, "tools"),
    ],
)
def test_refusals(fields: dict[str, Any], param: str) -> None:
    """What cannot be served is a 400 that names the field."""
    assert refused(**fields).param == param


def test_tools_among_the_items() -> None:
    """`additional_tools` of the developer are tools too."""
    items = [
        {"role": "user", "content": "hi"},
        {"type": "additional_tools", "role": "developer", "tools": [G]},
    ]
    made = parse(tools=[F], input=items).tool_use
    assert made is not None
    assert names(made) == ["f", "g"]
    assert (
        refused(input=[*items, {"type": "additional_tools", "tools": [{}]}]).param == "input[2].tools[0].type"
    )


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"tools": [RUN | {"format": {"type": "text", "zzz": 1}}]}, ["tools[0].format.zzz"]),
        (
            {
                "tools": [
                    RUN
                    | {
                        "format": {
                            "type": "grammar",
                            "grammar": {"syntax": "regex", "definition": "a+", "zzz": 1},
                        }
                    }
                ]
            },
            ["tools[0].format.grammar.zzz"],
        ),
        ({"tools": [{"type": "function", "function": F, "zzz": 1}]}, ["tools[0].zzz"]),
        ({"tools": [F | {"parameters": PARAMETERS | {"zzz": 1}}]}, []),
        (
            {
                "tools": [F, RUN],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [
                        {"type": "function", "name": "f", "zzz": 1},
                        {"type": "function", "function": {"name": "f", "yyy": 1}},
                    ],
                },
            },
            ["tool_choice.tools[0].zzz", "tool_choice.tools[1].function.yyy"],
        ),
        (
            {"tools": [F], "tool_choice": {"type": "function", "function": {"name": "f", "zzz": 1}}},
            ["tool_choice.function.zzz"],
        ),
    ],
)
def test_unknown_keys_are_named_at_every_depth(fields: dict[str, Any], ignored: list[str]) -> None:
    """In formats, functions and choices; a schema is free JSON."""
    assert parse(**fields).ignored == ignored
