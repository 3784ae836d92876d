"""The ids in a response, all derived from the id of its job, so that any API process writes the same ones.

Used by the renderings, and by what looks up stored responses. A response is ``resp_<job id>``, an output item
``<prefix>_<job id>_<index>``, an input item ``<prefix>_<job id>_i<index>``.
"""

from __future__ import annotations

import re

RESPONSE_PREFIX = "resp_"

_RESPONSE = re.compile(r"resp_([0-9a-f]{30})")
_ITEM = re.compile(r"[a-z]{1,8}_([0-9a-f]{30})_(?:i?[0-9]{1,9})")

_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


def response_id(job_id: str) -> str:
    """The id of the response that a job generates."""
    return RESPONSE_PREFIX + job_id


def output_id(job_id: str, kind: str, index: int) -> str:
    """The id of an output item."""
    return f"{_PREFIXES[kind]}_{job_id}_{index}"


def input_id(job_id: str, kind: str, index: int) -> str:
    """The id of an input item that the client gave none."""
    return f"{_PREFIXES.get(kind, 'item')}_{job_id}_i{index}"


def job_of_response(text: str) -> str | None:
    """The job id in the id of a response; None if it is not one of ours."""
    found = _RESPONSE.fullmatch(text)
    return found[1] if found else None


def job_of_item(text: str) -> str | None:
    """The job id in the id of an item; None if it is not one of ours."""
    found = _ITEM.fullmatch(text)
    return found[1] if found else None
