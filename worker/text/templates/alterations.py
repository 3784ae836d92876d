"""How a chat template and a tokenizer change text on its way to tokens, as far as that may turn harmless text into a control token.

A template that deletes `/think` from messages makes ``<|im_/thinkend|>`` a control token; so does one that lowers the case, or a
tokenizer that normalizes the text in which it looks for added tokens. Used by `control_text`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_LITERAL = r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_REPLACE = re.compile(rf"\breplace\(\s*{_LITERAL}\s*,\s*{_LITERAL}", re.DOTALL)
_CASE = re.compile(r"\b(?:lower|upper|title|capitalize|swapcase)\b")
_COMPATIBLE = "\uff1c\uff41A\u0301\u212a\u000b"
"""Characters that change under normalization forms, and if accents, case or control characters are removed."""


class Alterations(NamedTuple):
    """See the module; by default none.

    Attributes:
        replaced: Texts that the template replaces by nothing, or by a part of a control token.
        changes_case: Whether the template changes the case of letters.
        normalize: How the tokenizer changes the text in which it looks for control tokens; None: not at all.
    """

    replaced: tuple[str, ...] = ()
    changes_case: bool = False
    normalize: Callable[[str], str] | None = None


def find_alterations(tokenizer: Any, tokens: Sequence[str], template: Any) -> Alterations:
    """Find the alterations of a model's template and tokenizer.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`.
        tokens: The texts of control tokens.
        template: Jinja source; anything else is not examined.
    """
    replaced: tuple[str, ...] = ()
    changes_case = False
    if isinstance(template, str):
        pairs = [(_value(old), _value(new)) for old, new in _REPLACE.findall(template)]
        replaced = tuple({old for old, new in pairs if old and any(new in token for token in tokens)})
        changes_case = _CASE.search(template) is not None
    return Alterations(replaced, changes_case, _normalizer(tokenizer, tokens))


def _value(literal: str) -> str:
    try:
        return str(ast.literal_eval(literal))
    except (SyntaxError, ValueError):
        return literal[1:-1]


def _normalizer(tokenizer: Any, tokens: Sequence[str]) -> Callable[[str], str] | None:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    if not any(getattr(token, "normalized", False) and str(token) in tokens for token in added):
        return None
    normalize = getattr(
        getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None), "normalize_str", None
    )
    if normalize is None or _COMPATIBLE in normalize(_COMPATIBLE):
        return None
    return lambda text: str(normalize(text))
