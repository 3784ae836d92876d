"""Valid bodies of `/v1/messages`, `/tokenize` and `/detokenize`, as Hypothesis strategies; `bench.fuzz.bodies` corrupts them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from bench.fuzz.texts import MAX_TOKENS, MODEL, PLAIN

_CACHED = st.sampled_from([{}, {"cache_control": {"type": "ephemeral"}}])
_TEXT_BLOCK = st.builds(lambda text, cached: {"type": "text", "text": text, **cached}, PLAIN, _CACHED)
_CALLED = [
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "x"},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
        ],
    },
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "x", "is_error": True}],
    },
]
_TURNS = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system"]),
            "content": PLAIN | st.lists(_TEXT_BLOCK, min_size=1, max_size=3),
        }
    ),
    max_size=2,
)
_TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}

MESSAGE: st.SearchStrategy[dict[str, Any]] = st.builds(
    lambda fields, stream: fields | stream,
    st.fixed_dictionaries(
        {
            "messages": st.builds(
                lambda text, called, turns: [{"role": "user", "content": text}, *called, *turns],
                PLAIN,
                st.sampled_from([[], _CALLED]),
                _TURNS,
            ),
            "max_tokens": st.integers(1, MAX_TOKENS),
        },
        optional={
            "model": st.just(MODEL),
            "system": PLAIN | st.lists(_TEXT_BLOCK, max_size=2),
            "temperature": st.floats(0, 1),
            "top_p": st.floats(0, 1),
            "top_k": st.integers(0, 2000),
            "stop_sequences": st.lists(PLAIN.filter(str.strip), max_size=3),
            "metadata": st.fixed_dictionaries({"user_id": PLAIN}),
            "tools": st.lists(st.just(_TOOL), max_size=1),
            "tool_choice": st.sampled_from([{"type": "auto"}, {"type": "none"}]),
            "thinking": st.sampled_from(
                [{"type": "disabled"}, {"type": "adaptive"}, {"type": "enabled", "budget_tokens": 1024}]
            ),
            "service_tier": st.sampled_from(["auto", "standard_only"]),
        },
    ),
    st.sampled_from([{}, {"stream": False}, {"stream": True}]),
)

TOKENIZE: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"prompt": PLAIN},
    optional={
        "model": st.just(MODEL),
        "add_special_tokens": st.booleans(),
        "return_token_strs": st.booleans(),
    },
)
DETOKENIZE: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"tokens": st.lists(st.integers(0, 999), max_size=8)}, optional={"model": st.just(MODEL)}
)
