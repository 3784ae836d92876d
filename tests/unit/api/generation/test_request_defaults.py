"""A model's sampling defaults apply where a request is silent."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from api.anthropic.messages import request as messages_request
from api.generation.request import GenerationRequest
from api.generation.served_model import ServedModel
from api.openai.chat import request as chat_request
from api.openai.completions import request as completion_request
from api.openai.responses import request as responses_request
from common.protocol import SamplingParams

DEFAULTS = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.05}
MODEL = ServedModel("m", 0, 100, 100, 1, 1, "", sampling_defaults=DEFAULTS)
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
MESSAGES = CHAT | {"max_tokens": 5}


def sampling(parse: Callable[[bytes], GenerationRequest], body: dict[str, Any]) -> SamplingParams:
    return parse(json.dumps(body).encode()).jobs("x", MODEL, "c", [1])[0].sampling


@pytest.mark.parametrize(
    ("parse", "body"),
    [
        (chat_request.parse, CHAT),
        (completion_request.parse, {"prompt": "hi"}),
        (messages_request.parse, MESSAGES),
        (responses_request.parse, {"input": "hi"}),
    ],
)
def test_silent_requests(parse: Callable[[bytes], GenerationRequest], body: dict[str, Any]) -> None:
    """All defaults apply; whole numbers stay whole, as the sampler needs them."""
    silent = sampling(parse, body)
    assert {name: getattr(silent, name) for name in DEFAULTS} == DEFAULTS
    assert type(silent.top_k) is int


def test_what_a_request_sets() -> None:
    """Its values hold, also those that equal the API's own defaults."""
    explicit = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    set_by_client = sampling(chat_request.parse, CHAT | explicit)
    assert {name: getattr(set_by_client, name) for name in explicit} == explicit


@pytest.mark.parametrize(("parse", "body"), [(chat_request.parse, CHAT), (messages_request.parse, MESSAGES)])
def test_top_p_0_is_greedy(parse: Callable[[bytes], GenerationRequest], body: dict[str, Any]) -> None:
    """The model's temperature does not undo it."""
    assert sampling(parse, body | {"top_p": 0}).temperature == 0
