"""Concurrent requests, and clients that misbehave. Order is checked, never a duration."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.conformance import judge, probes
from tests.conformance.server import CHAT, Answer, NotShown, Server, require

_OK, _BAD = 200, 400
_LONG_WORDS = 1500
_LONG_SECONDS = 120.0
"""For the long prompt on a slow machine: only the order of the answers is checked."""


def _body(server: Server, **fields: Any) -> bytes:
    return json.dumps(server.fields(CHAT) | fields).encode()


def _still_answers(server: Server) -> None:
    answer = server.chat()
    require(answer.status == _OK, f"the next request is answered {answer.status}")


def forty(server: Server) -> None:
    statuses = [answer.status for answer in server.concurrently([(CHAT, {})] * 40)]
    require(set(statuses) == {_OK}, f"{len(statuses) - statuses.count(_OK)} of 40 are not answered 200")


def streams_at_once(server: Server) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"max_tokens": 4, "stream": True, "messages": [{"role": "user", "content": f"Say {i}."}]})
        for i in range(8)
    ]
    alone = ["".join(server.post(*each).texts()) for each in asked]
    together = ["".join(answer.texts()) for answer in server.concurrently(asked)]
    require(alone == together, "some texts differ")


def half_sent(server: Server) -> None:
    connections = [server.connect() for _ in range(30)]
    try:
        for connection in connections:
            connection.send(connection.post(CHAT, _body(server))[:-20])
        _still_answers(server)
    finally:
        for connection in connections:
            connection.close()
    _still_answers(server)


def half_heads(server: Server) -> None:
    connections = [server.connect() for _ in range(30)]
    try:
        for connection in connections:
            connection.send(connection.post(CHAT, b"")[:40])
        _still_answers(server)
    finally:
        for connection in connections:
            connection.close()
    _still_answers(server)


def _one_connection(server: Server, *asked: tuple[bytes, int]) -> list[Answer]:
    answers = []
    with server.connect() as connection:
        for i, (body, status) in enumerate(asked):
            connection.send(connection.post(CHAT, body))
            answers.append(connection.read())
            require(
                answers[-1].status == status,
                f"request {i + 1} is answered {answers[-1].status}, not {status}",
            )
    return answers


def keep_alive(server: Server) -> None:
    good, bad = _body(server), _body(server, temperature=9)
    _one_connection(server, (good, _OK), (bad, _BAD), (good, _OK), (b"{", _BAD), (good, _OK))


def keep_alive_after_stream(server: Server) -> None:
    stream, plain = _body(server, stream=True), _body(server)
    answers = _one_connection(server, (stream, _OK), (plain, _OK), (stream, _OK))
    require(answers[2].frames[-1:] == ["[DONE]"], "the second stream has no end")


def chunked_body(server: Server) -> None:
    body = _body(server)
    with server.connect() as connection:
        connection.send(connection.request_headers("POST", CHAT, "Transfer-Encoding: chunked"))
        for begin in range(0, len(body), 7):
            piece = body[begin : begin + 7]
            connection.send(b"%x\r\n%s\r\n" % (len(piece), piece))
        connection.send(b"0\r\n\r\n")
        answer = connection.read()
    require(answer.status == _OK, f"status {answer.status}")
    require(isinstance(answer.text(), str), "there is no text")


def expect_continue(server: Server) -> None:
    body = _body(server)
    with server.connect() as connection:
        connection.send(
            connection.request_headers("POST", CHAT, f"Content-Length: {len(body)}", "Expect: 100-continue")
        )
        status, _ = connection.read_status()
        require(status == 100, f"status {status}, not 100")
        connection.send(body)
        answer = connection.read()
    require(answer.status == _OK, f"status {answer.status}")


def abort_in_body(server: Server) -> None:
    for _ in range(10):
        with server.connect() as connection:
            connection.send(connection.post(CHAT, _body(server))[:-30])
    _still_answers(server)


def abort_in_stream(server: Server) -> None:
    for _ in range(4):
        lines = server.lines(CHAT, {"max_tokens": 200})
        require(next(lines, None) is not None, "the stream is empty")
        lines.close()  # type: ignore[attr-defined]
    _still_answers(server)


def abort_waiting(server: Server) -> None:
    for _ in range(4):
        with server.connect() as connection:
            connection.send(connection.post(CHAT, _body(server, max_tokens=200)))
    _still_answers(server)


def short_beside_long(server: Server) -> None:
    """The short request is sent after the long one has been sent."""
    long = [{"role": "user", "content": "The sea is wide and blue. " * (_LONG_WORDS // 6)}]
    server.set_deadline(_LONG_SECONDS)
    ended: list[str] = []
    sent = threading.Event()

    def ask_long() -> int:
        with server.connect() as connection:
            connection.send(connection.post(CHAT, _body(server, messages=long)))
            sent.set()
            status = connection.read().status
        ended.append("long")
        return status

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(ask_long)
        sent.wait(server.left_seconds)
        server.ask("GET", "/v1/models")
        short = server.chat().status
        ended.append("short")
        statuses = (short, running.result())
    require(statuses == (_OK, _OK), f"they are answered {statuses}")
    require(ended[0] == "short", "the short request waited for the long one")


def health_under_load(server: Server) -> None:
    """While each of four streams has begun and none has ended."""
    letter_id = next(iter(probes.letters(server)))
    fields = {"max_tokens": 40} | probes.biased(letter_id)
    running = [server.lines(CHAT, fields) for _ in range(4)]
    try:
        for lines in running:
            require(next(lines, None) is not None, "a stream is empty")
        answer = server.ask("GET", "/health")
    finally:
        for lines in running:
            lines.close()  # type: ignore[attr-defined]
    require(answer.status == _OK, f"status {answer.status}")


def bad_beside_good(server: Server) -> None:
    good: dict[str, Any] = {"max_tokens": 4}
    alone = server.post(CHAT, good).text()
    bad: list[dict[str, Any]] = [{"temperature": 9}, {"stop": 5}, {"logit_bias": {"99999999": 1}}, {"n": 0}]
    answers = server.concurrently([(CHAT, fields) for each in bad for fields in (good, each)])
    for i, answer in enumerate(answers):
        if i % 2:
            judge.check_error(answer, 400, param=next(iter(bad[i // 2])))
        elif answer.text() != alone:
            raise NotShown(f"a valid request is answered {answer.text()!r}, not {alone!r}")


def slow_body(server: Server) -> None:
    with server.connect() as connection:
        for byte in connection.post(CHAT, _body(server)):
            connection.send(bytes([byte]))
        answer = connection.read()
    require(answer.status == _OK, f"status {answer.status}")
