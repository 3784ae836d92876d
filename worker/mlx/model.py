"""One of the two doors to MLX: loads a model with what a request needs of it, and converts a GGUF file.

The generation thread calls `load_model` and is from then on the only one that touches MLX; `worker.models.demo_model` calls
`save_gguf_weights` there as well. Nothing here knows jobs, queues or sampling.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from common.errors import StartupError, one_line
from common.settings import Settings
from worker.loop.engine import ModelInfo
from worker.mlx.memory import CacheCost, CacheMemory
from worker.models import model_folder
from worker.text import fill_in_middle

logger = logging.getLogger(__name__)

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "max_sequence_length",
    "model_max_length",
    "seq_length",
    "max_seq_len",
    "n_positions",
    "n_ctx",
)
_UNKNOWN_CONTEXT_TOKENS = 32_768
"""For a model that names no limit, such as one with a recurrent state instead of a cache."""

_MACHINE_SHARE = 0.75
_MIN_CONTEXT_TOKENS = 512

_LARGEST_BELIEVED_CONTEXT = 10**9
"""transformers writes 10**30 where a tokenizer knows no limit."""


class LoadedModel(NamedTuple):
    """A model, mlx-lm's wrapper of its tokenizer, and its config.json as a dict."""

    model: Any
    tokenizer: Any
    config: dict[str, Any]


@functools.cache
def preload_blas() -> str | None:
    """Load OpenBLAS where MLX's CPU build finds it; call it before the first `import mlx`. Only Linux needs it.

    MLX links the reference BLAS there: 16 times slower in a batch (219 against 13.5 tokens/s, SmolLM2, 2 cores).

    Returns:
        What to install, as a sentence for the log, or None where nothing is missing.
    """
    if sys.platform != "linux":
        return None
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return "libopenblas.so.0 is not here, so MLX on this CPU is slow; install OpenBLAS (Debian: libopenblas0-pthread)"
    return None


@functools.cache
def _mlx() -> ModuleType:
    """`mlx.core`, imported late: BLAS comes first, and `--help` needs neither."""
    missing_blas = preload_blas()
    # With CUDA, cuDNN plans attention anew for each number of prompts and each length: 70 ms on an H200, where MLX's own takes 15
    # (0.32; read at its first use). Figures: bench/RESULTS.md.
    os.environ.setdefault("MLX_CUDA_USE_CUDNN_SDPA", "0")
    try:
        import mlx.core as mx
    except ImportError as error:
        raise StartupError(f"MLX cannot be imported ({error}); `make install` installs it") from None
    if missing_blas and not has_gpu(mx):
        logger.warning(missing_blas)
    return mx


def has_gpu(mx: ModuleType | None = None) -> bool:
    """Whether MLX computes on a GPU here."""
    mx = mx or _mlx()
    return bool(mx.default_device().type == mx.DeviceType.gpu)


def load_model(settings: Settings, before_loading: Callable[[Path], object] | None = None) -> LoadedModel:
    """Load `settings.model`, with its adapter and chat template; downloads or converts it first if need be.

    Call it on the thread that will generate: MLX's streams and lazy arrays do not cross threads (mlx 0.31.2 on).

    Args:
        before_loading: Called with the model's folder before its weights are read.

    Raises:
        StartupError: There is no such model, it cannot be fetched, or mlx-lm cannot load it.
    """
    mx = _mlx()
    import mlx_lm
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    folder = model_folder.find(settings, DEFAULT_ALLOW_PATTERNS)
    if before_loading is not None:
        before_loading(folder)

    if settings.cache_limit_gb is not None:
        mx.set_cache_limit(int(settings.cache_limit_gb * 2**30))
    # False, not None: transformers 5.24 asks on standard input when it is None and the model brings code.
    tokenizer_config: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if settings.chat_template is not None:
        tokenizer_config["chat_template"] = _chat_template(settings.chat_template)
    try:
        loaded: Any = mlx_lm.load(
            str(folder),
            tokenizer_config=tokenizer_config,
            adapter_path=settings.adapter_path,
            return_config=True,
            trust_remote_code=settings.trust_remote_code,
        )
    except Exception as error:  # mlx-lm and transformers raise whatever a bad file made them trip over
        logger.debug("loading %s failed", folder, exc_info=True)
        raise StartupError(f"the model in {folder} cannot be loaded: {one_line(error)}") from None
    model, tokenizer, config = loaded
    if settings.use_default_chat_template:
        _use_default_chat_template(tokenizer)
    return LoadedModel(model, tokenizer, config)


def describe(loaded: LoadedModel, max_batch: int) -> ModelInfo:
    """What the model card says of a loaded model; `max_batch` is 1 for one whose cache cannot batch."""
    return ModelInfo(
        context_length=context_length(loaded.config, getattr(loaded.tokenizer, "model_max_length", None)),
        vocab_size=int(_text_config(loaded.config).get("vocab_size") or len(loaded.tokenizer.get_vocab())),
        max_batch=max_batch if can_batch(loaded.model) else 1,
        quantization=quantization(loaded.config) or weight_type(loaded.model),
        has_chat_template=bool(loaded.tokenizer.has_chat_template),
        can_fill=fill_in_middle.find_markers(loaded.tokenizer) is not None,
    )


def cache_memory(loaded: LoadedModel, limit_bytes: float) -> CacheMemory:
    """What is left for the rows' caches, of the memory that this process may use.

    Raises:
        StartupError: The weights leave no room.
    """
    from mlx.utils import tree_flatten

    cost = _cache_cost(loaded.model)
    parameters: Any = tree_flatten(loaded.model.parameters())
    weight_bytes = sum(weight.nbytes for _, weight in parameters)
    memory = CacheMemory(cost, 0.0, weight_bytes).with_limit(limit_bytes)
    if not memory.longest_row(_MIN_CONTEXT_TOKENS):
        raise StartupError(
            f"the model's weights are {weight_bytes / 2**30:.1f} GB, which leaves no room for requests in "
            f"{limit_bytes / 2**30:.3g} GB; take a smaller model, or give more with --memory-limit-gb"
        )
    return memory


def set_memory_limit(limit_bytes: int) -> None:
    """Let MLX's allocator wait for memory to be freed beyond this."""
    _mlx().set_memory_limit(limit_bytes)


def device_name() -> str:
    """Which memory MLX computes in: workers with the same name share it."""
    mx = _mlx()
    if not has_gpu(mx):
        return "cpu"
    # MLX uses the first GPU that CUDA shows it.
    return "gpu " + os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def machine_limit_bytes() -> float:
    """What MLX recommends for a Mac's GPU; elsewhere a part of the memory that computes."""
    mx = _mlx()
    if has_gpu(mx):
        # Its keys differ between Metal and CUDA (mlx 0.32).
        about: dict[str, Any] = getattr(mx, "device_info", dict)()
        if recommended := about.get("max_recommended_working_set_size"):
            return float(recommended)
        return _MACHINE_SHARE * (
            about.get("memory_size") or about.get("total_memory") or _main_memory_bytes()
        )
    return _MACHINE_SHARE * _main_memory_bytes()


def _main_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cache_cost(model: Any) -> CacheCost:
    """Measured with one token: models differ in what their layers keep."""
    mx = _mlx()
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model)
    model(mx.array([[0]]), cache=caches)
    mx.eval([cache.state for cache in caches])
    per_token, per_row, windows = 0.0, 0, []
    for cache in _flat(caches):
        keys = getattr(cache, "keys", None)
        if keys is None or not hasattr(keys, "shape"):
            per_row += int(getattr(cache, "nbytes", 0))
            continue
        each = cache.nbytes / keys.shape[2]
        window = getattr(cache, "max_size", None)
        if isinstance(window, int) and window > 0:
            windows.append((each, window))
        else:
            per_token += each
    return CacheCost(per_token, per_row, tuple(windows))


def _flat(caches: Any) -> list[Any]:
    """Caches in lists of caches (`CacheList`), one after the other."""
    flat: list[Any] = []
    for cache in caches:
        inner = getattr(cache, "caches", None)
        flat += _flat(inner) if inner is not None else [cache]
    return flat


def can_batch(model: Any) -> bool:
    """Whether all caches of the model have what `mlx_lm.generate` 0.32 needs to put rows together."""
    from mlx_lm.models.cache import make_prompt_cache

    return all(hasattr(cache, "merge") for cache in make_prompt_cache(model))


def context_length(config: Mapping[str, Any], tokenizer_limit: int | None = None) -> int:
    """The model's context in tokens, from its config, else its tokenizer's limit, else a common one."""
    text_config = _text_config(config)
    for key in _CONTEXT_KEYS:
        if isinstance(text_config.get(key), int) and text_config[key] > 0:
            return int(text_config[key])
    if tokenizer_limit and tokenizer_limit < _LARGEST_BELIEVED_CONTEXT:
        return int(tokenizer_limit)
    return _UNKNOWN_CONTEXT_TOKENS


def quantization(config: Mapping[str, Any]) -> str:
    """Such as ``4-bit, group 64`` or ``4- and 8-bit, group 32, mxfp4``; empty for weights that are not quantized."""
    scheme = config.get("quantization") or config.get("quantization_config")
    if not isinstance(scheme, dict):
        return ""
    if "bits" not in scheme:
        return str(scheme.get("quant_method", "quantized"))
    layers = [layer for layer in scheme.values() if isinstance(layer, dict) and "bits" in layer]
    bits = sorted({int(layer["bits"]) for layer in [scheme, *layers]})
    words = ["- and ".join(map(str, bits)) + "-bit"]
    if "group_size" in scheme:
        words.append(f"group {scheme['group_size']}")
    if scheme.get("mode", "affine") != "affine":
        words.append(str(scheme["mode"]))
    return ", ".join(words)


def weight_type(model: Any) -> str:
    """The type that most of the model's weights have, such as ``bfloat16``."""
    from mlx.utils import tree_flatten

    num_weights: dict[str, int] = {}
    weights: Any = tree_flatten(model.parameters())
    for _, weight in weights:
        name = str(weight.dtype).removeprefix("mlx.core.")
        num_weights[name] = num_weights.get(name, 0) + weight.size
    return max(num_weights, key=lambda name: num_weights[name], default="")


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """A GGUF file's metadata as Python values; arrays become lists, scalars numbers."""
    _, metadata = _mlx().load(str(path), return_metadata=True)
    return {
        key: value if isinstance(value, str | list) else value.tolist() for key, value in metadata.items()
    }


def save_gguf_weights(path: Path, target: Path, names: Mapping[str, str], dtype: str) -> None:
    """Write a GGUF file's weights, dequantized, as safetensors.

    Args:
        names: GGUF's part of a name to MLX's: ``attn_q`` to ``self_attn.q_proj``.
        dtype: Such as ``float32``.
    """
    mx = _mlx()
    gguf = mx.load(str(path))
    weights = {}
    for name, weight in gguf.items():
        stem, kind = name.rsplit(".", 1)
        if kind in ("scales", "biases"):
            continue
        scales = gguf.get(stem + ".scales")
        if scales is not None:
            # mx.load (mlx 0.32) packs GGUF's blocks into uint32, each with its own scale and bias.
            group_size = 32
            bits = weight.shape[-1] * 32 // (scales.shape[-1] * group_size)
            weight = mx.dequantize(weight, scales, gguf[stem + ".biases"], group_size=group_size, bits=bits)  # noqa: PLW2901
        weights[f"{_mlx_name(stem, names)}.{kind}"] = weight.astype(getattr(mx, dtype))
    mx.save_safetensors(str(target), weights, metadata={"format": "mlx"})


def _mlx_name(stem: str, names: Mapping[str, str]) -> str:
    """``blk.3.attn_q`` as ``model.layers.3.self_attn.q_proj``."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    return f"model.layers.{block[1]}.{names[block[2]]}" if block else f"model.{names[stem]}"


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that is about text: the whole, or one key of a multimodal model's."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _chat_template(text_or_path: str) -> str:
    """The template itself, where `--chat-template` names a file that holds it.

    Raises:
        StartupError: It names a file that is not there or cannot be read.
    """
    if "{" in text_or_path or "\n" in text_or_path:
        return text_or_path
    try:
        return Path(text_or_path).expanduser().read_text()
    except OSError as error:
        raise StartupError(
            f"--chat-template is neither a Jinja template nor a file that can be read: {one_line(error)}"
        ) from None


def _use_default_chat_template(tokenizer: Any) -> None:
    """As mlx_lm.server's flag: a template of the tokenizer's class, for a model that brings none."""
    if tokenizer.has_chat_template:
        return
    template = getattr(tokenizer, "default_chat_template", None)
    if template is None:
        raise StartupError(
            "--use-default-chat-template: this tokenizer's class has no default template; give one with --chat-template"
        )
    tokenizer.chat_template = template
    tokenizer.has_chat_template = True
