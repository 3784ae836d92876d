"""HTTP: bodies that cannot be written as data, headers, CORS, models by id, and the SDK as a client."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping

import openai

from tests.conformance import judge
from tests.conformance.server import CHAT, LEGACY, Answer, Broken, NotShown, Server, require

_OK = 200
_ORIGIN = "http://localhost:5173"
"""Of a page in development: a server may refuse the origins of other machines."""
_HUGE_BYTES = 20 * 2**30
_DEEP = 40_000


def bad_bytes(server: Server) -> None:
    body = json.dumps(server.fields(CHAT)).encode().replace(b"hello", b"hel\xff\xfelo")
    judge.check_error(server.ask("POST", CHAT, body), 400)


def deep_body(server: Server) -> None:
    body = b'{"messages": ' + b"[" * _DEEP + b"]" * _DEEP + b"}"
    judge.check_error(server.ask("POST", CHAT, body), 400)


def huge_body(server: Server) -> None:
    """Only the content-length is sent, not the body."""
    with server.connect() as connection:
        connection.send(connection.request_headers("POST", CHAT, f"Content-Length: {_HUGE_BYTES}"))
        judge.check_error(connection.read(), 413)


def wrong_key(server: Server) -> None:
    body = json.dumps(server.fields(CHAT)).encode()
    answer = server.ask("POST", CHAT, body, {"authorization": "Bearer sk-wrong"})
    judge.check_error(answer, 401, code="invalid_api_key")


def no_key(server: Server) -> None:
    answer = server.ask("POST", CHAT, json.dumps(server.fields(CHAT)).encode(), {"authorization": ""})
    judge.check_error(answer, 401)


def listed_models(server: Server) -> None:
    listed = [model["id"] for model in server.ask("GET", "/v1/models").json["data"]]
    require(listed, "none is listed")
    for model in listed:
        answer = server.chat(model=model)
        require(answer.status == _OK, f"{model!r} is listed, and answered {answer.status}")
        require(answer.json["model"] == model, f"{model!r} is echoed as {answer.json['model']!r}")


def model_by_id(server: Server) -> None:
    plain = urllib.parse.quote(server.model, safe="/")
    encoded = "".join(f"%{byte:02X}" for byte in server.model.encode())
    for path in (plain, encoded):
        answer = server.ask("GET", f"/v1/models/{path}")
        require(answer.status == _OK, f"/v1/models/{path} is answered {answer.status}")
        require(answer.json["id"] == server.model, f"the id is {answer.json['id']!r}")
        require(answer.json["object"] == "model", f"the object is {answer.json['object']!r}")


def head_as_get(server: Server, path: str) -> None:
    got = server.ask("GET", path)
    with server.connect() as connection:
        connection.send(connection.request_headers("HEAD", path, "Connection: close"))
        status, headers = connection.read_status()
    require(got.status == _OK, f"GET is answered {got.status}")
    require(status == got.status, f"HEAD is answered {status}, GET {got.status}")
    types = [found.get("content-type") for found in (headers, got.headers)]
    require(types[0] == types[1], f"the content types are {types}")


def preflight(server: Server, path: str, method: str) -> None:
    """A bare * does not cover authorization (fetch.spec.whatwg.org, CORS non-wildcard request-header names)."""
    headers = {
        "origin": _ORIGIN,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization, content-type",
    }
    answer = server.ask("OPTIONS", path, None, headers)
    require(_OK <= answer.status < 300, f"status {answer.status}")
    _check_origin(answer)
    judge.check_header(answer, "access-control-allow-methods", rf"\b{method}\b|\*")
    judge.check_header(answer, "access-control-allow-headers", r"\bauthorization\b")


def _check_origin(answer: Answer) -> None:
    origin = answer.headers.get("access-control-allow-origin")
    require(origin in ("*", _ORIGIN), f"access-control-allow-origin is {origin}")


def cors_on_answers(server: Server) -> None:
    body = json.dumps(server.fields(CHAT)).encode()
    _check_origin(server.ask("POST", CHAT, body, {"origin": _ORIGIN}))
    _check_origin(server.ask("GET", "/v1/models", None, {"origin": _ORIGIN}))


def cors_on_errors(server: Server) -> None:
    _check_origin(server.ask("POST", CHAT, b"{", {"origin": _ORIGIN}))
    _check_origin(server.ask("GET", "/v1/nothing", None, {"origin": _ORIGIN}))


def cors_on_streams(server: Server) -> None:
    body = json.dumps(server.fields(CHAT) | {"stream": True}).encode()
    answer = server.ask("POST", CHAT, body, {"origin": _ORIGIN})
    require(answer.status == _OK, f"status {answer.status}")
    _check_origin(answer)


def request_ids_differ(server: Server) -> None:
    found = [server.chat(), server.chat(), server.chat(n=0), server.ask("GET", "/v1/models")]
    ids = [answer.headers.get("x-request-id") for answer in found]
    require(all(ids) and len(set(ids)) == len(ids), f"they are {ids}")


def http_1_0(server: Server) -> None:
    body = json.dumps(server.fields(CHAT)).encode()
    with server.connect() as connection:
        connection.send(
            connection.request_headers("POST", CHAT, f"Content-Length: {len(body)}", version="1.0") + body
        )
        answer = connection.read()
    require(answer.status == _OK, f"status {answer.status}")
    require(isinstance(answer.text(), str), "there is no text")


def not_http(server: Server) -> None:
    for sent in (
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /health\r\n\r\n",
    ):
        with server.connect() as connection:
            connection.send(sent)
            try:
                status, _ = connection.read_status()
            except Broken:
                continue  # closing the connection counts as a refusal
            require(400 <= status < 500, f"{sent[:10]!r} is answered {status}")
    require(server.chat().status == _OK, "the next request is not answered")


def no_useless_retries(server: Server) -> None:
    answer = server.chat(temperature=9)
    judge.check_error(answer, 400, param="temperature")
    require("retry-after" not in answer.headers, "a 400 has Retry-After")
    require(answer.headers.get("x-should-retry") in (None, "false"), "a 400 asks for a retry")


def _sdk_completes(client: openai.OpenAI, model: str) -> None:
    require([each.id for each in client.models.list()], "no models are listed")
    text = client.completions.create(model=model, prompt="The sea", max_tokens=2).choices[0].text
    require(isinstance(text, str), "a completion has no text")


def _sdk_chats(client: openai.OpenAI, model: str) -> None:
    chats = client.chat.completions
    plain = chats.create(
        model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=3, temperature=0
    )
    with chats.stream(
        model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=3, temperature=0
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    require(text == plain.choices[0].message.content, "the streamed text differs")


def sdk(server: Server) -> None:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=server.key or "none", max_retries=0, timeout=server.left_seconds
    ) as client:
        try:
            _sdk_completes(client, server.model)
            _sdk_chats(client, server.model)
        except openai.OpenAIError as error:
            raise NotShown(f"{type(error).__name__}: {error}") from None
        try:
            client.chat.completions.create(model=server.model, messages=[], max_tokens=1)
        except openai.BadRequestError as error:
            require(error.param == "messages", f"error.param is {error.param!r}")
        except openai.OpenAIError as error:
            raise NotShown(f"no messages are {type(error).__name__}") from None
        else:
            raise NotShown("no messages are answered")


def every_answer_validates(server: Server) -> None:
    """Runs last, and requests one answer of each kind itself."""
    asked: Mapping[str, list[dict[str, object]]] = {
        CHAT: [{}, {"stream": True, "logprobs": True, "stream_options": {"include_usage": True}}],
        LEGACY: [{"logprobs": 1}, {"stream": True}],
    }
    for path, kinds in asked.items():
        for fields in kinds:
            require(server.post(path, fields).status == _OK, f"{path} with {fields} is not answered")
    server.ask("GET", "/v1/models")
    found = sorted(set(server.complaints))
    require(not found, f"{len(found)} complaints: {'; '.join(found[:2])}")
