"""Hooks of schemathesis for OpenAI's own description of its API; its command line loads them, see `test_openai_description.py`.

A request that is valid by the description is answered, or refused for a reason in `REFUSALS`; events of streams are validated here, since
the description gives the schema of their data as that of the stream.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import schemathesis
from jsonschema import Draft202012Validator
from schemathesis import Case, CheckContext, HookContext, Response

MAX_TOKENS = 8
TOKEN_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
EVENTS = {"/chat/completions": "CreateChatCompletionStreamResponse", "/responses": "ResponseStreamEvent"}

REFUSALS = (
    # Audio, images, files and the web: not supported, as the README says.
    r"messages\[\d+\]\.audio",
    r"messages\[\d+\]\.content\[\d+\]\.type",
    r"input\[\d+\]\.(content|output)\[\d+\](\.type)?",
    r"input\[\d+\]\.type",
    r"audio|modalities|web_search_options",
    # What OpenAI's servers store: prompts and conversations are not supported; what is not found is a 404.
    r"conversation|prompt|previous_response_id",
    r"input\[\d+\]\.id",
    # Without a stored prompt there has to be an input.
    r"input",
    # Rules that the description has in words only: names of functions, token ids, ranges, fields that need each other.
    r"functions\[\d+\]\.name|tools\[\d+\](\.tools\[\d+\])?(\.function|\.custom)?\.name",
    r"logit_bias(\..*)?",
    r"max_tokens|max_completion_tokens|max_output_tokens|max_tool_calls",
    r"function_call|top_logprobs|store",
    # The choice of a tool that is not offered, or that runs on OpenAI's servers.
    r"tool_choice(\..*)?",
    r"tools\[\d+\](\.type)?",
    # A schema or a regular expression that no grammar can express.
    r"tools\[\d+\](\.custom)?\.format(\..*)?",
    r"text\.format\.schema|response_format\.json_schema\.schema|tools\[\d+\](\.function)?\.parameters",
)
"""The `param` of refusals that are expected for requests that are valid by the description, as regular expressions."""


@functools.cache
def _validator(path: str) -> Draft202012Validator:
    document = json.loads(Path(os.environ["OPENAI_DESCRIPTION"]).read_text())
    reference = {"$ref": f"#/components/schemas/{EVENTS[path]}"}
    return Draft202012Validator({**reference, "components": document["components"]})


@schemathesis.hook
def before_call(_context: HookContext, case: Case, _kwargs: dict[str, Any]) -> None:
    """Request the served model, and short answers."""
    if isinstance(case.body, dict):
        case.body.pop("model", None)
        for name in TOKEN_FIELDS:
            if isinstance(case.body.get(name), int) and case.body[name] > MAX_TOKENS:
                case.body[name] = MAX_TOKENS


@schemathesis.check
def answered_or_refused_by_name(_context: CheckContext, response: Response, case: Case) -> None:
    """A refusal is an error of OpenAI's form that names a parameter with a reason to be refused."""
    if response.status_code == 200:
        return
    assert response.status_code in (400, 404), response.status_code
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert any(re.fullmatch(each, str(error["param"])) for each in REFUSALS), f"valid, and refused: {error}"


@schemathesis.check
def events_are_described(_context: CheckContext, response: Response, case: Case) -> None:
    """The data of each event of a stream is as described."""
    content_type = response.headers.get("content-type", [""])[0]
    if response.status_code != 200 or not content_type.startswith("text/event-stream"):
        return
    lines = response.content.decode().split("\n")
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data
    for each in data:
        if each != "[DONE]":
            faults = [fault.message[:300] for fault in _validator(case.path).iter_errors(json.loads(each))]
            assert not faults, f"{faults[:2]} in {each[:600]}"
