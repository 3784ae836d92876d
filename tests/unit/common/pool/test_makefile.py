"""The Makefile: its help, and what it refuses before it changes anything."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[4] / "Makefile"


def _make(folder: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `make` with our Makefile in another folder, with another PATH if one is given."""
    make = shutil.which("make")
    assert make is not None
    command = [make, "-f", str(MAKEFILE), *arguments]
    env = None if path is None else {"PATH": str(path)}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=30, check=False, env=env
    )


@pytest.mark.parametrize("awk", ["awk", "original-awk", "mawk", "gawk"])
def test_help_lists_every_target(tmp_path: Path, awk: str) -> None:
    """Each phony target has a line, with any awk (original-awk is that of a Mac) and no other tool: sed and expand differ there."""
    found = shutil.which(awk)
    if found is None:
        pytest.skip(f"{awk} is not installed")
    (tmp_path / "awk").symlink_to(found)
    (tmp_path / "echo").symlink_to("/bin/echo")
    done = _make(tmp_path, "help", path=tmp_path)
    assert done.returncode == 0
    assert not done.stderr
    [targets] = re.findall(r"^\.PHONY: (.+)$", MAKEFILE.read_text(), re.MULTILINE)
    assert re.findall(r"^  make (\S+) +\S", done.stdout, re.MULTILINE) == targets.split()


@pytest.mark.parametrize("build", ["cuda", "cpu cuda12", ""])
def test_unknown_build_of_mlx_is_refused(tmp_path: Path, build: str) -> None:
    """One sentence lists the builds, and the installed environment is left as it is."""
    stamp = tmp_path / ".venv" / ".installed-cpu"
    stamp.parent.mkdir()
    stamp.touch()
    done = _make(tmp_path, "install", f"MLX={build}", "PYTHON=false")
    assert done.returncode == 2
    assert "cpu, cuda12 or cuda13" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.rglob("*")) == [stamp.parent, stamp]


def test_installed_build_of_mlx_is_kept(tmp_path: Path) -> None:
    """Without MLX=..., the installed build is used; stamps of unknown builds are ignored."""
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
    [command] = [line for line in done.stdout.splitlines() if "-m pytest" in line]
    assert command.endswith(f"{selection}-m heavy")


def test_ci_runs_both_sets() -> None:
    """`.ci/run` does not read standard input and ends with pytest's closing line: the checks, the tests, then what `make test` left out."""
    script = (MAKEFILE.parent / ".ci" / "run").read_text()
    assert "exec </dev/null" in script
    lines = [line for line in script.splitlines() if line.startswith("make ")]
    assert lines == ["make check", "make test", 'make test-all ARGS="-m heavy"']
    assert script.rstrip().endswith(lines[-1])
