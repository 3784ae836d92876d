"""`make up`: a complete pool on this machine, until Ctrl-C. Runs the Procfile's processes under honcho, each with a supervisor.

`python -m common.pool.up` makes the checks of `common.pool.preflight`, starts the processes, and prints a banner when the pool is
ready. It runs the API and the workers as commands and imports neither.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import msgspec
from honcho.environ import parse_procfile
from honcho.manager import Manager
from honcho.printer import Message, Printer

from common.errors import StartupError
from common.pool import preflight
from common.pool.supervise import CANNOT_START, when_gone
from common.settings import EMBEDDED_REDIS_URL, PREFIX, Settings

DRAIN_SECONDS = 1.0
"""Ctrl-C ends the API too, so there is no client for what a worker would finish."""

READY_POLL_SECONDS = 0.25

READY_RESPONSES = 4
"""How many responses per API process must agree: the kernel decides which process accepts a connection."""

EXIT_INTERRUPTED = 130
"""What honcho 2.0 returns after a Ctrl-C."""


class ErrorPrinter(Printer):  # type: ignore[misc]  # honcho has no types
    """honcho 2.0's printer, which also remembers the last error sentence of each process."""

    def __init__(self, output: TextIO) -> None:
        super().__init__(output)
        self._sentences: dict[str, str] = {}

    def write(self, message: Message) -> None:
        """Print a line of one process."""
        line = message.data.decode(errors="replace") if isinstance(message.data, bytes) else message.data
        if found := _SENTENCE.match(line):
            self._sentences[message.name] = found[1]
        super().write(message)

    def error_of(self, names: Iterable[str]) -> str | None:
        """The error sentence of the first of these processes that printed one."""
        return next((self._sentences[name] for name in names if name in self._sentences), None)


_SENTENCE = re.compile(r"mlx-pool(?: \w+)?: (.+)")


class Pool(Manager):  # type: ignore[misc]  # honcho has no types
    """honcho 2.0's manager, which also handles a Ctrl-C while it starts its processes, and prints a banner when the API is ready."""

    def __init__(self, settings: Settings, models: list[str], parent: int | None = None) -> None:
        self._error_printer = ErrorPrinter(sys.stdout)
        super().__init__(self._error_printer)
        self._settings = settings
        self._models = models
        self._parent = parent
        self._over = threading.Event()

    def _start(self) -> None:
        # honcho's helper processes are in our process group; they inherit that the terminal's signals are ignored.
        hang_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop: Any = signal.signal(signal.SIGINT, signal.SIG_IGN)
        super()._start()

        # honcho's handler needs the ids of all processes, which its helpers report shortly after their start.
        def stop_when_started(signum: int, frame: FrameType | None) -> None:
            if self._all_started():
                self._over.set()
                stop(signum, frame)
            else:
                threading.Timer(0.1, os.kill, (os.getpid(), signum)).start()

        signal.signal(signal.SIGINT, stop_when_started)
        signal.signal(signal.SIGTERM, stop_when_started)
        if hang_up is not signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGHUP, self._terminal_closed)
        # Threads are started after honcho's forks.
        threading.Thread(target=self._announce_when_ready, daemon=True).start()
        if self._parent is not None:
            when_gone(self._parent, lambda: os.kill(os.getpid(), signal.SIGTERM))

    def _terminal_closed(self, _signum: int, _frame: FrameType | None) -> None:
        self._printer.output = io.StringIO()  # writes to the terminal would fail now
        os.kill(os.getpid(), signal.SIGTERM)

    def _announce_when_ready(self) -> None:
        while not self._over.wait(READY_POLL_SECONDS):
            if is_ready(self._settings, self._models):
                sys.stdout.write(banner(self._settings, self._models))
                sys.stdout.flush()
                return

    def terminate(self) -> None:
        self._over.set()
        super().terminate()

    def error(self) -> str | None:
        """The error sentence of the process that could not start; None if the pool ended for another reason."""
        if self.returncode != CANNOT_START:
            return None
        failed = [name for name, state in self._processes.items() if state.get("returncode") == CANNOT_START]
        return self._error_printer.error_of(failed)


def is_ready(settings: Settings, models: list[str]) -> bool:
    """Whether every API process is ready and, if it needs no key, lists all models."""
    return all(_is_one_ready(settings, models) for _ in range(READY_RESPONSES * settings.api_processes))


def _is_one_ready(settings: Settings, models: list[str]) -> bool:
    if _get(settings, "/readyz")[0] != http.HTTPStatus.OK:
        return False
    status, body = _get(settings, "/v1/models")
    if status in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
        return True
    if status != http.HTTPStatus.OK:
        return False
    return {model["id"] for model in json.loads(body)["data"]}.issuperset(models)


def _get(settings: Settings, path: str) -> tuple[int, bytes]:
    """Status and body; status 0 if there is no response."""
    connection = http.client.HTTPConnection(_reachable(settings.host), settings.port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def _reachable(host: str) -> str:
    """An address at which the API can be reached, also if it listens on all of them."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (compared, not bound)


def banner(settings: Settings, models: list[str]) -> str:
    """What to do next, in lines to paste."""
    host = _reachable(settings.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
    body = {
        "model": models[0],
        "stream": True,
        "temperature": 0,  # at higher temperatures, such a small model loses the thread
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    rq = os.path.relpath(Path(sys.executable).with_name("rq"))
    redis_url, export = shlex.quote(settings.redis_url), ""
    if set(settings.redis_url) & set("@?"):  # the URL may contain a password
        redis_url = f'"${PREFIX}REDIS_URL"'
        export = f"              (export {PREFIX}REDIS_URL there first: it may contain a password, so it is not shown)\n"
    key = "" if settings.api_keys_file is None else " -H 'Authorization: Bearer YOUR_KEY'"
    return (
        f"\nmlx-pool is ready at {url}/v1 and serves {', '.join(models)}. Try it:\n\n"
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}\n\n"
        f"Look inside:  {rq} info --url {redis_url}\n{export}"
        "Stop it:      Ctrl-C\n\n"
    )


def worker_settings(settings: Settings) -> list[Settings]:
    """The settings of a worker for each model in `settings.model`.

    Raises:
        StartupError: Two models would have one id.
    """
    try:
        models = shlex.split(settings.model)
    except ValueError as error:
        raise StartupError(f"{PREFIX}MODEL: {error} in {settings.model!r}") from None
    if not models:
        raise StartupError(f"{PREFIX}MODEL names no model")
    workers = [msgspec.structs.replace(settings, model=model) for model in models]
    ids = [worker.model_id for worker in workers]
    if len(set(ids)) < len(ids):
        hint = "; for two workers of one model: WORKERS=2" if len(set(models)) < len(models) else ""
        raise StartupError(
            f"two of the models {settings.model} would both have the id {max(ids, key=ids.count)}{hint}"
        )
    return workers


def add_processes(pool: Manager, workers: list[Settings], num_each: int, environ: Mapping[str, str]) -> None:
    """Add the Procfile's processes: redis only if it is the embedded one, and `num_each` workers of each model."""
    python = Path(sys.executable).parent
    # PYTHONUNBUFFERED: lines appear when they are written.
    common = {
        f"{PREFIX}DRAIN_SECONDS": str(DRAIN_SECONDS),
        **environ,
        "PATH": f"{python}{os.pathsep}{environ.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",
    }
    commands = parse_procfile((preflight.ROOT / "Procfile").read_text()).processes
    for name, plain in commands.items():
        command = f"exec python -m common.pool.supervise --group --parent {os.getpid()} {plain.removeprefix('exec ')}"
        if name == "redis" and workers[0].redis_url != EMBEDDED_REDIS_URL:
            continue
        if name != "worker":
            pool.add_process(name, command, env=common, cwd=str(preflight.ROOT))
            continue
        num_workers = len(workers) * num_each
        for i in range(num_workers):
            env = common | {f"{PREFIX}MODEL": workers[i // num_each].model}
            pool.add_process(
                "worker" if num_workers == 1 else f"worker.{i + 1}", command, env=env, cwd=str(preflight.ROOT)
            )


def run(argv: list[str] | None = None) -> int:
    """Run the pool; the exit status.

    Raises:
        StartupError: It cannot start.
    """
    parser = argparse.ArgumentParser(
        prog="python -m common.pool.up", description="A complete pool on this machine."
    )
    parser.add_argument("--workers", default="1", metavar="N", help="worker processes for each model")
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this process is gone")
    arguments = parser.parse_args(argv)
    num_each = int(arguments.workers) if arguments.workers.isdecimal() else 0
    if num_each < 1:
        raise StartupError(f"WORKERS must be a whole number of at least 1, not {arguments.workers!r}")
    settings = Settings.load()
    workers = worker_settings(settings)
    preflight.check(settings, workers, num_each)
    pool = Pool(settings, [worker.model_id for worker in workers], arguments.parent)
    add_processes(pool, workers, num_each, os.environ)
    pool.loop()
    if error := pool.error():
        raise StartupError(error)
    status: Any = pool.returncode
    return 128 - status if status < 0 else int(status)


def main() -> int:
    """Run the pool; the exit status. Errors are one sentence, not a traceback. Ctrl-C is status 0: make would report an error."""
    try:
        status = run()
    except StartupError as error:
        sys.stderr.write(f"mlx-pool: {error}\n")
        return 1
    except KeyboardInterrupt:  # before honcho handles it
        return 0
    return 0 if status == EXIT_INTERRUPTED else status


if __name__ == "__main__":
    sys.exit(main())
