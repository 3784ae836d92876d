"""Rows that join and leave a batch, of small random models with all kinds of caches: each has the tokens that it has alone."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator

from common.protocol import SamplingParams
from worker.mlx_batch import Batch, NewRow
from worker.mlx_slots import SlotKVCache
from worker.sampler import RowSampler

VOCABULARY = 97
COMMON = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
MODELS: dict[str, dict[str, Any]] = {
    # All layers keep everything.
    "llama": {"num_hidden_layers": 3, "intermediate_size": 64, "rms_norm_eps": 1e-5},
    # Three of four keep the last 16 tokens.
    "gemma3_text": {
        "num_hidden_layers": 4,
        "intermediate_size": 64,
        "head_dim": 8,
        "sliding_window": 16,
        "sliding_window_pattern": 4,
    },
    # Convolutions keep a state.
    "lfm2": {
        "num_hidden_layers": 4,
        "max_position_embeddings": 512,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_ff_dim": 64,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1, 3],
    },
}
# Number of prompt tokens, of tokens to be generated, and the step after which the row comes.
ROWS = [(9, 30, 0), (4, 12, 0), (1, 6, 2), (25, 9, 3), (3, 20, 8), (40, 5, 8), (1, 3, 9), (7, 7, 20)]


def made(kind: str) -> Any:
    """A random model, the same each time."""
    module: Any = import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **COMMON, **MODELS[kind]}))
    # Far from each other, so that no rounding decides which is the largest.
    model.update(_scaled(model.parameters()))
    mx.eval(model.parameters())
    return model


def _scaled(parameters: Any) -> Any:
    from mlx.utils import tree_map

    return tree_map(lambda each: 3 * mx.random.normal(each.shape) if each.ndim == 2 else each, parameters)


def prompt(row: int) -> list[int]:
    """Any token ids."""
    return [(11 * row + 7 * i) % VOCABULARY for i in range(ROWS[row][0])]


def alone(model: Any, row: int) -> list[int]:
    """What mlx-lm generates for a row by itself."""
    generator = BatchGenerator(model)
    generator.insert([prompt(row)], max_tokens=[ROWS[row][1]])
    found: list[int] = []
    while len(found) < ROWS[row][1]:
        found += [response.token for response in generator.next()[1]]
    return found


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


def test_rows_of_a_model(model: Any) -> None:
    """Short and long prompts, one token among them; the fifth row is taken out while it generates."""
    batch = Batch(model, [], 8, 64, on_host=True, never_excluded=[], wire=False)
    found: dict[int, list[int]] = {}
    places: dict[int, int] = {}
    removed, num_steps = 4, 0
    while len(places) < len(ROWS) or any(place in batch._rows for place in places):
        for row, (_, num_tokens, step) in enumerate(ROWS):
            if step == num_steps:
                sampler = RowSampler(SamplingParams(temperature=0))
                uid = batch.insert(NewRow(prompt(row), num_tokens, sampler, []))
                places[uid], found[row] = row, []
        for response in batch.next():
            found[places[response.uid]].append(response.token)
        num_steps += 1
        if len(found.get(removed, [])) == 5:
            batch.remove(next(uid for uid, row in places.items() if row == removed))
            found[removed].append(-1)
    for row, tokens in found.items():
        wanted = alone(model, row)
        assert tokens == ([*wanted[:5], -1] if row == removed else wanted)


def test_which_layers_have_slots(model: Any) -> None:
    """Those that keep everything; the others have mlx-lm's caches."""
    batch = Batch(model, [], 8, 64, on_host=True, never_excluded=[], wire=False)
    for row in (0, 1):
        batch.insert(NewRow(prompt(row), 5, RowSampler(SamplingParams(temperature=0)), []))
    while not batch.next():
        pass
    caches = batch._generator._generation_batch.prompt_cache
    kept = (
        [type(cache).__name__ == "KVCache" for cache in model.make_cache()]
        if hasattr(model, "make_cache")
        else [True] * len(caches)
    )
    assert [isinstance(cache, SlotKVCache) for cache in caches] == kept
    assert any(kept)
