"""Rows that join and leave a batch, of small random models with all kinds of caches: each has the tokens that it has alone."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

from common.protocol import SamplingParams
from worker.mlx.batch import Batch, NewRow
from worker.mlx.kv_slots import SlotKVCache
from worker.sampling.sampler import SequenceSampler

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


def prompt(row: int, length: int = 0) -> list[int]:
    """Any token ids."""
    return [(11 * row + 7 * i) % VOCABULARY for i in range(length or ROWS[row][0])]


def processors(*, penalty: float) -> list[Any]:
    """mlx-lm's, of a row."""
    return make_logits_processors(repetition_penalty=penalty)


def alone(model: Any, token_ids: list[int], num_tokens: int, penalty: float = 0.0) -> list[int]:
    """What mlx-lm generates for a row by itself."""
    generator = BatchGenerator(model)
    made = [processors(penalty=penalty)] if penalty else None
    generator.insert([token_ids], max_tokens=[num_tokens], logits_processors=made)
    found: list[int] = []
    while len(found) < num_tokens:
        found += [response.token for response in generator.next()[1]]
    return found


def batch_of(model: Any, max_rows: int) -> Batch:
    return Batch(model, [], max_rows, 64, on_host=True, never_excluded=[], wire=False)


def new_row(token_ids: list[int], num_tokens: int, penalty: float = 0.0) -> NewRow:
    made = processors(penalty=penalty) if penalty else []
    return NewRow(token_ids, num_tokens, SequenceSampler(SamplingParams(temperature=0)), made)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


@pytest.mark.parametrize("penalty", [0.0, 1.5])
def test_rows_of_a_model(model: Any, penalty: float) -> None:
    """Short and long prompts, one token among them; one row is taken out while it generates, another before its first token.

    The second row may have a logits processor, with which the whole batch takes mlx-lm's own step.
    """
    batch = batch_of(model, 8)
    found: dict[int, list[int]] = {}
    uids: dict[int, int] = {}
    removed = {4: 5, 3: 0}  # after so many tokens
    num_steps = 0
    while len(uids) < len(ROWS) or batch._rows:
        for row, (_, num_tokens, step) in enumerate(ROWS):
            if step == num_steps:
                uids[row] = batch.insert(new_row(prompt(row), num_tokens, penalty if row == 1 else 0.0))
                found[row] = []
        for response in batch.next():
            found[next(row for row, uid in uids.items() if uid == response.uid)].append(response.token)
        for row, num_tokens in removed.items():
            if row in uids and not batch.is_reading(uids[row]) and len(found[row]) == num_tokens:
                batch.remove(uids[row])
        num_steps += 1
    for row, tokens in found.items():
        num_tokens = removed.get(row, ROWS[row][1])
        assert len(tokens) == num_tokens
        assert tokens == alone(model, prompt(row), ROWS[row][1], penalty if row == 1 else 0.0)[:num_tokens]
    assert len({tuple(tokens) for tokens in found.values()}) == len(ROWS)


def test_many_leave_at_once(model: Any) -> None:
    """Every second row: more than are copied one by one."""
    batch = batch_of(model, 32)
    lengths = [4 if row % 2 == 0 and row < 24 else 9 for row in range(32)]
    uids = [batch.insert(new_row(prompt(row, 3 + row % 5), length)) for row, length in enumerate(lengths)]
    found: dict[int, list[int]] = {uid: [] for uid in uids}
    while batch._rows:
        for response in batch.next():
            found[response.uid].append(response.token)
    for row, (uid, length) in enumerate(zip(uids, lengths, strict=True)):
        assert found[uid] == alone(model, prompt(row, 3 + row % 5), length)


def test_which_layers_have_slots(model: Any) -> None:
    """Those that keep everything; the others have mlx-lm's caches."""
    batch = batch_of(model, 8)
    for row in (0, 1):
        batch.insert(new_row(prompt(row), 5))
    while not batch.next():
        pass
    caches = batch._generator._generation_batch.prompt_cache
    kept = [isinstance(cache, KVCache) for cache in make_prompt_cache(model)]
    assert [isinstance(cache, SlotKVCache) for cache in caches] == kept
    assert any(kept)
    assert batch.cache_bytes > 0
