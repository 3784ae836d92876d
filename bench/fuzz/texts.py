"""What all fuzzed bodies share: the model, a limit of tokens, plain texts."""

from __future__ import annotations

from hypothesis import strategies as st

MODEL = "synthetic"
MAX_TOKENS = 6

PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
