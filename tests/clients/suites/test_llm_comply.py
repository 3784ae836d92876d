"""llm-comply, a suite for servers of three protocols: everything passes but images, and bodies that we serve although they lack a field.

The demo model cannot see images. A body without `model` asks for the only model that is served, as in the original server; a message
without `max_tokens` is answered up to the end of the context, which takes longer than the suite waits.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.harness.pool import Pool
from tests.clients import environments

EXCEPTED = {
    "openai-chat": ("chat-image-input", "chat-error-handling"),
    "open-responses": ("image-input", "error-handling"),
    "anthropic": ("anth-image-input", "anth-error-handling"),
}
"""By protocol: images, and errors for a body without `model` or `max_tokens`."""
NUM_TESTS = {"openai-chat": 7, "open-responses": 11, "anthropic": 7}
HEADERS = {"anthropic": ["-H", "anthropic-version:2023-06-01"]}
SUITE_SECONDS = 400


@pytest.fixture(scope="module")
def suite() -> Path:
    """The suite's command."""
    return environments.suites_environment().parent / "llm-comply"


def run(suite: Path, *arguments: str) -> str:
    """What the suite prints."""
    done = subprocess.run(
        [str(suite), *arguments], capture_output=True, text=True, timeout=SUITE_SECONDS, check=False
    )
    return done.stdout or done.stderr


@pytest.mark.parametrize("protocol", EXCEPTED)
def test_llm_comply(pool: Pool, suite: Path, protocol: str) -> None:
    """Each test of the protocol passes, but for the excepted ones, of which each still exists."""
    server = ["--base-url", f"{pool.url}/v1", "-k", "none", "-m", "demo", "--format", protocol]
    listed = run(suite, "--format", protocol, "--list")
    names = re.findall(r"^  ([a-z-]+) ", listed, re.MULTILINE)
    assert set(EXCEPTED[protocol]) <= set(names), listed
    wanted = ",".join(name for name in names if name not in EXCEPTED[protocol])
    text = run(suite, "run", *server, *HEADERS.get(protocol, []), "--json", "--timeout", "120", "-f", wanted)
    results: list[dict[str, Any]] = json.loads(text)["results"]
    assert len(results) == NUM_TESTS[protocol]
    assert [result for result in results if result["status"] == "failed"] == []
