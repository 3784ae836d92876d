"""Matches complete answers against a grammar, for the tests of grammars."""

from __future__ import annotations

import llguidance

from common.schema import grammar


def accepts(text: str, answer: str) -> bool:
    """Whether a complete answer matches."""
    matcher = llguidance.LLMatcher(grammar._bytes_tokenizer(), text, log_level=0, limits=grammar.limits())
    data = list(answer.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()
