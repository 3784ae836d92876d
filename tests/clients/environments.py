"""The clients' own environments, made on demand in the user's cache folder: for Python, Node, coding agents, others' suites.

Each is kept under a hash of what it is made from, so that another version of the list makes another environment; what
is no longer used may be deleted. Called by the fixtures; independent of what the clients do.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.settings import Settings
from worker.models import demo_model

HERE = Path(__file__).parent
INSTALL_SECONDS = 900


def python_environment() -> Path:
    """The Python of an environment with everything in `python/requirements.txt`."""
    return _python("python", HERE / "python" / "requirements.txt")


def sdk_environment() -> Path:
    """The Python of an environment with the newest SDKs and agent frameworks."""
    return _python("sdks", HERE / "python" / "requirements-sdks.txt")


def guidellm_environment() -> Path:
    """The Python of an environment with guidellm, without PyTorch."""
    return _python("guidellm", HERE / "guidellm" / "requirements.txt", "--no-deps")


def suites_environment() -> Path:
    """The Python of an environment with everything in `suites/requirements.txt`."""
    return _python("suites", HERE / "suites" / "requirements.txt")


def _python(kind: str, requirements: Path, *options: str) -> Path:
    def make(folder: Path) -> None:
        _run([sys.executable, "-m", "venv", str(folder)])
        python = str(folder / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options]
        _run([*pip, "--requirement", str(requirements)])

    version = f"{sys.implementation.cache_tag}-{os.uname().sysname}-{os.uname().machine}"
    return _made(kind, version.encode() + requirements.read_bytes(), make) / "bin" / "python"


def node_modules() -> Path:
    """A `node_modules` with everything in `node/package.json`; npm is there."""
    return _node_modules("node", HERE / "node" / "package.json")


def agent_modules() -> Path:
    """A `node_modules` with the coding agents; npm is there."""
    return _node_modules("agents", HERE / "agents" / "package.json")


def _node_modules(kind: str, package: Path) -> Path:
    def make(folder: Path) -> None:
        folder.mkdir()
        shutil.copy(package, folder)
        npm = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--silent"]
        _run([*npm, "--prefix", str(folder)])

    return _made(kind, package.read_bytes(), make) / "node_modules"


def _made(kind: str, made_from: bytes, make: Callable[[Path], None]) -> Path:
    """The folder for a specification, with a marker once it is complete. Of concurrent callers, one creates it."""
    settings = Settings.load()
    cache = Path(settings.cache_dir).expanduser() if settings.cache_dir else demo_model._user_cache()
    folder = cache / "clients" / f"{kind}-{hashlib.sha256(made_from).hexdigest()[:16]}"
    mark = folder / ".whole"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(folder.with_suffix(".lock")):
        if not mark.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            mark.touch()
    return folder


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: list[str]) -> None:
    """Raises:
    RuntimeError: It failed; with what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
