"""Small models with random weights and all kinds of caches, their sequences, and the tokens that mlx-lm generates for each alone."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_logits_processors

from common.protocol import SamplingParams
from worker.mlx.backends.append_attention import FunctionalAppendAttention
from worker.mlx.batch import Batch, make_sampler
from worker.mlx.decoding.compiled_forward import CompiledForward
from worker.mlx.decoding.decode_batch import BatchSequence
from worker.sampling.sequence_sampler import SequenceSampler

VOCABULARY = 97
COMMON = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
MODELS: dict[str, dict[str, Any]] = {
    # All layers keep every token.
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


def make_model(kind: str) -> Any:
    """A random model, the same each time."""
    module: Any = import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **COMMON, **MODELS[kind]}))
    # Large weights, so that the logits are far apart and rounding does not decide which is the largest.
    model.update(_scaled(model.parameters()))
    mx.eval(model.parameters())
    return model


def _scaled(parameters: Any) -> Any:
    return tree_map(lambda each: 3 * mx.random.normal(each.shape) if each.ndim == 2 else each, parameters)


def prompt(number: int, length: int) -> list[int]:
    """Arbitrary token ids, others for each number."""
    return [(11 * number + 7 * i) % VOCABULARY for i in range(length)]


def processors(*, penalty: float) -> list[Any]:
    """mlx-lm's logits processors of one sequence."""
    return make_logits_processors(repetition_penalty=penalty)


def generate_alone(model: Any, token_ids: list[int], num_tokens: int, penalty: float = 0.0) -> list[int]:
    """The tokens that mlx-lm generates for a single sequence."""
    generator = BatchGenerator(model)
    made = [processors(penalty=penalty)] if penalty else None
    generator.insert([token_ids], max_tokens=[num_tokens], logits_processors=made)
    found: list[int] = []
    while len(found) < num_tokens:
        found += [response.token for response in generator.next()[1]]
    return found


def batch_of(model: Any, max_sequences: int, *, on_device: bool = False, is_compiled: bool = False) -> Batch:
    return Batch(
        model,
        eos_token_ids=[],
        max_sequences=max_sequences,
        step_tokens=64,
        sampler=make_sampler(VOCABULARY, on_device=on_device or is_compiled),
        on_cpu=True,
        compiled=CompiledForward(model, FunctionalAppendAttention()) if is_compiled else None,
    )


def sequence_of(name: int, token_ids: list[int], num_tokens: int, penalty: float = 0.0) -> BatchSequence:
    made = processors(penalty=penalty) if penalty else []
    sampler = SequenceSampler(SamplingParams(temperature=0, repetition_penalty=penalty or 1.0))
    return BatchSequence(str(name), token_ids, num_tokens, sampler, processors=made)
