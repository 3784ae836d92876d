"""Requests and records of responses for tests."""

from __future__ import annotations

import json
from typing import Any

from api.generation.request import AnswerRecord, GenerationRequest, answer_record
from api.openai.responses import request as response_request
from common.errors import RequestError
from common.protocol import ChatPrompt
from tests.unit.api.openai.records import MODEL


def parse(**fields: Any) -> GenerationRequest:
    """A request with this body; its input is a greeting unless `fields` says otherwise."""
    return response_request.parse(json.dumps({"input": "hi"} | fields).encode())


def messages(*items: Any, **fields: Any) -> list[dict[str, Any]]:
    """The messages of a conversation of these items."""
    [prompt] = parse(input=list(items), **fields).prompts
    assert isinstance(prompt, ChatPrompt)
    return prompt.messages


def refused(**fields: Any) -> RequestError:
    """The error of a body."""
    try:
        parse(**fields)
    except RequestError as error:
        return error
    raise AssertionError("the request was accepted")


def record(**fields: Any) -> AnswerRecord:
    """The record of a request, with ids and a time that do not change."""
    [job] = parse(**fields).jobs("openai.responses", MODEL, "c", [1])
    made = answer_record(job)
    return AnswerRecord(
        front_end=made.front_end,
        job_ids=["0" * 30],
        created=5,
        model="m",
        fingerprint="fp_1",
        stream=made.stream,
        options=made.options,
        temperature=made.temperature,
        top_p=made.top_p,
    )
