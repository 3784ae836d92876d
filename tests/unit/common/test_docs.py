"""The documents against the code: every file, class, method, test and setting that they name exists."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from common.settings import describe

ROOT = Path(__file__).parents[3]
HISTORY = ROOT / "docs" / "results-history.md"
DOCUMENTS = [
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", ROOT / "bench" / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md")))
    if path != HISTORY  # it names what was measured, as it was then
]
PACKAGES = ("api", "bench", "common", "docs", "tests", "worker")

_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(rf"(?:{'|'.join(PACKAGES)}|\.ci)/[\w./-]*")
_FILE = re.compile(r"\w[\w-]*\.(?:py|toml|md)")
_METHOD = re.compile(r"([A-Z]\w+)\.([a-z_]\w*)(?:\(.*\))?")
_TEST = re.compile(r"test_\w+")
_LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def _text(document: str) -> str:
    return (ROOT / document).read_text()


@cache
def _sources() -> dict[Path, str]:
    return {path: path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def _defines(what: str) -> bool:
    pattern = re.compile(rf"^\s*(?:async )?{what}\b", re.MULTILINE)
    return any(pattern.search(text) for text in _sources().values())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    """Every path, and every file that is named without its folder, is in the repository."""
    files = {path.name for package in PACKAGES for path in (ROOT / package).rglob("*")}
    files |= {path.name for path in ROOT.iterdir()}
    for code in _CODE.findall(_text(document)):
        if _PATH.fullmatch(code):
            assert (ROOT / code).exists(), f"{document} names {code}, which does not exist"
        elif _FILE.fullmatch(code):
            assert code in files, f"{document} names {code}, which does not exist"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    """Every relative link leads to a file of the repository."""
    for target in _LINK.findall(_text(document)):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), f"{document} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_of_the_code_exist(document: str) -> None:
    """`Class.method` and `test_name` are defined somewhere in the code."""
    for code in _CODE.findall(_text(document)):
        if method := _METHOD.fullmatch(code):
            assert _defines(f"class {method[1]}"), f"{document} names the class {method[1]}"
            assert _defines(f"def {method[2]}"), f"{document} names the method {code}"
        elif _TEST.fullmatch(code):
            assert _defines(f"def {code}"), f"{document} names the test {code}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_settings_that_are_named_exist(document: str) -> None:
    """Every MLXPOOL_… variable is a setting."""
    named = set(re.findall(r"MLXPOOL_[A-Z_]*[A-Z]", _text(document)))
    assert named <= {variable for variable, _, _ in describe()}


def test_architecture_leads_to_files() -> None:
    """The table "to change … open …" has twenty changes and more, and each of them names a file that exists."""
    table = _text("docs/architecture.md").split("## To change", 1)[1].split("\n## ", 1)[0]
    changes = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(changes) >= 20
    for change in changes:
        paths = [code for code in _CODE.findall(change) if (ROOT / code).exists()]
        assert paths, f"leads nowhere: {change}"
