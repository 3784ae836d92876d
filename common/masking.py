"""API keys, ours and other services', made unreadable in what is logged and in what errors say."""

from __future__ import annotations

import re

_KEY = re.compile(r"(?<![A-Za-z0-9])sk-[\w-]{16,}")
"""Also one that stands where it does not belong, such as in a path."""


def masked(text: str) -> str:
    """`text`, with `sk-...` for each key in it."""
    return _KEY.sub("sk-...", text)
