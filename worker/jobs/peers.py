"""The other workers of a model, by their model cards in Redis. Used by intake, only for prompts that are too long for this worker."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import redis

from common import names


def max_context_length(connection: redis.Redis, model: str) -> int:
    """The longest context, in tokens, of the live workers of `model` that take requests; 0: there are none."""
    listed: Any = connection.zrange(names.WORKER_CARDS, 0, -1)
    with connection.pipeline(transaction=False) as pipe:
        for name in listed:
            pipe.hmget(names.worker_card(name.decode(errors="replace")), "id", "context_length")
        cards = pipe.execute(raise_on_error=False)
    longest = 0
    for card in cards:
        with suppress(TypeError, ValueError):  # Redis is not trusted: a card may be malformed
            model_id, context_length = card
            if model_id == model.encode():
                longest = max(longest, int(context_length))
    return longest
