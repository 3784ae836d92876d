"""The format of an answer as a grammar: OpenAI's `response_format`, and the same under the names that other servers have.

`FormatFields` are those of chats and legacy completions; `text.format` of responses has a parser of its own. A worker constrains the answer to the grammar; `check` compiles it before
anything is queued. https://platform.openai.com/docs/guides/structured-outputs
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from api.openai.fields import body as fields
from common.errors import RequestError, invalid
from common.schema import grammar, limits

MAX_CHOICES = 300
"""Of `guided_choice`."""

_SCHEMA = {"type": "object"}


class ResponseFormat(msgspec.Struct, frozen=True):
    """OpenAI's, and `schema` next to `type`, as llama.cpp and Together accept it.

    `json_schema` has a `schema` and a `name`, `strict` and `description`, which have no effect: every answer validates, and the model
    is not shown the format. It may also be the schema itself.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None
    schema: dict[str, Any] | None = None


Wanted = Annotated[
    ResponseFormat,
    Meta(
        extra_json_schema={
            "if": {"properties": {"type": {"const": "json_schema"}}},
            "then": {
                "anyOf": [
                    {"properties": {name: {"type": "object"}}, "required": [name]}
                    for name in ("json_schema", "schema")
                ]
            },
        }
    ),
]
"""As a JSON Schema describes it."""

_ENVELOPE = frozenset(("name", "schema", "strict", "description"))
_SCHEMA_KEYWORDS = frozenset(("type", "properties", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"))


class StructuredOutputs(msgspec.Struct, frozen=True):
    """vLLM's `structured_outputs`."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None
    grammar: Any = None
    structural_tag: Any = None


class FormatFields(fields.Body, frozen=True, kw_only=True):
    """`response_format` and its other names: `guided_*` and `structured_outputs` are vLLM's, `json_schema` and `grammar` llama.cpp's,
    `regex` and `ebnf` SGLang's, `format` Ollama's.
    """

    response_format: Wanted | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: Any = None
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    grammar: Any = None
    ebnf: Any = None
    format: dict[str, Any] | Literal["json", ""] | None = None


UNSUPPORTED: tuple[str, ...] = ("guided_grammar", "grammar", "ebnf")
"""Grammars in formats of other engines; an empty one asks for nothing."""


class AnswerGrammar(msgspec.Struct, frozen=True):
    """A grammar and the field that asks for it, for error messages."""

    text: str
    field: str


def grammar_of(given: FormatFields, ignored: list[str]) -> AnswerGrammar | None:
    """The grammar of the answer's text; None: any text.

    Args:
        ignored: Paths of unknown keys are added to it.

    Raises:
        RequestError: 400; a format is not supported, or several are given.
    """
    for name in UNSUPPORTED:
        if getattr(given, name):
            raise fields.unsupported(name)
    found = [each for each in (_of_response_format(given.response_format, ignored), *_others(given)) if each]
    if len(found) > 1:
        raise invalid(
            f"`{found[0].field}` and `{found[1].field}` both set the format of the answer; set only one of them.",
            found[1].field,
        )
    return found[0] if found else None


async def check(answer: str | None, field: str = "response_format.json_schema.schema") -> None:
    """Compile what a worker is going to compile, on another thread: some schemas take tens of milliseconds.

    Args:
        answer: The grammar.
        field: The one that asks for it.

    Raises:
        RequestError: 400; it cannot be compiled, or no text can match it.
    """
    if answer is not None and (complaint := await asyncio.to_thread(grammar.check, answer)):
        raise _unsupported(complaint, field)


def _of_response_format(given: ResponseFormat | None, ignored: list[str]) -> AnswerGrammar | None:
    if given is None or given.type == "text":
        return None
    field, schema = "response_format.schema", given.schema
    if given.json_schema is not None:
        field, schema = _in_envelope(given.json_schema, ignored)
    elif schema is None and given.type == "json_schema":
        raise invalid(
            "`response_format.json_schema` is missing; it must have a schema.", "response_format.json_schema"
        )
    if given.type == "json_object":
        _check_size(schema, field)
        return AnswerGrammar(grammar.for_json_object(schema), field)
    return for_schema(schema, field)


def _in_envelope(given: dict[str, Any], ignored: list[str]) -> tuple[str, dict[str, Any] | None]:
    """The schema in `json_schema` and its path; None: there is none, which allows any object."""
    path = "response_format.json_schema"
    if "schema" not in given and given.keys() & _SCHEMA_KEYWORDS:
        return path, given
    ignored += [f"{path}.{key}" for key in given if key not in _ENVELOPE][:1]
    schema = given.get("schema")
    if schema is not None and not isinstance(schema, dict):
        raise invalid(f"`{path}.schema` must be an object.", f"{path}.schema")
    return f"{path}.schema", schema


def _others(given: FormatFields) -> list[AnswerGrammar | None]:
    """What the fields other than `response_format` ask for."""
    wanted: list[AnswerGrammar | None] = [
        _for_json(given.guided_json, "guided_json"),
        _for_regex(given.guided_regex, "guided_regex"),
        _for_choice(given.guided_choice, "guided_choice"),
        _for_json(given.json_schema, "json_schema"),
        _for_regex(given.regex, "regex"),
    ]
    if given.format:
        wanted.append(
            AnswerGrammar(grammar.for_json_object(), "format")
            if given.format == "json"
            else _for_json(given.format, "format")
        )
    outputs, path = given.structured_outputs, "structured_outputs"
    if outputs is None:
        return wanted
    for name in ("grammar", "structural_tag"):
        if getattr(outputs, name):
            raise fields.unsupported(f"{path}.{name}")
    return [
        *wanted,
        _for_json(outputs.json, f"{path}.json"),
        _for_regex(outputs.regex, f"{path}.regex"),
        _for_choice(outputs.choice, f"{path}.choice"),
        AnswerGrammar(grammar.for_json_object(), f"{path}.json_object") if outputs.json_object else None,
    ]


def _for_json(given: dict[str, Any] | str | None, field: str) -> AnswerGrammar | None:
    """For a schema, or one as text; empty text is none."""
    if given is None or given == "":
        return None
    if isinstance(given, str):
        try:
            given = msgspec.json.decode(given, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            raise invalid(
                f"`{field}` must be a JSON Schema, as an object or as its JSON text.", field
            ) from None
    return for_schema(given, field)


def for_schema(schema: dict[str, Any] | None, field: str) -> AnswerGrammar:
    """The grammar of a schema; None: of any object.

    Raises:
        RequestError: 400, the schema is too large.
    """
    if schema is None:
        return AnswerGrammar(grammar.for_json_object(), field)
    _check_size(schema, field)
    return AnswerGrammar(grammar.for_json_schema(schema), field)


def _check_size(schema: dict[str, Any] | None, field: str) -> None:
    if schema is not None and (complaint := limits.size_refusal(schema)):
        raise _unsupported(complaint, field)


def _for_regex(pattern: str | None, field: str) -> AnswerGrammar | None:
    return _checked(pattern, field, limits.regex_refusal, grammar.for_regex) if pattern else None


def _for_choice(choices: list[str] | None, field: str) -> AnswerGrammar | None:
    if not choices:
        return None
    if len(choices) > MAX_CHOICES or not all(choices):
        raise invalid(f"`{field}` must have at most {MAX_CHOICES} texts, none of them empty.", field)
    return AnswerGrammar(grammar.for_choice(choices), field)


def _checked(
    pattern: str, field: str, refusal: Callable[[str], str | None], make: Callable[[str], str]
) -> AnswerGrammar:
    if complaint := refusal(pattern):
        raise _unsupported(complaint, field)
    return AnswerGrammar(make(pattern), field)


def _unsupported(complaint: str, field: str) -> RequestError:
    return invalid(f"`{field}` is not supported: {complaint}", field)
