"""Nearly valid request bodies, as a Hypothesis strategy: what a buggy or malicious client sends.

A valid body with a few faults: in a field (a wrong type, a huge number, odd text), in the JSON (a duplicate field, NaN, deep
nesting), or in the bytes (truncated, not UTF-8). The fields come from the types that parse requests, so that new ones are included
automatically. Used by `bench.fuzz`; independent of HTTP.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from api.anthropic.messages.request import MessagesBody
from api.openai.tokenize import request as tokenizing
from api.openapi.generating import GENERATING
from bench.fuzz.other_bodies import DETOKENIZE, MESSAGE, TOKENIZE
from bench.fuzz.texts import MAX_TOKENS, MODEL, PLAIN

_HUGE_DIGITS = 5000
_DEPTHS = (3, 100, 100_000)
_LENGTHS = (1_000, 200_000)
_MAX_FAULTS = 3


@dataclass(frozen=True)
class Body:
    """A request body, its path and the type that parses it."""

    path: str
    type_name: str
    data: bytes


_ODD_TEXTS = st.sampled_from(
    [
        "",
        " ",
        "\0",
        "\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        "a` - at `$.model",  # resembles the parser's own errors
        "../../etc/passwd",
        "{{ 7 * 7 }}",
        "%00%ff%s%n",
        "\u2028\u2029\ufeff\ufffe\uffff",
        "\u202eright to left",
        "e\u0301" * 50,
        "👩‍👩‍👧‍👦",
        "\U0010ffff",
        "\ud800",  # a lone surrogate
        "\udfff\ud800",
        "constructor",
        "null",
        "<|im_end|>",
        "data: [DONE]\n\n",
    ]
)
_TEXTS = st.one_of(st.text(max_size=20), _ODD_TEXTS)
_NUMBERS = st.one_of(
    st.integers(),
    st.floats(),  # NaN and infinity included, which json writes as in JavaScript
    st.sampled_from(
        [
            0,
            1,
            -1,
            2**31 - 1,
            2**31,
            2**53 + 1,
            2**63 - 1,
            2**63,
            2**64,
            -(2**63) - 1,
            10**40,
            -0.0,
            5e-324,
            1e308,
        ]
    ),
)
_SCALARS = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS)
_ODD = st.one_of(
    _SCALARS,
    _TEXTS,
    st.lists(_SCALARS, max_size=5),
    st.dictionaries(_TEXTS, _SCALARS, max_size=4),
    st.recursive(
        _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3)
    ),
    st.lists(st.just({}), min_size=1, max_size=200),
    st.sampled_from(_LENGTHS).map(lambda length: "x" * length),
)

_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "developer", "user", "assistant"]),
            "content": PLAIN
            | st.lists(PLAIN.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=3),
        },
        optional={"name": PLAIN},
    ),
    min_size=1,
    max_size=3,
)
_STREAMS: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [{}, {"stream": False}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}]
)
_SHARED: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just(MODEL),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "stop": PLAIN.filter(bool) | st.lists(PLAIN.filter(bool), max_size=4),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "repetition_penalty": st.floats(0.1, 10),
    "repetition_context_size": st.integers(1, 2**31 - 1),
    "logit_bias": st.dictionaries(st.integers(0, 999).map(str), st.floats(-100, 100), max_size=3),
    "n": st.integers(1, 3),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "top_k": st.integers(-1, 2000),
    "min_p": st.floats(0, 1),
    "xtc_probability": st.floats(0, 1),
    "xtc_threshold": st.floats(0, 0.5),
    "user": PLAIN,
    "repeat_penalty": st.floats(0.1, 10),
    "repeat_last_n": st.integers(-1, 100),
    "ignore_eos": st.booleans(),
    "min_tokens": st.integers(0, MAX_TOKENS),
    "n_predict": st.integers(1, MAX_TOKENS),
    "service_tier": st.sampled_from(["auto", "default", "flex"]),
}
_CHAT = st.builds(
    lambda fields, stream, logprobs: fields | stream | logprobs,
    st.fixed_dictionaries(
        {"messages": _MESSAGES, "max_tokens": st.integers(1, MAX_TOKENS)},
        optional=_SHARED
        | {
            "role_mapping": st.dictionaries(PLAIN, PLAIN, max_size=3),
            "reasoning_effort": st.sampled_from(["none", "low", "high"]),
            "response_format": st.just({"type": "text"}),
            "chat_template_kwargs": st.just({"enable_thinking": False}),
            "thinking": st.sampled_from([False, {"type": "disabled"}, {"type": "adaptive"}]),
            "store": st.booleans(),
        },
    ),
    _STREAMS,
    st.sampled_from([{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 3}]),
)
_COMPLETION = st.builds(
    lambda fields, stream: fields | stream,
    st.fixed_dictionaries(
        {
            "prompt": PLAIN | st.lists(st.integers(0, 999), min_size=1, max_size=5),
            "max_tokens": st.integers(1, MAX_TOKENS),
        },
        optional=_SHARED | {"logprobs": st.integers(0, 5), "echo": st.just(False)},
    ),
    _STREAMS,
)

_TURN = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant"]),
        "content": PLAIN
        | st.lists(PLAIN.map(lambda text: {"type": "input_text", "text": text}), max_size=3)
        | st.none(),
    },
    optional={"type": st.just("message"), "id": PLAIN},
)
_OTHER_ITEMS = st.sampled_from(
    [
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "x"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "run", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "x"}]},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
    ]
)
_FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
_TOOLS = st.lists(
    st.sampled_from(
        [
            _FUNCTION,
            {"type": "custom", "name": "run"},
            {"type": "namespace", "name": "n", "description": "d", "tools": [_FUNCTION]},
            {"type": "web_search"},
        ]
    ),
    max_size=3,
    unique_by=str,
)
_RESPONSE = st.builds(
    lambda fields, stream: fields | stream,
    st.fixed_dictionaries(
        {
            "input": PLAIN
            | st.builds(lambda turn, rest: [turn, *rest], _TURN, st.lists(_TURN | _OTHER_ITEMS)),
            "max_output_tokens": st.integers(1, MAX_TOKENS),
        },
        optional={name: each for name, each in _SHARED.items() if name != "n"}
        | {
            "instructions": PLAIN,
            "tools": _TOOLS,
            "tool_choice": st.sampled_from(["auto", "none"]),
            "reasoning": st.sampled_from([{}, {"effort": "low"}, {"summary": "auto"}]),
            "text": st.sampled_from([{}, {"format": {"type": "text"}}, {"verbosity": "low"}]),
            "include": st.lists(st.sampled_from(["message.output_text.logprobs", "zzz"]), max_size=2),
            "top_logprobs": st.integers(0, 20),
            "truncation": st.sampled_from(["auto", "disabled"]),
            "metadata": st.dictionaries(PLAIN, PLAIN, max_size=2),
            "store": st.booleans(),
        },
    ),
    st.sampled_from([{}, {"stream": False}, {"stream": True}]),
)


@st.composite
def _with_field_faults(draw: st.DrawFn, valid: st.SearchStrategy[dict[str, Any]], names: list[str]) -> Any:
    """A body with some wrong, missing or unknown fields."""
    body = copy.deepcopy(draw(valid))  # a strategy may return the same object again
    for _ in range(draw(st.integers(0, _MAX_FAULTS))):
        match draw(st.sampled_from(["set", "set", "inside", "text", "drop", "unknown"])):
            case "set":
                body[draw(st.sampled_from(names))] = copy.deepcopy(draw(_ODD))
            case "inside":
                container, key = draw(st.sampled_from(_items(body)))
                container[key] = copy.deepcopy(draw(_ODD))
            case "text":
                container, key = draw(st.sampled_from(_items(body)))
                container[key] = draw(_ODD_TEXTS)
            case "drop":
                body.pop(draw(st.sampled_from(sorted(body) or [""])), None)
            case _:
                body[draw(_TEXTS)] = copy.deepcopy(draw(_ODD))
    return body


def _items(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of each item at each level, outermost first."""
    if not isinstance(value, dict | list):
        return [({}, 0)]
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    inner = [each for _, item in items if isinstance(item, dict | list) and item for each in _items(item)]
    return [(value, key) for key, _ in items] + inner or [({}, 0)]


@st.composite
def _as_bytes(draw: st.DrawFn, body: dict[str, Any]) -> bytes:
    """The body as JSON, sometimes malformed."""
    data = json.dumps(body, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if not draw(st.sampled_from([False, False, False, True])):
        return data
    corrupt = draw(st.sampled_from([_corrupted, _with_extra_field, _replaced]))
    corrupted: bytes = draw(corrupt(body, data))
    return corrupted


def _corrupted(_body: dict[str, Any], data: bytes) -> st.SearchStrategy[bytes]:
    """Bytes are cut off, added or replaced."""
    offsets = st.integers(1, len(data))
    bad = st.sampled_from([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\0", b'"', b"}"])
    return st.one_of(
        offsets.map(lambda at: data[:at]),
        st.builds(lambda at, more: data[:at] + more + data[at:], offsets, st.binary(min_size=1, max_size=3)),
        st.builds(lambda at, other: data[:at] + other + data[at + 1 :], offsets, bad),
        st.sampled_from([b"\xef\xbb\xbf", b"[", b"\0", b" \n\t"]).map(lambda before: before + data),
    )


def _with_extra_field(body: dict[str, Any], data: bytes) -> st.SearchStrategy[bytes]:
    """One more field at the end: a duplicate, a deeply nested one, or a number with more digits than Python parses."""

    def add(name: str, value: bytes) -> bytes:
        return data[:-1] + b"," + json.dumps(name).encode() + b":" + value + b"}"

    odd = _ODD.map(lambda value: json.dumps(value).encode())
    deep = st.sampled_from(_DEPTHS).map(lambda depth: b"[" * depth + b"]" * depth)
    digits = st.just(b"1" * _HUGE_DIGITS)
    return st.one_of(
        st.builds(add, st.sampled_from(sorted(body) or [""]), odd),
        st.builds(add, st.sampled_from(["zzz", "metadata", "stop", "messages"]), deep),
        st.builds(add, st.sampled_from(["zzz", "seed", "temperature", "user", "max_tokens"]), digits),
    )


def _replaced(_body: dict[str, Any], data: bytes) -> st.SearchStrategy[bytes]:
    """A different JSON value, or none."""
    others = [b"{}", b"[]", b"null", b'"x"', b"5", b"NaN", data + data, data[::-1], b""]
    return st.sampled_from(others)


def _bodies(
    type_name: str, body: Any, paths: list[str], valid: st.SearchStrategy[dict[str, Any]]
) -> st.SearchStrategy[Body]:
    data = _with_field_faults(valid, sorted(body.__struct_fields__)).flatmap(_as_bytes)
    return st.builds(Body, st.sampled_from(paths), st.just(type_name), data)


BODIES: st.SearchStrategy[Body] = st.one_of(
    *(
        _bodies(endpoint.body.__name__, endpoint.body, [f"/v1{endpoint.path}", endpoint.path], valid)
        for endpoint, valid in zip(GENERATING, (_CHAT, _COMPLETION, _RESPONSE), strict=True)
    ),
    _bodies("MessagesBody", MessagesBody, ["/v1/messages", "/v1/messages?beta=true"], MESSAGE),
    _bodies("CountTokens", MessagesBody, ["/v1/messages/count_tokens"], MESSAGE),
    _bodies("Tokenize", tokenizing.TokenizeTextBody, ["/tokenize"], TOKENIZE),
    _bodies("Detokenize", tokenizing.DetokenizeBody, ["/detokenize"], DETOKENIZE),
)
"""A nearly valid body."""
