"""What the documentation names exists: files, folders, tests, and pages that it links to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HISTORY = "results-history.md"
"""It keeps the names that files had at the time."""

PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != HISTORY)]
_PATH = re.compile(r"`((?:api|common|worker|bench|tests|docs)/[\w./-]*)`")
_TEST = re.compile(r"\b(test_\w+)(?:\.py)?\b")
_LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    """A reader who opens one finds it."""
    assert [path for path in _PATH.findall(page.read_text()) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page: Path) -> None:
    """faults.md promises a test of each promise, by the name of its file, or the name of the test or its beginning."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    tests = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    known = tests | {file.stem for file in files}
    named = set(_TEST.findall(page.read_text()))
    assert [name for name in named if not any(each.startswith(name) for each in known)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_pages_and_headings_exist(page: Path) -> None:
    """Links between pages lead somewhere, down to the heading."""
    for target, heading in _LINK.findall(page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{target} does not exist"
        assert not heading or heading in _anchors(linked), f"{target} has no heading {heading}"


def _anchors(page: Path) -> set[str]:
    """The anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
