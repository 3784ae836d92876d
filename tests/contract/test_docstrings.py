"""Each contract test names the file to open, and the file exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
_PATH = re.compile(r"\b(?:api|common|worker|bench)/[a-z_/]+(?:\.py)?\b")


def _tests() -> Iterator[Any]:
    for path in sorted(FOLDER.glob("test_*.py")):
        if path.name == Path(__file__).name:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield pytest.param(ast.get_docstring(node) or "", id=f"{path.stem}::{node.name}")


@pytest.mark.parametrize("docstring", list(_tests()))
def test_file_to_open(docstring: str) -> None:
    """A failing contract test has to lead to the code that relies on what has changed."""
    named = _PATH.findall(docstring.partition("Open ")[2])
    assert named, "its docstring ends with: Open FILE"
    assert [path for path in named if not (ROOT / path).exists()] == []
