"""Small random models of several types: sequences that join and leave generate the tokens that each generates without caches."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from tests.model.mlx.random_models import COMMON, VOCABULARY, batch_of, prompt, sequence_of
from worker.mlx.caches.kinds import can_batch
from worker.mlx.fused_projections import fuse_projections
from worker.mlx.padding_masks import accept_padding_masks

SIZES = {**COMMON, "num_hidden_layers": 3, "intermediate_size": 64, "rms_norm_eps": 1e-5, "head_dim": 8}
ATTENTION = {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}}
LINEAR = {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 2.0}}
MODELS: dict[str, dict[str, Any]] = {
    # Its attention is computed in its own way, with a soft cap.
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 1e5},
    # A layer never uses its cache.
    "nemotron-nas": {"block_configs": [ATTENTION, LINEAR, ATTENTION]},
    # Queries and keys are normalized.
    "qwen3": {"max_position_embeddings": 512, "rope_theta": 1e4, "tie_word_embeddings": False},
    # Query, key and value projections are one layer.
    "phi3": {},
    # Layers share keys and values; scaled rotations.
    "hunyuan": {
        "attention_bias": False,
        "moe_topk": 2,
        "num_experts": 1,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": False,
        "use_qk_norm": True,
        "rope_theta": 1e4,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    },
    # Experts, and layers with an expert that all tokens share.
    "ernie4_5_moe": {
        "max_position_embeddings": 512,
        "use_bias": False,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": 16,
    },
}
SEQUENCES = [(9, 14, 0), (4, 5, 0), (1, 6, 2), (20, 7, 3), (3, 9, 8)]
"""Number of prompt tokens, number of tokens to generate, and the step before which the sequence is inserted."""


def make_model(kind: str) -> Any:
    module: Any = import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **SIZES, **MODELS[kind]}))
    # Gemma's tied weights repeat the input unless its norms, whose weights are 0 here, let the layers have their say.
    norm = 9.0 if kind == "gemma2" else 0.0
    model.update(
        tree_map(
            lambda each: 3 * mx.random.normal(each.shape) if each.ndim > 1 else each + norm,
            model.parameters(),
        )
    )
    mx.eval(model.parameters())
    return model


def generate_without_caches(model: Any, token_ids: list[int], num_tokens: int) -> list[int]:
    """The most likely tokens; each is computed from the start."""
    found: list[int] = []
    for _ in range(num_tokens):
        logits: mx.array = model(mx.array([token_ids + found]))[0, -1]
        found.append(int(mx.argmax(logits).item()))
    return found


@pytest.fixture(scope="module", params=list(MODELS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str) -> Any:
    """As a worker loads it."""
    loaded = make_model(kind)
    fuse_projections(loaded)
    accept_padding_masks(loaded)
    return loaded


@pytest.fixture(scope="module")
def expected(kind: str) -> list[list[int]]:
    """The tokens of all sequences, of the model as mlx-lm has made it."""
    original = make_model(kind)
    return [
        generate_without_caches(original, prompt(number, length), num_tokens)
        for number, (length, num_tokens, _) in enumerate(SEQUENCES)
    ]


@pytest.mark.parametrize("is_compiled", [False, True], ids=["plain", "compiled"])
def test_sequences_of_a_type(model: Any, expected: list[list[int]], is_compiled: bool) -> None:
    """The tokens of each sequence are those of the model without caches, with and without compiled steps."""
    batch = batch_of(model, 8, is_compiled=is_compiled)
    found: list[list[int]] = [[] for _ in SEQUENCES]
    for step in range(40):
        for number, (length, num_tokens, first_step) in enumerate(SEQUENCES):
            if first_step == step:
                batch.insert(sequence_of(number, prompt(number, length), num_tokens))
        for token in batch.step():
            found[int(token.job_id)].append(token.token_id)
    assert found == expected
    assert len({token_id for tokens in found for token_id in tokens}) > len(SEQUENCES)


def test_a_model_for_one_sequence(caplog: pytest.LogCaptureFixture) -> None:
    """The positions of GPT BigCode's tokens begin at a number, not at one for each sequence: it decodes one at a time, which is logged."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_inner": 64, "n_head": 4, "n_positions": 128}
    module: Any = import_module("mlx_lm.models.gpt_bigcode")
    args = {"model_type": "gpt_bigcode", "layer_norm_epsilon": 1e-5, "vocab_size": VOCABULARY, **sizes}
    model = module.Model(module.ModelArgs.from_dict(args))
    assert not can_batch(model)
    assert "one sequence at a time" in caplog.text
    for number in range(2):
        batch = batch_of(model, 1, is_compiled=True)
        sequence = sequence_of(number, prompt(number, 5), 4)
        batch.insert(sequence)
        while len(batch):
            batch.step()
        assert sequence.token_ids[5:] == generate_without_caches(model, prompt(number, 5), 4)


def test_models_for_several_sequences(model: Any) -> None:
    """All others of this module."""
    assert can_batch(model)


def test_masks_that_do_not_fit() -> None:
    """Gemma 2 as mlx-lm has made it decodes one sequence at a time."""
    assert not can_batch(make_model("gemma2"))
