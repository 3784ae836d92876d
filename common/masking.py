"""Masks API keys, ours and other services', in log lines and error messages."""

from __future__ import annotations

import re

_KEY = re.compile(r"(?<![A-Za-z0-9])sk-[\w-]{16,}")
"""Matches keys in wrong places too, such as in a path."""


def masked(text: str) -> str:
    """`text`, with each key replaced by `sk-...`."""
    return _KEY.sub("sk-...", text)
