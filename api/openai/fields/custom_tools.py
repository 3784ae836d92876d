"""Custom tools, whose input is plain text, as functions with one string: what templates, grammars and models know.

Used by the parsers of chats and of responses; `api.openai.custom_input` extracts the input of a call. Must not know models.
https://platform.openai.com/docs/guides/function-calling#custom-tools
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from common.errors import invalid
from common.schema import function_schema

CUSTOM_INPUT = "input"
"""The only parameter of the function that stands for a custom tool."""


class InputGrammar(msgspec.Struct, frozen=True):
    """What a custom tool's input must match."""

    syntax: str | None = None
    definition: str | None = None


class InputFormat(msgspec.Struct, frozen=True):
    """Of a custom tool's input: any text, or what a grammar matches. The grammar stands in the format (responses) or below it (chats)."""

    type: str
    syntax: str | None = None
    definition: str | None = None
    grammar: InputGrammar | None = None


def custom_function(
    name: str,
    description: str | None,
    input_format: InputFormat | None,
    path: str,
    ignore: Callable[[str], None],
) -> dict[str, Any]:
    """A custom tool as a function. A regular expression is enforced; another grammar is described to the model.

    Args:
        path: Of the format in the request.
        ignore: Is called with that path if the grammar is not enforced.

    Raises:
        RequestError: 400, in `param` what is wrong.
    """
    schema: dict[str, Any] = {"type": "string"}
    description = description or ""
    if input_format is not None and input_format.type not in ("text", "grammar"):
        raise invalid(f"`{path}.type` must be `text` or `grammar`.", f"{path}.type")
    if input_format is not None and input_format.type == "grammar":
        syntax, definition = _checked_grammar(input_format, path)
        pattern = {"type": "string", "pattern": f"^(?:{definition})$"}
        if syntax == "regex" and function_schema.refusal({"parameters": _parameters(pattern)}) is None:
            schema = pattern
        else:
            ignore(path)
        kind = "regular expression" if syntax == "regex" else "Lark grammar"
        description += f"\n\nThe input must match this {kind}:\n{definition}"
    function: dict[str, Any] = {"name": name}
    if description:
        function["description"] = description.strip()
    # Strict, so that the arguments are an object with the input and nothing else.
    return function | {"parameters": _parameters(schema), "strict": True}


def _checked_grammar(input_format: InputFormat, path: str) -> tuple[str, str]:
    """The syntax and the definition."""
    grammar = input_format.grammar
    if grammar is None:
        grammar = InputGrammar(input_format.syntax, input_format.definition)
    else:
        path += ".grammar"
    if grammar.syntax not in ("lark", "regex"):
        raise invalid(f"`{path}.syntax` must be `lark` or `regex`.", f"{path}.syntax")
    if grammar.definition is None:
        raise invalid(
            f"`{path}.definition` is missing; it is the grammar.",
            f"{path}.definition",
            "missing_required_parameter",
        )
    return grammar.syntax, grammar.definition


def _parameters(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {CUSTOM_INPUT: schema},
        "required": [CUSTOM_INPUT],
        "additionalProperties": False,
    }
