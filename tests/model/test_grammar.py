"""Grammars with a real vocabulary, the demo model's 49,152 tokens; masks applied with MLX."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from common.protocol import ToolUse
from common.schema import grammar
from tests.grammar_cases import SCHEMAS, Walk
from worker.mlx import model as mlx_model
from worker.sampling.arrays import apply_mask
from worker.sampling.grammar import GrammarCompiler, GrammarMatcher
from worker.text.detokenizer import TokenBytes

VOCAB_SIZE = 49152
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}}]


@pytest.fixture(scope="module")
def grammars(demo: mlx_model.LoadedModel) -> GrammarCompiler:
    """The compiler for the demo model, with its two end-of-text tokens."""
    return GrammarCompiler(demo.tokenizer, VOCAB_SIZE, [0, 2])


@pytest.fixture(scope="module")
def token_bytes(demo: mlx_model.LoadedModel) -> TokenBytes:
    """The bytes of the demo model's tokens."""
    return TokenBytes(demo.tokenizer)


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_answers_validate(grammars: GrammarCompiler, token_bytes: TokenBytes, name: str) -> None:
    """Tokens drawn at random from the allowed ones always reach an end, and form JSON that matches the client's schema."""
    compiled = grammars.compile(grammar.for_json_schema(SCHEMAS[name]))
    for seed in range(4):
        walk = Walk(compiled, token_bytes.__getitem__, seed).run()
        jsonschema.Draft202012Validator(SCHEMAS[name]).validate(json.loads(walk.text))


@pytest.mark.parametrize(
    "answer",
    [
        "Paris is a city.",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": ""}}\n</tool_call>\n<tool_call>{"name":"get_weather","arguments":{"city":"日本"}}\n</tool_call>',
        'Let me look.\n<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>',
    ],
)
def test_the_tokenizers_own_tokens_are_allowed(
    grammars: GrammarCompiler, demo: mlx_model.LoadedModel, answer: str
) -> None:
    """An answer as the tokenizer encodes it is allowed token by token, although tokens span grammar rules, and may end there."""
    row = GrammarMatcher(grammars.compile(grammar.for_tool_calls(ToolUse(tools=TOOLS))))
    for token_id in demo.tokenizer.encode(answer, add_special_tokens=False):
        assert row.allowed()[token_id // 32] >> token_id % 32 & 1
        row.advance(token_id)
    assert row.allowed()[0] & 0b101 == 0b101


def test_a_small_model_makes_a_required_call(grammars: GrammarCompiler, demo: mlx_model.LoadedModel) -> None:
    """With greedy sampling, a model that was not trained on tool calls makes one that can be parsed."""
    import mlx.core as mx

    prompt = demo.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the weather in Paris?"}], add_generation_prompt=True
    )
    row = GrammarMatcher(
        grammars.compile(grammar.for_tool_calls(ToolUse(tools=TOOLS, is_required=True, is_parallel=False)))
    )
    token_ids: list[int] = []
    while not row.is_finished and len(token_ids) < 60:
        logits = np.array(demo.model(mx.array([[*prompt, *token_ids]]))[:, -1, :].astype(mx.float32))
        token_ids.append(int(apply_mask(row.allowed()[None], logits).argmax()))
        row.advance(token_ids[-1])
    text = demo.tokenizer.decode(token_ids)
    assert text.startswith("<tool_call>")
    call: dict[str, Any] = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call["name"] == "get_weather"
    jsonschema.validate(call["arguments"], CITY)
