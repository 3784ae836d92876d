"""What `POST /v1/chat/completions` accepts and refuses, without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.generation.request import GenerationRequest
from api.http import unknown_keys
from api.openai.answer import AnswerOptions
from api.openai.chat import request as chat_request
from common.errors import RequestError
from common.protocol import ChatPrompt

HI = [{"role": "user", "content": "hi"}]


def parse(**fields: Any) -> GenerationRequest:
    return chat_request.parse(json.dumps({"messages": HI} | fields).encode())


def refusal(body: bytes) -> RequestError:
    with pytest.raises(RequestError) as raised:
        chat_request.parse(body)
    assert raised.value.status == 400
    assert raised.value.type == "invalid_request_error"
    return raised.value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"5",
        b'{"messages":[{"role":"user","content":"hi"}]}x',
        b"\xef\xbb\xbf{}",
        b'{"model":"\xff"}',
        b'{"unknown":"\xff"}',
        b'{"model":"\\ud800"}',
        b'{"temperature":NaN}',
        b'{"temperature":Infinity}',
        b'{"temperature":-Infinity}',
        b'{"unknown":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prediction":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
def test_a_body_that_is_not_a_json_object_is_refused(body: bytes) -> None:
    """Any bytes are answered with a 400 without a `param`, never with an internal error."""
    assert refusal(body).param is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": "x"}, "expected `array`, got `string`"),
        ({"temperature": 3}, "expected `number` <= 2.0"),
        ({"temperature": True}, "expected `number`, got `boolean`"),
        ({"max_tokens": "5"}, "expected `integer`, got `string`"),
        ({"max_tokens": 1.5}, "expected `integer`, got `float`"),
        ({"stop": 1.5}, "expected `string | array`, got `number`"),
        ({"stream": None, "logit_bias": []}, "expected `object`, got `array`"),
        ({"service_tier": {}}, "expected `string`, got `object`"),
        ({"messages": [{"role": "`str`", "content": "x"}]}, "invalid enum value '`str`'"),
    ],
)
def test_types_have_jsons_names(fields: dict[str, Any], words: str) -> None:
    """Types have JSON's names, not Python's; values of the client are quoted unchanged."""
    assert words in refusal(json.dumps({"messages": HI} | fields).encode()).message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 5}, "model"),
        ({"model": True}, "model"),
        ({"model": ["a"]}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": {"role": "user"}}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": None, "content": "hi"}]}, "messages[0].role"),
        ({"messages": [*HI, {"role": "wizard", "content": "hi"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": {"type": "text"}}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0].text",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages[0].content[0].type"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "what is it?"},
                            {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}},
                        ],
                    }
                ]
            },
            "messages[0].content[1].type",
        ),
        ({"messages": [{"role": "user", "content": "hi", "name": 5}]}, "messages[0].name"),
        ({"messages": [{"role": "assistant", "content": "x", "audio": {"id": "a"}}]}, "messages[0].audio"),
        ({"role_mapping": {"user": 5}}, "role_mapping"),
        ({"role_mapping": "USER"}, "role_mapping"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 10**40}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"stop": 5}, "stop"),
        ({"stop": [None]}, "stop[0]"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stop": [str(i) for i in range(65)]}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1}, "repetition_penalty"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"repetition_context_size": 0}, "repetition_context_size"),
        ({"repetition_context_size": -1}, "repetition_context_size"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"1.5": 1}}, "logit_bias.1.5"),
        ({"logit_bias": {"-0": 1}}, "logit_bias.-0"),
        ({"logit_bias": {"5\n": 1}}, "logit_bias.5\n"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": -101}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": "true"}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"safety_identifier": 5}, "safety_identifier"),
        ({"prompt_cache_key": ["k"]}, "prompt_cache_key"),
        ({"prompt_cache_retention": True}, "prompt_cache_retention"),
        ({"prompt_cache_options": "explicit"}, "prompt_cache_options"),
        ({"metadata": "x"}, "metadata"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": "x"}}},
            "response_format.json_schema.schema",
        ),
    ],
    ids=lambda value: json.dumps(value)[:80] if isinstance(value, dict) else None,
)
def test_invalid_values_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    """Types, ranges and shapes outside of OpenAI's description are a 400 with the field in `param`."""
    assert refusal(json.dumps({"messages": HI} | fields).encode()).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"moderation": {"model": "omni-moderation-latest"}}, "moderation"),
    ],
)
def test_unsupported_parameters_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    """A parameter of OpenAI's that would change the answer is never ignored."""
    error = refusal(json.dumps({"messages": HI} | fields).encode())
    assert (error.param, error.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"presence_penalty": 0, "frequency_penalty": 0.0},
        {"response_format": {"type": "text"}},
        {"tools": [], "tool_choice": "none"},
        {"tool_choice": "auto"},
        {"functions": [], "function_call": "none"},
        {"modalities": ["text"]},
        {
            "store": False,
            "metadata": {"a" * 64: "b" * 512} | {str(i): "" for i in range(15)},
            "user": "u",
            "safety_identifier": "s" * 64,
            "prompt_cache_key": "p",
            "prompt_cache_retention": "24h",
            "prompt_cache_options": {"mode": "implicit"},
        },
        {"service_tier": "auto"},
        {"stream": True, "stream_options": {}},
        {"stream": True, "stream_options": {"include_usage": False}},
        {"stop": []},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"stream_options": {}},
        {"logprobs": False, "top_logprobs": 0},
        {"user": 5, "metadata": {"a": {"b": 1}, "c" * 65: "d" * 513}},
    ],
)
def test_values_without_an_effect_are_accepted(fields: dict[str, Any]) -> None:
    """Neutral values, which SDKs and frameworks often send, are accepted and count as known fields."""
    assert parse(**fields).ignored == []


def test_an_explicit_null_is_the_default() -> None:
    """Every field of ours as null gives the same request as none of them."""
    names = set(chat_request.ChatBody.__struct_fields__) - {"messages"}
    nulls, plain = parse(**dict.fromkeys(names)), parse()
    assert nulls.sampling.seed != plain.sampling.seed  # each draws its own
    for name in (
        "model",
        "prompts",
        "max_tokens",
        "stop",
        "top_logprobs",
        "stream",
        "ignored",
        "options",
    ):
        assert getattr(nulls, name) == getattr(plain, name)
    assert plain.max_tokens is None
    assert (plain.sampling.temperature, plain.sampling.top_p) == (1.0, 1.0)


def test_messages_in_the_form_that_templates_expect() -> None:
    """Text parts are joined, `developer` becomes `system`, a name is kept, and other fields of an answer are dropped."""
    request = parse(
        messages=[
            {"role": "developer", "content": "be kind"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                "name": "n",
            },
            {"role": "assistant", "content": "c", "refusal": None, "annotations": [], "tool_calls": None},
            {"role": "user", "content": ""},
        ],
        role_mapping={"user": "U: "},
    )
    assert request.prompts[0] == ChatPrompt(
        [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "ab", "name": "n"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": ""},
        ],
        {"user": "U: "},
    )


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"a": 1}', {"a": 1}),
        (" ", {}),
        ('{"text": "cut he', '{"text": "cut he'),
        ("[1]", "[1]"),
        ('{"a": NaN}', '{"a": NaN}'),
        ('{"a":' + "[" * 100_000, '{"a":' + "[" * 100_000),
    ],
    ids=lambda value: str(value)[:20],
)
def test_calls_of_an_answer_can_be_sent_back(text: str, arguments: Any) -> None:
    """Arguments that are a JSON object become one for the template; those of a truncated call are kept as text."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": text}}
    request = parse(messages=[*HI, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert isinstance(request.prompts[0], ChatPrompt)
    assert request.prompts[0].messages[1]["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "x" * 100_000}},
        {"chat_template_kwargs": {"x" * 100_000: 1}},
    ],
    ids=lambda fields: next(reversed(fields)),
)
def test_an_error_does_not_repeat_a_whole_body(fields: dict[str, Any]) -> None:
    """The client's value is quoted only up to a limit, since the error is logged too."""
    error = refusal(json.dumps({"messages": HI} | fields).encode())
    assert len(error.message) + len(error.param or "") < 600


def test_the_number_of_reported_unknown_fields_is_bounded() -> None:
    """The first ones are reported, in order."""
    names = [f"f{i}" for i in range(1000)]
    assert parse(**dict.fromkeys(names, 1)).ignored == names[: unknown_keys.MAX_REPORTED_KEYS]


def test_sampling_fields_reach_the_worker() -> None:
    """Each supported field arrives where the worker looks for it."""
    request = parse(
        model="m",
        temperature=0.5,
        top_p=0.25,
        seed=-5,
        repetition_penalty=1.5,
        repetition_context_size=7,
        logit_bias={"5": -100, "6": 1.5},
        stop="END",
        max_completion_tokens=9,
        logprobs=True,
        top_logprobs=3,
        stream=True,
        stream_options={"include_usage": True},
        service_tier="default",
    )
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 0.25, -5)
    assert (sampling.repetition_penalty, sampling.repetition_context_size) == (1.5, 7)
    assert sampling.logit_bias == {5: -100.0, 6: 1.5}
    assert (request.stop, request.max_tokens, request.top_logprobs) == (["END"], 9, 3)
    assert (request.model, request.stream) == ("m", True)
    assert request.options == AnswerOptions(include_usage=True, service_tier="default", with_logprobs=True)


def test_logprobs_without_alternatives() -> None:
    """`logprobs` alone asks for each token's own."""
    assert parse(logprobs=True).top_logprobs == 0
    assert parse(logprobs=False).top_logprobs is None


def test_top_p_zero_is_greedy() -> None:
    """In the limit of a nucleus without mass only the most likely token is left."""
    sampling = parse(top_p=0, temperature=1).sampling
    assert (sampling.temperature, sampling.top_p) == (0.0, 1.0)


def test_unknown_fields_are_reported() -> None:
    """They are accepted, and reported in their order."""
    assert parse(zzz=1, mirostat=0.1).ignored == ["zzz", "mirostat"]


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"stream": True, "stream_options": {"includes_usage": True}}, "stream_options.includes_usage"),
        ({"tools": [{"type": "function", "function": {"name": "f", "foo": {}}}]}, "tools[0].function.foo"),
        ({"tools": [{"type": "function", "function": {"name": "f"}, "foo": {}}]}, "tools[0].foo"),
        ({"messages": [{**HI[0], "cache_control": {"type": "ephemeral"}}]}, "messages[0].cache_control"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "foo": 1}]}]},
            "messages[0].content[0].foo",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schem": {}}}},
            "response_format.json_schema.schem",
        ),
    ],
)
def test_unknown_keys_inside_a_field_are_reported(fields: dict[str, Any], path: str) -> None:
    """An unknown key is ignored and named wherever it is."""
    assert parse(**fields).ignored == [path]


def test_errors_do_not_quote_a_complete_value() -> None:
    """The error for a value of a megabyte is short."""
    error = refusal(json.dumps({"messages": [{"role": "x" * 1_000_000, "content": "hi"}]}).encode())
    assert len(error.message) < 500


def test_a_quoted_value_is_not_taken_for_a_path() -> None:
    """msgspec's message quotes the value, which may look like the end of a message."""
    body = json.dumps({"messages": [{"role": "x` - at `$.model", "content": "hi"}]}).encode()
    assert refusal(body).param == "messages[0].role"
