"""The Makefile: what it refuses before it touches anything."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[3] / "Makefile"


def _make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make` with our Makefile, in a folder that is not ours."""
    command = ["make", "-f", str(MAKEFILE), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("build", ["cuda", "cpu cuda12", ""])
def test_a_build_of_mlx_that_there_is_not(tmp_path: Path, build: str) -> None:
    """It is one sentence with those that there are, and the environment that is there stays as it is."""
    stamp = tmp_path / ".venv" / ".installed-cpu"
    stamp.parent.mkdir()
    stamp.touch()
    done = _make(tmp_path, "install", f"MLX={build}", "PYTHON=false")
    assert done.returncode == 2
    assert "cpu, cuda12 or cuda13" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.rglob("*")) == [stamp.parent, stamp]


def test_the_build_that_is_there_stays(tmp_path: Path) -> None:
    """Without MLX=... the build that is installed counts; what an unknown build has left behind does not."""
    stamps = [tmp_path / ".venv" / f".installed-{build}" for build in ("cuda", "cuda13")]
    stamps[0].parent.mkdir()
    for stamp in stamps:
        stamp.touch()
    done = _make(tmp_path, "-n", "install", "-o", "pyproject.toml", "-o", "constraints.txt")
    assert done.returncode == 0, done.stderr
    assert "venv" not in done.stdout


@pytest.mark.parametrize(
    ("target", "selection"), [("test", ' -m "not heavy" '), ("test-all", " --no-loadscope-reorder ")]
)
def test_the_two_sets_of_tests(tmp_path: Path, target: str, selection: str) -> None:
    """`make test` leaves out the heavy tests and `make test-all` does not; both end with ARGS, so that `-m` there wins."""
    stamp = tmp_path / ".venv" / ".installed-cpu"
    stamp.parent.mkdir()
    stamp.touch()
    done = _make(tmp_path, "-n", target, "-o", "pyproject.toml", "-o", "constraints.txt", "ARGS=-m heavy")
    assert done.returncode == 0, done.stderr
    [command] = [line for line in done.stdout.splitlines() if "pytest" in line]
    assert command.endswith(f"{selection}-m heavy")


def test_ci_runs_both_sets() -> None:
    """`.ci/run` reads nothing and ends with pytest's closing line: the checks, the tests, then what `make test` left out."""
    script = (MAKEFILE.parent / ".ci" / "run").read_text()
    assert "exec </dev/null" in script
    lines = [line for line in script.splitlines() if line.startswith("make ")]
    assert lines == ["make check", "make test", 'make test-all ARGS="-m heavy"']
    assert script.rstrip().endswith(lines[-1])
