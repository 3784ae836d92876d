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
