"""Loads a model with what a request needs of it, and describes it for the model card.

Called by `worker.mlx.engine`, on the thread that will generate. Independent of jobs, queues, sampling and of where a model's files
come from: `worker.models.model_folder` finds them first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten

from common.errors import StartupError, one_line
from common.machine import local_model
from common.models import sampling_defaults
from common.settings import Settings
from worker.loop.engine import ModelInfo
from worker.mlx.backends.blas import preload_blas
from worker.mlx.caches import kinds
from worker.mlx.fused_projections import fuse_projections
from worker.mlx.padding_masks import accept_padding_masks
from worker.text import fill_in_middle, template_defaults

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
"""Of a model that names no limit, such as one with a recurrent state instead of a cache."""

_MAX_PLAUSIBLE_CONTEXT = 10**9
"""transformers writes 10**30 where a tokenizer knows no limit."""


class LoadedModel(NamedTuple):
    """A model and what belongs to it.

    Attributes:
        tokenizer: mlx-lm's wrapper.
        config: Its config.json.
        sampling_defaults: See `common.models.sampling_defaults`.
        template_arguments: See `worker.text.template_defaults`.
    """

    model: Any
    tokenizer: Any
    config: dict[str, Any]
    sampling_defaults: dict[str, float]
    template_arguments: dict[str, Any]


def has_gpu() -> bool:
    """Whether MLX computes on a GPU here."""
    return bool(mx.default_device().type == mx.DeviceType.gpu)


def load_model(
    settings: Settings, folder: Path | None = None, before_loading: Callable[[Path], object] | None = None
) -> LoadedModel:
    """Load a model with its adapter and chat template.

    Call it on the thread that will generate: MLX's streams and lazy arrays do not cross threads (mlx 0.31.2 on).

    Args:
        folder: The model's files; None: `settings.model` is their folder.
        before_loading: Called with the model's folder before its weights are read.

    Raises:
        StartupError: The folder holds no model, mlx-lm cannot load it, or the template's arguments are malformed.
    """
    if (missing := preload_blas()) and not has_gpu():
        logger.warning(missing)
    template_arguments = template_defaults.parse(settings.chat_template_args)
    folder = folder or local_model.check_folder(Path(settings.model))
    if before_loading is not None:
        before_loading(folder)
    if settings.cache_limit_gb is not None:
        mx.set_cache_limit(int(settings.cache_limit_gb * 2**30))
    # False, not None: transformers 5.24 asks on standard input when it is None and the model contains code.
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
    except Exception as error:  # mlx-lm and transformers raise any exception for a bad file
        logger.debug("loading %s failed", folder, exc_info=True)
        raise StartupError(f"the model in {folder} cannot be loaded: {one_line(error)}") from None
    model, tokenizer, config = loaded
    fuse_projections(model)
    accept_padding_masks(model)
    if settings.use_default_chat_template:
        _use_default_chat_template(tokenizer)
    defaults = sampling_defaults.read(folder) if settings.use_generation_config else {}
    return LoadedModel(model, tokenizer, config, defaults, template_arguments)


def describe(loaded: LoadedModel, max_batch: int) -> ModelInfo:
    """What the model card says of a loaded model; `max_batch` is 1 for one whose cache cannot batch."""
    return ModelInfo(
        context_length=context_length(loaded.config, getattr(loaded.tokenizer, "model_max_length", None)),
        vocab_size=int(_text_config(loaded.config).get("vocab_size") or len(loaded.tokenizer.get_vocab())),
        max_batch=max_batch if kinds.can_batch(loaded.model) else 1,
        quantization=quantization(loaded.config) or weight_type(loaded.model),
        has_chat_template=bool(loaded.tokenizer.has_chat_template),
        can_fill=fill_in_middle.find_markers(loaded.tokenizer) is not None,
        sampling_defaults=loaded.sampling_defaults,
    )


def context_length(config: Mapping[str, Any], tokenizer_limit: int | None = None) -> int:
    """The model's context in tokens, from its config, else its tokenizer's limit, else a common one."""
    text_config = _text_config(config)
    for key in _CONTEXT_KEYS:
        if isinstance(text_config.get(key), int) and text_config[key] > 0:
            return int(text_config[key])
    if tokenizer_limit and tokenizer_limit < _MAX_PLAUSIBLE_CONTEXT:
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
    num_weights: dict[str, int] = {}
    weights: Any = tree_flatten(model.parameters())
    for _, weight in weights:
        name = str(weight.dtype).removeprefix("mlx.core.")
        num_weights[name] = num_weights.get(name, 0) + weight.size
    return max(num_weights, key=lambda name: num_weights[name], default="")


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that is about text: all of it, or the value of one key in a multimodal model's."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _chat_template(text_or_path: str) -> str:
    """The chat template: the setting itself, or the content of the file that it names.

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
    """As mlx_lm.server's flag: a template of the tokenizer's class, for a model without a template."""
    if tokenizer.has_chat_template:
        return
    template = getattr(tokenizer, "default_chat_template", None)
    if template is None:
        raise StartupError(
            "--use-default-chat-template: this tokenizer's class has no default template; give one with --chat-template"
        )
    tokenizer.chat_template = template
    tokenizer.has_chat_template = True
