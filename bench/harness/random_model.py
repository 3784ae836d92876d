"""Writes a Llama with random weights, so that the figures of large shapes can be repeated without a model hub.

`python -m bench.harness.random_model FOLDER --preset 1b --vocab 151936` writes config.json, bfloat16 weights and the demo model's
tokenizer, which gets more words if the vocabulary is larger. The last `--padding` ids stay without text, as in models whose vocabulary is
padded for the hardware. Speed does not depend on the values of weights; the answers mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.harness.table import say
from worker.models.demo_model import ensure_demo_model

PRESETS: dict[str, dict[str, int]] = {
    "1b": {"hidden": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "ffn": 8192, "vocab": 49_152},
    "3b": {"hidden": 3072, "layers": 28, "heads": 24, "kv_heads": 8, "ffn": 8192, "vocab": 128_256},
    "8b": {"hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "ffn": 14_336, "vocab": 128_256},
}
"""Those of Llama 3.x, but for the vocabulary of `1b`, which is the demo model's."""

_STD = 0.02
"""As models are initialized for training: logits stay finite in any depth."""

_SEED = 1
_CONTEXT_TOKENS = 32_768
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SPACE = "\u0120"
"""In byte-level BPE."""

_WORD_LETTERS = 5


def write_model(folder: Path, shape: dict[str, int], tokenizer: Path, num_padding: int = 0) -> None:
    """Write a model; a folder that exists is completed or overwritten.

    Args:
        shape: With the keys of a preset.
        tokenizer: The folder of the model whose tokenizer is taken: byte-level BPE.
        num_padding: How many ids at the end of the vocabulary have no text.

    Raises:
        ValueError: The vocabulary is smaller than the tokenizer's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder, tokenizer, shape["vocab"], num_padding)
    end_ids = _end_of_text_ids(tokenizer)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "intermediate_size": shape["ffn"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["hidden"] // shape["heads"],
        "vocab_size": shape["vocab"],
        "max_position_embeddings": _CONTEXT_TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
        "eos_token_id": end_ids,
    }
    _write_json(folder / "config.json", config)
    _write_weights(folder / "model.safetensors", config, end_ids)


def _write_weights(path: Path, config: dict[str, Any], end_ids: list[int]) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    model = llama.Model(llama.ModelArgs.from_dict(config))
    shapes: Any = tree_flatten(model.parameters())
    mx.random.seed(_SEED)
    weights: dict[str, mx.array] = {}
    for name, lazy in shapes:
        if lazy.ndim == 1:  # of a norm
            weights[name] = mx.ones(lazy.shape, mx.bfloat16)
            continue
        weight = mx.random.normal(lazy.shape, mx.bfloat16, scale=_STD)
        if name == "model.embed_tokens.weight":
            # The output projection too: with a logit of 0 an end of text is never the likeliest token, so answers end at their limit.
            weight[mx.array(end_ids)] = 0.0
        weights[name] = weight
        mx.eval(weight)
    mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})


def _end_of_text_ids(tokenizer: Path) -> list[int]:
    """Of the tokenizer's `eos_token`."""
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    file = json.loads((tokenizer / "tokenizer.json").read_text())
    eos = config["eos_token"]
    content = eos["content"] if isinstance(eos, dict) else eos
    return [token["id"] for token in file["added_tokens"] if token["content"] == content]


def _write_tokenizer(folder: Path, source: Path, vocab_size: int, num_padding: int) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    file = json.loads((source / "tokenizer.json").read_text())
    vocab: dict[str, int] = file["model"]["vocab"]
    num_tokens = 1 + max(*vocab.values(), *(token["id"] for token in file["added_tokens"]))
    if vocab_size < num_tokens:
        raise ValueError(f"the tokenizer has {num_tokens} tokens, more than the vocabulary of {vocab_size}")
    new_ids = range(num_tokens, vocab_size - num_padding)
    words = (word for word in _words() if word not in vocab)
    vocab |= dict(zip(words, new_ids, strict=False))
    (folder / "tokenizer.json").write_text(json.dumps(file, ensure_ascii=False))


def _words() -> Iterator[str]:
    """Distinct words of one length, each after a space. No merge leads to them, so that texts are tokenized as before."""
    for letters in itertools.product(string.ascii_lowercase, repeat=_WORD_LETTERS):
        yield _SPACE + "".join(letters[::-1])


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))


def main(argv: list[str] | None = None) -> int:
    """Write a model; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.harness.random_model", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="1b")
    for name in PRESETS["1b"]:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, metavar="N", help="instead of the preset's"
        )
    parser.add_argument(
        "--padding", type=int, default=0, metavar="N", help="ids at the end that have no text"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="of another model than the demo model"
    )
    arguments = parser.parse_args(argv)
    given = {name: getattr(arguments, name) for name in PRESETS["1b"]}
    shape = PRESETS[arguments.preset] | {name: value for name, value in given.items() if value is not None}
    write_model(arguments.folder, shape, arguments.tokenizer or ensure_demo_model(None), arguments.padding)
    say(f"{arguments.folder}: {shape}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
