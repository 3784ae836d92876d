"""Fields that ask for reasoning have no effect on a model that cannot reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from api.anthropic.messages import request as messages_request
from api.generation.request import GenerationRequest
from api.openai.chat import request as chat_request
from api.openai.responses import request as responses_request
from tests.unit.api.openai.records import MODEL

HI = {"messages": [{"role": "user", "content": "hi"}]}
CHAT, RESPONSES, MESSAGES = chat_request.parse, responses_request.parse, messages_request.parse
BODIES = {CHAT: HI, RESPONSES: {"input": "hi"}, MESSAGES: HI | {"max_tokens": 9}}


@pytest.mark.parametrize(
    ("parse", "fields", "expected"),
    [
        (CHAT, {"thinking_budget": 5}, ["thinking_budget"]),
        (CHAT, {"thinking_token_budget": 5}, ["thinking_token_budget"]),
        (CHAT, {"reasoning_budget": 5}, ["reasoning_budget"]),
        (CHAT, {"thinking": {"type": "enabled"}}, ["thinking"]),
        (CHAT, {"thinking": {"budget_tokens": 5}}, ["thinking"]),
        (CHAT, {"thinking": True}, ["thinking"]),
        (CHAT, {"reasoning": {"effort": "high"}}, ["reasoning"]),
        (CHAT, {"reasoning": {"max_tokens": 5}}, ["reasoning"]),
        (CHAT, {"reasoning": {"enabled": True}}, ["reasoning"]),
        (RESPONSES, {"reasoning": {"effort": "low", "summary": "auto"}}, ["reasoning"]),
        (MESSAGES, {"thinking": {"type": "enabled"}}, ["thinking"]),
        (MESSAGES, {"thinking": {"type": "adaptive", "budget_tokens": 5}}, ["thinking"]),
        # What asks for no reasoning, or is data for the template, has its effect.
        (CHAT, {"reasoning": {"enabled": False, "effort": "none"}}, []),
        (CHAT, {"thinking_budget": 0}, []),
        (CHAT, {"thinking": {"type": "disabled"}}, []),
        (CHAT, {"reasoning": {"exclude": True}}, []),
        (CHAT, {"enable_thinking": True, "reasoning_effort": "high"}, []),
        (CHAT, {"chat_template_kwargs": {"enable_thinking": True}}, []),
        (RESPONSES, {"reasoning": {"summary": "auto"}}, []),
        (MESSAGES, {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}, []),
        (MESSAGES, {"thinking": {"type": "disabled"}}, []),
    ],
)
def test_fields_without_an_effect_are_found(
    parse: Callable[[bytes], GenerationRequest], fields: dict[str, Any], expected: list[str]
) -> None:
    """Only on a model without markers of reasoning."""
    request = parse(json.dumps(BODIES[parse] | fields).encode())
    assert request.without_effect(MODEL) == expected
    assert request.without_effect(msgspec.structs.replace(MODEL, can_reason=True)) == []
