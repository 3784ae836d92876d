"""The grammar of tool calls and their parser agree: whatever the grammar allows, the parser parses."""

from __future__ import annotations

import json
import random

import msgspec
import numpy as np
import pytest
from llguidance import LLMatcher

from common.protocol import ToolArguments, ToolCall, ToolUse
from common.schema import grammar
from tests.unit.worker.text.answers import PLAIN, job, read, tool
from worker.text import answer_format
from worker.text.answer_parser import AnswerParser

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"enum": [1, 2, None]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [tool("get_weather", parameters=SCHEMA, strict=True), tool("now")]
LIKELY = frozenset(b'<tool_call>{"name": arguments}/\n,aA1')


def written(text: str, seed: int, max_bytes: int) -> str | None:
    """A random text that the grammar allows, byte by byte; None if it did not end in time."""
    draw = random.Random(seed)  # noqa: S311
    matcher = LLMatcher(grammar._bytes_tokenizer(), text, log_level=0)
    chosen = bytearray()
    while not matcher.is_stopped() and len(chosen) < max_bytes:
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        if 256 in allowed and (len(allowed) == 1 or draw.random() < 0.5):
            return chosen.decode()
        likely = [int(byte) for byte in allowed if byte in LIKELY]
        byte = draw.choice(likely or [int(byte) for byte in allowed if byte < 128])
        assert matcher.consume_token(byte)
        chosen.append(byte)
    return chosen.decode() if matcher.is_stopped() else None


@pytest.mark.parametrize("is_parallel", [True, False])
def test_generated_calls_are_parsed(is_parallel: bool) -> None:
    """Each required call is parsed with its name and with arguments that match its schema; nothing is content."""
    use = ToolUse(tools=TOOLS, is_required=True, is_parallel=is_parallel)
    asked = msgspec.structs.replace(job(), tool_use=use)
    text = answer_format.answer_grammar(asked, PLAIN)
    assert text is not None
    max_calls = 0
    for seed in range(60):
        answer = written(text, seed, 2000)
        if answer is None:
            continue
        parts = read(AnswerParser(asked, PLAIN, "normal"), answer)
        calls = [part for part in parts if isinstance(part, ToolCall)]
        arguments = [json.loads(part.text) for part in parts if isinstance(part, ToolArguments)]
        assert len(parts) == 2 * len(calls) == 2 * len(arguments) > 0
        for call, given in zip(calls, arguments, strict=True):
            assert call.name in ("get_weather", "now")
            assert call.name == "now" or set(given) - {"days"} == {"city"}
        max_calls = max(max_calls, len(calls))
    assert (max_calls > 1) == is_parallel
