"""The OpenAPI description is valid and agrees with the code."""

from __future__ import annotations

import json
import re
from typing import Any

import falcon.asgi
import msgspec
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from api import app
from api.http.paths import NotServed
from api.openai.chat import request as chat_request
from api.openai.completions import request as completion_request
from api.openai.errors import error_body
from api.openai.responses import request as response_request
from api.openapi import document as openapi
from api.openapi.generating import GENERATING
from common.errors import RequestError
from common.settings import Settings

HI = [{"role": "user", "content": "hi"}]
SETTINGS = Settings()
PARSERS = {
    "ChatBody": chat_request.parse,
    "CompletionBody": completion_request.parse,
    "ResponsesBody": response_request.parse,
}


def described(settings: Settings = SETTINGS) -> Any:
    """As a client reads it."""
    return json.loads(msgspec.json.encode(openapi.document(settings)))


def validator(name: str, settings: Settings = SETTINGS) -> Draft202012Validator:
    document = described(settings)
    return Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    )


def is_parsed(name: str, body: Any) -> bool:
    try:
        PARSERS[name](json.dumps(body).encode())
    except RequestError as error:
        return error.param is None  # that would be a mistake in the test
    return True


@pytest.mark.parametrize("strict", [False, True])
def test_it_is_valid(strict: bool) -> None:
    """By the specification of OpenAPI 3.1, and each schema by JSON Schema's."""
    document = described(Settings(strict_parameters=strict))
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_nothing_is_described_that_is_not_used() -> None:
    """Each component is referred to, and each reference leads somewhere (the validator follows them)."""
    document = described()
    used = set(re.findall(r'"#/components/([^"]+)"', json.dumps(document)))
    components = document["components"]
    unused = {
        f"{kind}/{name}" for kind in ("schemas", "headers", "parameters") for name in components[kind]
    } - used
    assert unused == set()


def test_every_route_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths and methods are those that the application routes."""
    routes: dict[str, set[str]] = {}
    add_route = falcon.asgi.App.add_route

    def note(self: Any, path: str, resource: Any, suffix: str | None = None) -> None:
        end = f"_{suffix}" if suffix else ""
        if isinstance(resource, NotServed):
            return
        methods = {m.lower() for m in falcon.HTTP_METHODS if hasattr(resource, f"on_{m.lower()}{end}")}
        routes[path.replace(":path}", "}")] = methods
        add_route(self, path, resource, suffix=suffix) if suffix else add_route(self, path, resource)

    monkeypatch.setattr(falcon.asgi.App, "add_route", note)
    app.create_app(SETTINGS)
    paths = described()["paths"]
    assert routes == {path: set(item) - {"parameters"} for path, item in paths.items()}


def test_every_operation_has_a_name_of_its_own() -> None:
    """Client generators turn them into function names."""
    names = [
        operation["operationId"]
        for item in described()["paths"].values()
        for method, operation in item.items()
        if method != "parameters"
    ]
    assert len(names) == len(set(names)) >= 20


def test_every_field_is_described() -> None:
    """Those of the types that parse requests, with the constraints of the tables."""
    schemas = described()["components"]["schemas"]
    for endpoint in GENERATING:
        schema = schemas[endpoint.body.__name__]
        assert set(schema["properties"]) == set(endpoint.body.__struct_fields__)
        assert set(endpoint.neutral) | set(endpoint.only_with) <= set(schema["properties"])
        assert is_parsed(endpoint.body.__name__, endpoint.example)
        assert validator(endpoint.body.__name__).is_valid(endpoint.example)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"messages": []},
        {"messages": None},
        {"messages": [{"content": "hi"}]},
        {"messages": [{"role": "wizard", "content": "hi"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"stop": "x"},
        {"stop": ""},
        {"stop": []},
        {"stop": ["a", ""]},
        {"stop": list("abcd")},
        {"stop": list("abcde")},
        {"logit_bias": {"0": 1, "17": -100}},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"01": 1}},
        {"logit_bias": {"1": 101}},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 20},
        {"logprobs": True, "top_logprobs": 21},
        {"logprobs": False, "top_logprobs": 1},
        {"logprobs": None, "top_logprobs": None},
        {"top_logprobs": 0},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_usage": 1}},
        {"stream_options": {}},
        {"stream": False, "stream_options": {}},
        {"max_tokens": 0},
        {"max_tokens": "5"},
        {"temperature": 2},
        {"temperature": 2.1},
        {"temperature": True},
        {"seed": 2**63},
        {"repetition_penalty": 0},
        {"n": 1},
        {"n": 0},
        {"service_tier": "auto"},
        {"service_tier": "flux"},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "yaml"}},
        {"response_format": None},
        {"modalities": ["text"]},
        {"modalities": ["audio"]},
        {"store": False},
        {"store": True},
        {"zzz": 1},
    ],
    ids=json.dumps,
)
def test_it_accepts_and_refuses_the_same_as_the_chat_parser(fields: dict[str, Any]) -> None:
    """The two agree on each body."""
    body = {"messages": HI} | fields
    assert validator("ChatBody").is_valid(body) == is_parsed("ChatBody", body)
    assert not is_parsed("ChatBody", fields) or "messages" in fields
    assert not validator("ChatBody").is_valid({k: v for k, v in body.items() if k != "messages"})


@pytest.mark.parametrize(
    "prompt",
    [None, "", "a", [], ["a"], [1, 2], [[1, 2]], [[]], [1, "a"], [1, [2]], [["a"]], [True], [1.5], 5, {}],
    ids=json.dumps,
)
def test_it_accepts_and_refuses_the_same_as_the_completion_parser(prompt: Any) -> None:
    """The two agree on each kind of prompt, and that there has to be one."""
    body = {"prompt": prompt}
    assert validator("CompletionBody").is_valid(body) == is_parsed("CompletionBody", body)
    assert not validator("CompletionBody").is_valid({})
    assert not is_parsed("CompletionBody", {})


def test_a_strict_server_is_described_as_strict() -> None:
    """If an unknown field is a 400, the schema does not allow it."""
    strict = validator("ChatBody", Settings(strict_parameters=True))
    assert strict.is_valid({"messages": HI})
    assert not strict.is_valid({"messages": HI, "zzz": 1})


def test_errors_are_as_described() -> None:
    """With all four keys, null or not, and no other."""
    body = json.loads(error_body(RequestError("no", param="n")))
    assert body == {"error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": None}}
    error = validator("ErrorBody")
    assert error.is_valid(body)
    for key in body["error"]:
        assert not error.is_valid({"error": {k: v for k, v in body["error"].items() if k != key}})


def test_patterns_are_of_the_language_that_clients_have() -> None:
    """JSON Schema's expressions are ECMA-262's, where Python's own escapes are an error, or match nothing."""
    patterns = re.findall(r'"pattern": "(.*?)(?<!\\)"', json.dumps(described()))
    assert len(patterns) >= 3
    assert not [pattern for pattern in patterns if "\\Z" in pattern or "\\A" in pattern or "(?P" in pattern]
    names = validator("FunctionDefinition")
    assert [names.is_valid({"name": name}) for name in ("f_1-F", "f\n", "a b", "")] == [
        True,
        False,
        False,
        False,
    ]
