"""Chat templates of real models: llama.cpp's collection, from the sources of a package on PyPI, in the user's cache folder.

None of them is part of this repository. Used by `test_real_templates.py`.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from common.settings import Settings
from worker.models import demo_model

PACKAGE = "llama-cpp-python==0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
DOWNLOAD_SECONDS = 600


def template_folder() -> Path:
    """The folder of the templates; downloads 77 MB the first time. Of concurrent callers, one downloads."""
    settings = Settings.load()
    cache = Path(settings.cache_dir).expanduser() if settings.cache_dir else demo_model._user_cache()
    folder = cache / f"templates-{SHA256[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            _extract(_download(partial / "sources"), partial / "templates")
            (partial / "templates").rename(folder)
            shutil.rmtree(partial)
    return folder


def _download(folder: Path) -> Path:
    # pip asks the package for its metadata, which builds nothing.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command = [*pip, "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True, timeout=DOWNLOAD_SECONDS)
    (archive,) = folder.glob("*.tar.gz")
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    assert found == SHA256, f"the sources of {PACKAGE} are not the ones expected"
    return archive


def _extract(archive: Path, folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(archive) as sources:
        for member in sources:
            path = Path(member.name)
            if path.parent.parts[-2:] == ("models", "templates") and path.suffix == ".jinja":
                file = sources.extractfile(member)
                assert file is not None
                (folder / path.name).write_bytes(file.read())
