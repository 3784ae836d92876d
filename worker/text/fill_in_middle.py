"""Fill in the middle: text between a prefix and a suffix, for models that were trained on it (Bavarian et al. 2022).

Used by `prompts`, and for the model card's `can_fill`. The marker tokens are found in the vocabulary. Independent of MLX.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Markers(NamedTuple):
    """Token ids of the markers before the prefix, before the suffix, and before the generated middle."""

    prefix: int
    suffix: int
    middle: int


_KNOWN_MARKERS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen 2.5 Coder, CodeGemma, Granite
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek Coder  # noqa: RUF001
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
)


def find_markers(tokenizer: Any) -> Markers | None:
    """Find the markers in a tokenizer's vocabulary; None: the model was not trained to fill in the middle."""
    vocab = tokenizer.get_vocab()
    for names in _KNOWN_MARKERS:
        if all(name in vocab for name in names):
            return Markers(*(int(vocab[name]) for name in names))
    return None


def build_prompt(prefix: str, suffix: str, tokenizer: Any, markers: Markers) -> list[int]:
    """Token ids of the prompt that asks for the text between `prefix` and `suffix`."""
    start = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
    before = tokenizer.encode(prefix, add_special_tokens=False)
    after = tokenizer.encode(suffix, add_special_tokens=False)
    return [*start, markers.prefix, *before, markers.suffix, *after, markers.middle]
