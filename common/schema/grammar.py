"""Grammars for answers, in llguidance's format: JSON, a JSON Schema, function calls.

The API makes and checks them before a job is queued, and sends them as `GenerationJob.grammar`; a worker compiles them
(`worker.sampling.grammar`). The format is a JSON object with a list of grammars, of which the first is the start. Independent of the
model: grammars are checked with a vocabulary of bytes.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from common.digest_cache import DigestCache
from common.protocol import ToolUse
from common.schema import json_schema
from common.schema import limits as schema_limits
from common.schema.document import Schema

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer

CALL_BEGIN = "<tool_call>"
CALL_END = "</tool_call>"

MAX_BYTES = 512 * 1024
_MAX_CALLS = 16
"""In one answer: a small model may repeat a call until it runs out of tokens."""
_MAX_MESSAGE_CHARACTERS = 300
_MAX_VERDICTS = 512

_WHITESPACE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""At most one space after a comma and a colon, as in most JSON that models were trained on. If more is allowed, small models
write white space until they run out of tokens."""

_REGEX_PARTS = re.compile(r"\\.|/|\n", re.DOTALL)
_ESCAPES = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
"""In Lark, a slash and a line break end an expression."""

_TEXT_OR_CALLS = "start: TEXT | until_call calls"
_TEXT_ANSWER = '{"name":"answer","lark_grammar":'

_END = 256  # the only token that is not a byte


def for_json_object(schema: Schema | None = None) -> str:
    """A JSON object: any, or one that validates against `schema`."""
    return for_json_schema({"type": "object"} if schema is None else _object_schema(schema))


def for_json_schema(schema: Schema) -> str:
    """JSON that validates against `schema`, with the keys of objects in the schema's order."""
    return _text(_json_grammar("answer", schema))


def for_regex(pattern: str) -> str:
    """Text that matches a regular expression from its beginning to its end. The syntax is Rust's, without look-around."""
    escaped = _REGEX_PARTS.sub(lambda part: _ESCAPES.get(part[0], part[0]), pattern)
    return _text({"name": "answer", "lark_grammar": f"start: /{escaped}/\n"})


def for_choice(choices: Sequence[str]) -> str:
    """One of these texts, none of which is empty."""
    quoted = (json.dumps(choice, ensure_ascii=False) for choice in choices)
    return _text({"name": "answer", "lark_grammar": f"start: {' | '.join(quoted)}\n"})


def for_tool_calls(tool_use: ToolUse, *, answer: str | None = None) -> str:
    """Calls as ``<tool_call>{"name": ..., "arguments": ...}</tool_call>``, or an answer.

    If a call is not required, text may come before the calls or instead of them; in that text, ``<tool_call>`` always begins a
    call.

    Args:
        answer: A grammar of this module for the answer, in place of free text.
    """
    functions = [tool["function"] for tool in tool_use.tools]
    if tool_use.function is not None:
        functions = [function for function in functions if function["name"] == tool_use.function]
    grammars = [_json_grammar(f"arguments{i}", _parameters(function)) for i, function in enumerate(functions)]
    must_call = tool_use.is_required or tool_use.function is not None
    # A named function is called once, as with OpenAI.
    num_calls = _MAX_CALLS if tool_use.is_parallel and tool_use.function is None else 1
    lines = _call_rules([function["name"] for function in functions], num_calls)
    begin, text = _quoted(CALL_BEGIN), f"/(?s:.*)/ & ~/(?s:.*){CALL_BEGIN}(?s:.*)/"
    if must_call:
        lines += [f"start: {begin} calls"]
    elif answer is None:
        # Lazy: it ends with the first marker. An answer without one is TEXT.
        lines += [
            _TEXT_OR_CALLS,
            f"until_call[lazy]: /(?s:.*){CALL_BEGIN}/",
            f"TEXT: {text}",
        ]
    else:
        lines += [f"start: @answer | {begin} calls"]
        grammars += _named_answer(answer)
    return _text({"name": "calls", "lark_grammar": "\n".join(lines) + "\n"}, *grammars)


def json_begins_after(grammar: str) -> str:
    """The marker behind which a grammar of this module has JSON, if at all; empty if the answer begins with it."""
    is_text_first = _TEXT_OR_CALLS in grammar or _TEXT_ANSWER in grammar
    return CALL_BEGIN if is_text_first else ""


def check(grammar: str) -> str | None:
    """Check a grammar: what is wrong with it, as one line for the client, or None.

    Takes up to some tens of milliseconds for the largest grammars that are accepted, without the interpreter's lock. The verdict is
    cached, a line each; the grammar itself never is.
    """
    if len(grammar) > MAX_BYTES:
        return f"The grammar is longer than {MAX_BYTES} bytes."
    return _verdicts.get(grammar, lambda: _check(grammar))


_verdicts: DigestCache[str | None] = DigestCache(_MAX_VERDICTS)


def _check(grammar: str) -> str | None:
    try:
        grammars = msgspec.json.decode(grammar)["grammars"]
        schemas = [each["json_schema"] for each in grammars if each.get("json_schema") is not None]
    except (msgspec.DecodeError, RecursionError, LookupError, TypeError, AttributeError):
        return "The grammar is not a JSON object with a list of grammars."
    for schema in schemas:
        if complaint := schema_limits.refusal(schema):
            return line(complaint)
    return _compiler_refusal(grammar)


def limits() -> LLParserLimits:
    """llguidance's limits, here and in a worker."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=10_000,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=10_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _compiler_refusal(grammar: str) -> str | None:
    """Compile a grammar and compute its first mask: some limits are only reached then."""
    from llguidance import LLMatcher

    matcher = LLMatcher(_bytes_tokenizer(), grammar, log_level=0, limits=limits())
    if not matcher.is_error():
        mask = matcher.compute_bitmask()
        if not matcher.is_error() and any(mask):
            return None
    return line(_explained(matcher.get_error()) or "No answer matches the schema.")


def _explained(error: str) -> str:
    if error.startswith("oneOf"):
        return (
            "oneOf is supported if its options exclude each other by type or by a required property with "
            "const or enum; use anyOf."
        )
    if error == "Unsatisfiable schema: anyOf is empty":
        return "Unsatisfiable schema: no value of finite length matches it."
    if error.startswith("Unimplemented keys: "):
        return (
            f"The schema has keywords that are not supported: {error.removeprefix('Unimplemented keys: ')}."
        )
    return error.replace("<non-verbose/>", "").split("\n  while processing")[0]


@functools.cache
def _bytes_tokenizer() -> LLTokenizer:
    """A vocabulary of the 256 bytes: a grammar that accepts bytes accepts any model's tokens."""
    from llguidance import LLTokenizer, TokenizerWrapper

    class Bytes:
        eos_token_id = _END
        bos_token_id = None
        tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
        special_token_ids = (_END,)

        def __call__(self, text: bytes) -> list[int]:
            return list(text)

    return LLTokenizer(TokenizerWrapper(Bytes()), eos_token=_END, slices=[])


def _call_rules(names: list[str], num_calls: int) -> list[str]:
    """The rule `calls`: what follows the first begin marker, up to the end marker of the last call."""
    begin, end = _quoted(CALL_BEGIN), _quoted(CALL_END)
    more = f" (NEWLINES? {begin} call){{0,{num_calls - 1}}}" if num_calls > 1 else ""
    functions = [
        f'function{i}: "{{\\"name\\":" SPACE? {_quoted(json.dumps(name))} "," SPACE? "\\"arguments\\":" SPACE? '
        f'@arguments{i} "}}"'
        for i, name in enumerate(names)
    ]
    return [
        f"calls: call{more}",
        f"call: NEWLINES? ({' | '.join(f'function{i}' for i in range(len(names)))}) NEWLINES? {end}",
        *functions,
        'SPACE: " "',
        r"NEWLINES: /\n{1,2}/",
    ]


def _parameters(function: dict[str, Any]) -> Schema:
    """The schema of a function's arguments, which are an object even if the schema does not require it."""
    parameters = function.get("parameters")
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return _object_schema(parameters) if isinstance(parameters, (dict, bool)) else False


def _object_schema(schema: Schema) -> Schema:
    """The schema, restricted to objects if it does not name a type."""
    if schema is True:
        return {"type": "object"}
    if isinstance(schema, dict) and not schema.keys() & {"type", "$ref", "anyOf", "oneOf", "allOf"}:
        return {"type": "object", **schema}
    return schema


def _json_grammar(name: str, schema: Schema) -> dict[str, Any]:
    rewritten = json_schema.rewrite(schema)
    if isinstance(rewritten, bool):
        rewritten = {} if rewritten else {"anyOf": []}  # llguidance takes its options from an object
    return {"name": name, "json_schema": {**rewritten, "x-guidance": _WHITESPACE}}


def _named_answer(grammar: str) -> list[dict[str, Any]]:
    first, *others = msgspec.json.decode(grammar)["grammars"]
    return [{**first, "name": "answer"}, *others]


def _text(*grammars: dict[str, Any]) -> str:
    return msgspec.json.encode({"grammars": grammars}).decode()


def _quoted(text: str) -> str:
    """A string in Lark's syntax, whose escapes are JSON's."""
    return json.dumps(text)


def line(text: str) -> str:
    """A message of llguidance as one line of limited length."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_MESSAGE_CHARACTERS else line[: _MAX_MESSAGE_CHARACTERS - 1] + "…"
