"""gunicorn 27: what `api/http/connection.py` and `api/server.py` rely on in its internals. A connection is served on loopback."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from gunicorn.asgi.protocol import ASGIProtocol
from gunicorn.config import Config
from gunicorn.glogging import Logger
from gunicorn.workers import gasgi
from gunicorn.workers.base import Worker

from api.server import options
from common.settings import Settings
from tests.contract.signatures import accepts, parameters

REQUEST = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


METHODS = [
    ("connection_made", ["transport"]),
    ("connection_lost", ["exc"]),
    ("data_received", ["data"]),
    ("pause_writing", []),
    ("resume_writing", []),
    ("_feed_callback_parser", ["data"]),
    ("_arm_keepalive_timer", []),
    ("_cancel_keepalive_timer", []),
    ("_send_response_start", ["status", "headers", "request", "close"]),
    ("_serve_http_request", ["request", "sockname", "peername"]),
    ("_close_transport", []),
    ("_resume_reading", []),
    ("_safe_write", ["data"]),
    ("_send_error_response", ["status", "message", "extra_headers"]),
]


class Spy(ASGIProtocol):
    """Counts the calls of gunicorn's methods."""

    def __init__(self, worker: Any) -> None:
        self.calls: Counter[str] = Counter()
        super().__init__(worker)


def _counted(name: str) -> Any:
    method = getattr(ASGIProtocol, name)

    def call(self: Spy, *arguments: Any, **options: Any) -> Any:
        self.calls[name] += 1
        return method(self, *arguments, **options)

    return call


for _name, _ in METHODS:
    setattr(Spy, _name, _counted(_name))


async def _app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    await receive()
    headers = [(b"content-length", b"2"), (b"connection", b"close")][: 1 + (scope["path"] == "/close")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


def _worker(loop: asyncio.AbstractEventLoop) -> Any:
    config = Config()
    config.set("asgi_disconnect_grace_period", 0)
    return SimpleNamespace(
        cfg=config, log=Mock(access_log_enabled=False), asgi=_app, loop=loop, nr_conns=0, nr=0, alive=True, state={},
        max_requests=100, pid=1, ppid=1,
    )  # fmt: skip


def _exchange(*requests: bytes) -> tuple[bytes, Counter[str], Any]:
    """The response bytes of a connection until it is closed, the methods that were called, and the protocol object."""
    made: list[Spy] = []

    async def run() -> bytes:
        loop = asyncio.get_running_loop()
        worker = _worker(loop)

        def make() -> Spy:
            made.append(Spy(worker))
            return made[-1]

        async with await loop.create_server(make, "127.0.0.1", 0) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            answers = b""
            try:
                for request in requests:
                    writer.write(request)
                    answers += await asyncio.wait_for(reader.read(65536), 5)
            finally:
                writer.close()
                await writer.wait_closed()
            await asyncio.wait([made[0]._task], timeout=5)
            assert not worker.log.exception.called
            return answers

    answers = asyncio.run(run())
    return answers, made[0].calls, made[0]


def test_worker_makes_the_rebound_protocol() -> None:
    """`install` rebinds `gasgi.ASGIProtocol`, which the worker looks up for each connection. Otherwise no limit would apply.

    Open api/http/connection.py, `install`.
    """
    makers = [const for const in gasgi.ASGIWorker._serve.__code__.co_consts if inspect.iscode(const)]
    assert any("ASGIProtocol" in maker.co_names for maker in makers)
    assert hasattr(gasgi, "ASGIProtocol"), "the worker creates connections through a global of its module"
    assert parameters(ASGIProtocol.__init__) == ["worker"]


@pytest.mark.parametrize(("name", "expected"), METHODS)
def test_methods_of_a_connection(name: str, expected: list[str]) -> None:
    """`Connection` overrides or calls this method of gunicorn with these parameters. Open api/http/connection.py."""
    assert parameters(getattr(ASGIProtocol, name)) == expected


def test_methods_are_called_for_a_request() -> None:
    """gunicorn passes each request through the methods that `Connection` overrides: its timers depend on them.

    Open api/http/connection.py.
    """
    answers, calls, protocol = _exchange(REQUEST, REQUEST)
    assert answers.count(b"HTTP/1.1 200 OK") == 2
    called = {
        "connection_made",
        "connection_lost",
        "data_received",
        "_feed_callback_parser",
        "_arm_keepalive_timer",
        "_send_response_start",
        "_serve_http_request",
        "_close_transport",
    }
    assert called <= calls.keys()
    assert calls["_serve_http_request"] == 2
    assert protocol._closed


def test_errors_pass_one_method() -> None:
    """Malformed HTTP is answered by `_send_error_response`, then `_close_transport`: ours sends JSON and lingers.

    Open api/http/connection.py, `_send_error_response`.
    """
    _, calls, _ = _exchange(b"NOT HTTP\r\n\r\n")
    assert calls["_send_error_response"] == 1
    assert calls["_close_transport"] >= 1


def test_the_path_of_a_malformed_request() -> None:
    """The parser keeps the target of a request line that it has read: errors are in the format of that path.

    Open api/http/connection.py, `_path`.
    """
    _, _, protocol = _exchange(b"GET /a?b=c HTTP/1.1\r\nno header\r\n\r\n")
    assert protocol._callback_parser.path == b"/a?b=c"


def test_connection_attributes() -> None:
    """`Connection` reads and sets these; gunicorn's loop ends when `_closed` is set and `_request_ready` wakes it.

    Open api/http/connection.py, `_linger`.
    """
    worker = SimpleNamespace(cfg=Config(), log=None, asgi=None)
    protocol = ASGIProtocol(worker)
    for name in ("transport", "_current_request", "_body_receiver", "_request_ready"):
        assert vars(protocol)[name] is None, name
    assert protocol._closed is False
    assert protocol.worker is worker
    loop = inspect.getsource(ASGIProtocol._handle_connection)
    assert "while not self._closed" in loop
    assert "if self._closed or self._current_request is None:\n                    break" in loop
    assert "self._request_ready.set()" in inspect.getsource(ASGIProtocol._keepalive_timeout)


def test_body_receiver() -> None:
    """The receiver of a body that was not read completely is not `_complete`. Open api/http/connection.py, `_close_transport`."""
    receiver = inspect.signature(_receiver_class().__init__)
    assert list(receiver.parameters) == ["self", "request", "protocol"]
    made = _receiver_class()(SimpleNamespace(content_length=3, chunked=False), SimpleNamespace())
    assert made._complete is False
    made.set_complete()
    assert made._complete is True
    made.signal_disconnect()
    assert made._closed is True


def _receiver_class() -> Any:
    import gunicorn.asgi.protocol as module

    return module.BodyReceiver


def test_close_of_the_application_is_ignored() -> None:
    """gunicorn only looks at the request: `Connection: close` from the app does not close the connection. `Connection` does.

    If this fails, `_closes_after_response` can go. Open api/http/connection.py, `_serve_http_request`.
    """
    answers, calls, _ = _exchange(REQUEST.replace(b"GET /", b"GET /close"), REQUEST)
    assert answers.count(b"HTTP/1.1 200 OK") == 2
    assert calls["_serve_http_request"] == 2


def test_headers_reach_the_start_of_a_response_as_bytes() -> None:
    """`Connection` looks for `(b"connection", b"close")` among them. Open api/http/connection.py, `_send_response_start`."""
    source = inspect.getsource(ASGIProtocol._handle_http_request)
    assert "self._send_response_start(" in source
    assert accepts(ASGIProtocol._send_response_start, None, 200, [], None, close=False)


def test_backlog_is_left_out() -> None:
    """The worker calls `create_server` without its backlog, which `post_worker_init` adds by wrapping `worker.loop.create_server`.

    If the call has a backlog now, the wrapper can go. Open api/server.py.
    """
    listen = inspect.getsource(gasgi.ASGIWorker._serve)
    call = listen[listen.index("self.loop.create_server(") :].split(")\n", 1)[0]
    assert "backlog" not in call
    assert "lambda: ASGIProtocol(self)" in call


def test_quick_shutdown() -> None:
    """SIGINT sets `_quick_shutdown`, which skips the lifespan shutdown, before it calls the hook `worker_int`, which clears it.

    Otherwise running requests are not cancelled when the API ends. Open api/server.py, `worker_int`.
    """
    seen: list[bool] = []

    def worker_int(worker: Any) -> None:
        seen.append(worker._quick_shutdown)
        worker._quick_shutdown = False

    worker: Any = object.__new__(gasgi.ASGIWorker)
    worker.alive, worker.cfg, worker._quick_shutdown = True, SimpleNamespace(worker_int=worker_int), False
    worker.handle_quit_signal()
    assert seen == [True]
    assert worker._quick_shutdown is False
    shutdown = inspect.getsource(gasgi.ASGIWorker._shutdown)
    assert "if self.lifespan and not self._quick_shutdown" in shutdown
    assert "graceful_timeout = self.cfg.graceful_timeout" in shutdown, (
        "it is read after the hook, so that the hook can change it"
    )


def test_worker_is_ready_in_its_hook() -> None:
    """`post_worker_init` is called when the loop exists and nothing is served yet: it replaces the protocol. Open api/server.py."""
    start = inspect.getsource(Worker.init_process)
    assert start.index("self.load_wsgi()") < start.index("post_worker_init(self)") < start.index("self.run()")
    made = inspect.getsource(gasgi.ASGIWorker.init_process)
    assert made.index("self._setup_event_loop()") < made.index("super().init_process()")


def test_settings_are_known() -> None:
    """gunicorn ignores unknown names in a configuration file: each of ours has to be one of its settings. Open api/server.py."""
    known = Config().settings
    assert options(Settings()).keys() <= known.keys()
    config = Config()
    for name, value in options(Settings()).items():
        config.set(name, value)
    assert config.worker_class is gasgi.ASGIWorker


def test_log_formats() -> None:
    """`post_fork` gives gunicorn's error log a formatter that masks keys, in gunicorn's own format. Open api/server.py."""
    assert "%(message)s" in Logger.error_fmt
    assert isinstance(Logger.datefmt, str)
