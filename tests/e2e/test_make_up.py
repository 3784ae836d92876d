"""`make up` as users see it: one command, a line to paste, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import redis

from tests.conftest import missing, unused_port

ROOT = Path(__file__).parents[2]
READY_SECONDS = 180
REFUSED_SECONDS = 15
"""A second or two, plus the time a busy machine needs to start Python."""


class Up:
    """A running `make up`, in its own process group as in a terminal, and its output."""

    def __init__(self, state: Path, *variables: str) -> None:
        # A child inherits what is ignored, as it is where nohup runs the tests, or a shell in its background.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        environ = {k: v for k, v in os.environ.items() if k != "MLXPOOL_REDIS_URL"}
        self.port = unused_port()
        self.process = subprocess.Popen(
            ["make", "up", f"PORT={self.port}", f"STATE_DIR={state}", *variables],
            cwd=ROOT,
            env=environ,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            self.lines.extend(iter(stdout.readline, ""))

    @property
    def output(self) -> str:
        """The output so far."""
        return "".join(self.lines)

    def wait_for(self, text: str) -> None:
        """Wait until `text` is printed."""
        deadline = time.monotonic() + READY_SECONDS
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT for the whole process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)

    def ended(self, timeout_seconds: float) -> int:
        """The exit status."""
        status = self.process.wait(timeout_seconds)
        self._reader.join(5)
        return status

    def children(self) -> list[int]:
        """Process groups that honcho started and that still exist."""
        return [pid for pid in map(int, re.findall(r"started \(pid=(\d+)\)", self.output)) if _is_alive(pid)]

    def clean_up(self) -> None:
        """Terminate what is left after a failed test."""
        if self.process.poll() is None:
            self.interrupt()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
        for pid in self.children():
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(5)
        self._reader.join(5)


def _is_alive(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A folder for the embedded server, whose port must be free."""
    if _is_listening(6399):
        missing("port 6399 for the embedded server (is another `make up` running?)")
    return tmp_path


@pytest.fixture
def up(state: Path, request: pytest.FixtureRequest) -> Iterator[Up]:
    """`make up` with the variables of the test's parameter."""
    running = Up(state, *getattr(request, "param", ()))
    yield running
    running.clean_up()


def _shell(command: str) -> str:
    done = _run(command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _run(command: str) -> subprocess.CompletedProcess[str]:
    words = ["bash", "-c", command]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def _text(stream: str) -> str:
    """The text of a streamed chat completion."""
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_first_minute(up: Up) -> None:
    """The lines of the banner work unchanged, and Ctrl-C ends everything within seconds, without a traceback."""
    up.wait_for("Stop it:")
    (curl,) = [line.strip() for line in up.lines if line.lstrip().startswith("curl -N")]
    assert "Paris" in _text(_shell(curl))
    (look,) = [line for line in up.lines if line.startswith("Look inside:")]
    assert re.search(r"idle demo\.|busy demo\.", _shell(look.removeprefix("Look inside:")))

    interrupted_at = time.monotonic()
    up.interrupt()
    assert up.ended(15) != 0
    assert time.monotonic() - interrupted_at < 10
    assert "Traceback" not in up.output
    assert "***" not in up.output  # how make reports an error
    assert up.children() == []
    assert not _is_listening(up.port)
    assert not _is_listening(6399)


@pytest.mark.parametrize("up", [("WORKERS=2",)], indirect=True)
def test_ctrl_c_twice_during_startup(up: Up) -> None:
    """Two Ctrl-C before the pool is ready end it without a traceback."""
    up.wait_for("redis    | ")
    up.interrupt()
    up.interrupt()
    up.ended(15)
    assert "Traceback" not in up.output
    assert up.children() == []
    assert not _is_listening(6399)


def test_killed_processes(up: Up) -> None:
    """A killed Redis is restarted, and the pool recovers. If the manager itself is killed, all processes end and free their ports."""
    up.wait_for("Stop it:")
    (curl,) = [line.strip() for line in up.lines if line.lstrip().startswith("curl -N")]
    with redis.Redis(port=6399) as client:
        os.kill(int(client.info("server")["process_id"]), signal.SIGKILL)
    up.wait_for("redis_server exited with status 3; it is restarted")
    deadline = time.monotonic() + 30
    while "Paris" not in (answer := _run(curl).stdout):
        assert time.monotonic() < deadline, answer
        time.sleep(0.5)
    manager = int(subprocess.check_output(["pgrep", "-P", str(up.process.pid)]))
    os.kill(manager, signal.SIGKILL)
    assert up.ended(15) != 0
    deadline = time.monotonic() + 20
    while up.children() or _is_listening(6399) or _is_listening(up.port):
        assert time.monotonic() < deadline, up.children()
        time.sleep(0.1)


def test_a_supervisor_is_killed(up: Up) -> None:
    """A worker whose supervisor is killed is terminated, and the pool ends."""
    up.wait_for("Stop it:")
    supervisors = [psutil.Process(pid) for pid in up.children()]
    [supervisor] = [each for each in supervisors if each.cmdline()[-2:] == ["-m", "worker"]]
    [worker] = [each for each in supervisor.children() if each.cmdline()[-2:] == ["-m", "worker"]]
    supervisor.kill()
    psutil.wait_procs([worker], timeout=20)
    assert not worker.is_running()
    assert up.ended(30) != 0
    deadline = time.monotonic() + 10
    while up.children() or _is_listening(6399):  # the guard polls the worker once a second
        assert time.monotonic() < deadline, up.children()
        time.sleep(0.1)


def test_make_is_killed(up: Up) -> None:
    """If make is killed, all processes end."""
    up.wait_for("redis  | ")
    os.kill(up.process.pid, signal.SIGKILL)
    up.process.wait(5)
    deadline = time.monotonic() + 20
    while up.children() or _is_listening(6399):
        assert time.monotonic() < deadline, up.children()
        time.sleep(0.1)


def test_terminal_is_closed(up: Up) -> None:
    """Closing the terminal ends all processes."""
    up.wait_for("Stop it:")
    os.killpg(up.process.pid, signal.SIGHUP)
    assert up.ended(60) != 0
    deadline = time.monotonic() + 10
    while up.children() or _is_listening(6399):  # make may be gone before what it ran
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_model_that_cannot_be_loaded(state: Path, tmp_path: Path) -> None:
    """The worker's sentence is printed last, and all processes end, with a status other than 0."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    (model / "model.safetensors").touch()
    up = Up(state, f"MODEL={model}")
    try:
        assert up.ended(60) != 0
        reason = f"the model in {model} cannot be loaded"
        assert reason in [line for line in up.lines if line.startswith("mlx-pool: ")][-1]  # the last word
        assert "Traceback" not in up.output
        assert up.children() == []
    finally:
        up.clean_up()


def _refused(*variables: str) -> str:
    """The one line printed by a `make up` that is refused."""
    began_at = time.monotonic()
    command = ["make", "--no-print-directory", "up", f"PORT={unused_port()}", *variables]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert done.stdout == ""
    assert time.monotonic() - began_at < REFUSED_SECONDS
    said, *makes = done.stderr.splitlines()
    assert all(re.match(r"make(\[\d+\])?: ", line) for line in makes)  # [1]: make test runs this
    return said


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (("MODEL=/no/such/model",), "the model folder /no/such/model does not exist"),
        (("REDIS_URL=redis://127.0.0.1:1/0",), "no Redis answers at 127.0.0.1:1"),
        (("API_KEYS_FILE=/no/such/keys",), ".venv/bin/python -m api.keys add NAME"),
        (("HOST=0.0.0.0",), "would let everybody who reaches this machine use the API"),
        (("WORKERS=",), "WORKERS must be a whole number"),
    ],
)
def test_refused_at_once(state: Path, variables: tuple[str, ...], sentence: str) -> None:
    """Errors that can be detected are reported before anything starts."""
    assert sentence in _refused(f"STATE_DIR={state}", *variables)


def test_another_program_on_the_port_of_the_embedded_server(state: Path) -> None:
    """The port is reported as in use, and nothing starts."""
    with socket.create_server(("127.0.0.1", 6399)):
        assert "port 6399, which the embedded Redis needs, is taken" in _refused(f"STATE_DIR={state}")


def test_port_in_use(state: Path) -> None:
    """A port in use is reported before anything starts."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = ["make", "up", f"PORT={taken.getsockname()[1]}", f"STATE_DIR={state}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "cannot listen on" in done.stderr
    assert "started" not in done.stdout


def test_misspelled_variable(state: Path) -> None:
    """A make variable that is not a setting is refused, with a suggestion."""
    done = subprocess.run(
        ["make", "up", "PROT=1"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "did you mean MLXPOOL_PORT?" in done.stderr
