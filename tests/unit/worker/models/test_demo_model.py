"""The demo model's download. `tests/model` fetches the real one."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from common.errors import StartupError
from worker.models import demo_model


def test_progress_counts_the_download_once(tmp_path: Path) -> None:
    """pip has the file twice for a moment, in its temporary folder and in ours; it counts once."""
    assert demo_model._num_bytes(tmp_path) == 0
    (tmp_path / "pip-unpack").mkdir()
    (tmp_path / "pip-unpack" / "model.whl").write_bytes(bytes(93_000))
    (tmp_path / "model.whl").write_bytes(bytes(70_000))
    assert demo_model._num_bytes(tmp_path) == 93_000


def _wheel(folder: Path) -> None:
    """A wheel of the demo model's name and version with another file in it."""
    name, version = demo_model.WHEEL.split("==")
    name = name.replace("-", "_")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(demo_model.GGUF, b"another file")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.skipif(not subprocess._USE_POSIX_SPAWN, reason="this system's posix_spawn is not used by Python")
def test_the_download_does_not_fork(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """pip runs, although this process must not fork; its lines are on standard error, and a wrong file is refused."""
    index, target = tmp_path / "index", tmp_path / "target"
    index.mkdir()
    target.mkdir()
    _wheel(index)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)

    def fork_exec(*_: Any) -> int:
        raise AssertionError("the process forks")

    monkeypatch.setattr(subprocess, "_fork_exec", fork_exec)
    with pytest.raises(StartupError, match="not the one expected"):
        demo_model._download(target)
    written = capfd.readouterr()
    assert "Saved" in written.err
    assert not written.out
