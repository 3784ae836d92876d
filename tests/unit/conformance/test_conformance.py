"""The conformance suite itself: a fake server that answers correctly, and variants with one mistake."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.conformance import catalogue, report, runner, schema
from tests.conformance.__main__ import main
from tests.conformance.server import CHAT, Server

ERROR: dict[str, Any] = {
    "message": "No.",
    "type": "invalid_request_error",
    "param": "temperature",
    "code": None,
}
ANSWER: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "a", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}
HEADERS = {"content-type": "application/json", "x-request-id": "r"}


@contextmanager
def serving(status: int, body: bytes, headers: dict[str, str] = HEADERS) -> Iterator[Server]:
    """A server with one answer to everything; status 0 closes the connection."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if not status:
                self.connection.close()
                return
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as fake:
        thread = threading.Thread(target=fake.serve_forever, args=(0.01,))
        thread.start()
        server = Server(f"http://127.0.0.1:{fake.server_port}/v1", "m")
        try:
            yield server
        finally:
            server.close()
            fake.shutdown()
            thread.join()


def look_at(server: Server, name: str) -> runner.Result:
    """One behavior of the catalogue."""
    found = [behavior for behavior in catalogue.load() if behavior.id == name]
    assert len(found) == 1
    return runner.run(server, found)[0]


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in ERROR.items() if key != name}


@pytest.mark.parametrize(
    ("status", "error", "headers", "reason"),
    [
        (400, ERROR, HEADERS, None),
        (400, ERROR | {"param": "temperature.x"}, HEADERS, None),
        (400, ERROR | {"param": "temperature[0]"}, HEADERS, None),
        (422, ERROR, HEADERS, "status 422"),
        (400, without("param"), HEADERS, "no param"),
        (400, without("code"), HEADERS, "no code"),
        (400, ERROR | {"param": "temperatures"}, HEADERS, "param is 'temperatures'"),
        (400, ERROR | {"param": None}, HEADERS, "param is None"),
        (400, ERROR | {"code": 400}, HEADERS, "code is 400"),
        (400, ERROR | {"message": ""}, HEADERS, "message"),
        (400, ERROR | {"type": "BadRequestError"}, HEADERS, "type is"),
        (400, "No.", HEADERS, "no error object"),
        (400, ERROR, HEADERS | {"content-type": "text/plain"}, "content type"),
        (400, ERROR, {"content-type": "application/json"}, "x-request-id"),
    ],
)
def test_refusals(status: int, error: Any, headers: dict[str, str], reason: str | None) -> None:
    """An error passes only if it is complete."""
    with serving(status, json.dumps({"error": error}).encode(), headers) as server:
        result = look_at(server, "errors.chat.temperature=2.1")
    assert result.shown == (reason is None)
    assert (reason or "") in (result.reason or "")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("chat.id", {"id": "cmpl-1"}),
        ("chat.object", {"object": "text_completion"}),
        ("chat.model", {"model": "other"}),
        ("chat.index", {"choices": ANSWER["choices"] * 2}),
        ("chat.logprobs", {"choices": [{"index": 0, "message": {}}]}),
        ("chat.finish_reason", {"choices": []}),
        ("chat.usage.prompt_tokens", {"usage": {"prompt_tokens": True}}),
        ("chat.usage.total_tokens", {"usage": ANSWER["usage"] | {"total_tokens": 3}}),
    ],
)
def test_answers(name: str, change: dict[str, Any]) -> None:
    """Each criterion of the data passes for the expected value and fails for another."""
    with serving(200, json.dumps(ANSWER).encode()) as server:
        assert look_at(server, name).reason is None
    with serving(200, json.dumps(ANSWER | change).encode()) as server:
        assert not look_at(server, name).shown


def chunk(content: str | None = None, reason: str | None = None, **delta: Any) -> dict[str, Any]:
    said = delta if content is None else delta | {"content": content}
    choice = {"index": 0, "delta": said, "finish_reason": reason}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [choice],
    }


CHUNKS = [chunk("", role="assistant"), chunk("a"), chunk("b"), chunk(reason="length")]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("stream.done", [*CHUNKS, "[DONE]", "[DONE]"]),
        ("stream.done", [*CHUNKS]),
        ("stream.id", [*CHUNKS[:2], CHUNKS[2] | {"id": "chatcmpl-2"}, CHUNKS[3], "[DONE]"]),
        ("stream.role", [CHUNKS[1], *CHUNKS, "[DONE]"]),
        ("stream.role", [CHUNKS[0], CHUNKS[0], "[DONE]"]),
        ("stream.last_delta", [*CHUNKS[:3], chunk("c", "length"), "[DONE]"]),
        ("stream.last_delta", [CHUNKS[3], *CHUNKS, "[DONE]"]),
        ("stream.usage.not_asked", [*CHUNKS, CHUNKS[3] | {"usage": {"total_tokens": 1}}, "[DONE]"]),
    ],
)
def test_streams(name: str, wrong: list[Any]) -> None:
    """A correct stream passes; one with a misplaced chunk does not."""
    for frames, shown in (([*CHUNKS, "[DONE]"], True), (wrong, False)):
        lines = [frame if isinstance(frame, str) else json.dumps(frame) for frame in frames]
        body = "".join(f"data: {line}\n\n" for line in lines).encode()
        with serving(200, body, {"content-type": "text/event-stream"}) as server:
            result = look_at(server, name)
        assert (result.shown, bool(result.reason)) == (shown, not shown)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({}, None),
        ({"created": "1"}, "created"),
        ({"usage": {"prompt_tokens": 1}}, "usage"),
        ({"choices": [ANSWER["choices"][0] | {"finish_reason": "eos"}]}, "finish_reason"),
    ],
)
def test_types(change: dict[str, Any], where: str | None) -> None:
    """Answers are validated strictly against the SDK's types."""
    found = schema.complaints(CHAT, "application/json", json.dumps(ANSWER | change).encode())
    assert bool(found) == (where is not None)
    assert (where or "") in "".join(found)


def test_a_server_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The death is reported, and the behaviors after it are not waited for."""
    monkeypatch.setattr(runner, "BACK_SECONDS", 0.0)
    with serving(0, b"") as server:
        results = runner.run(server, catalogue.load("chat.usage"))
    assert [result.died for result in results] == [True] + [False] * (len(results) - 1)
    assert not any(result.shown for result in results)
    assert "has not come back" in str(results[-1].reason)


def test_the_catalogue() -> None:
    """Each behavior has a unique id and a sentence; those about keys are included with a key."""
    without_key, with_key = catalogue.load(), catalogue.load(with_key=True)
    assert len({behavior.id for behavior in with_key}) == len(with_key) > len(without_key)
    assert all(behavior.sentence for behavior in with_key)
    assert {behavior.section for behavior in without_key} == set(catalogue.SECTIONS)


def test_the_table_and_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    """The report has a reason for each missing behavior and a sum; the exit status is 1 with --strict or if the server is unreachable."""
    with serving(400, json.dumps({"error": ERROR}).encode()) as server:
        arguments = ["--url", server.url, "--model", "m", "--only", "errors.chat.te"]
        assert (main(arguments), main([*arguments, "--strict"])) == (0, 0)
        assert capsys.readouterr().out.endswith("9 of 9 behaviors are shown\n")
        arguments[-1] = "errors.chat.top_p="
        assert (main(arguments), main([*arguments, "--strict"])) == (0, 1)
        lines = capsys.readouterr().out
    assert "param is 'temperature', not 'top_p'" in lines
    assert lines.endswith("0 of 3 behaviors are shown\n")
    assert main(arguments) == 1
    assert report.summary([]) == "0 of 0"
