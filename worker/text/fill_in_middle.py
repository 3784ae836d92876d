"""Filling a gap between a text and a suffix, for models that were trained to (Bavarian et al. 2022, fill in the middle).

Used by `prompts` and for the model card. Which tokens mark the parts is read from the vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Markers(NamedTuple):
    """Tokens before the text, before the suffix and before what fills the gap."""

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
    """The model's, or None for one that cannot fill gaps."""
    vocab = tokenizer.get_vocab()
    for names in _KNOWN_MARKERS:
        if all(name in vocab for name in names):
            return Markers(*(int(vocab[name]) for name in names))
    return None


def build_prompt(text: str, suffix: str, tokenizer: Any, found: Markers) -> list[int]:
    """The prompt that asks for what is between `text` and `suffix`."""
    start = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
    before = tokenizer.encode(text, add_special_tokens=False)
    after = tokenizer.encode(suffix, add_special_tokens=False)
    return [*start, found.prefix, *before, found.suffix, *after, found.middle]
