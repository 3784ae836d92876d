"""The kinds of caches that mlx-lm's models have: what each can do, and how a batch uses it.

Called by the batch, which treats a model's caches as a list with one cache per layer. To support a new
kind of cache of mlx-lm, open this file first.

| mlx-lm's cache of a sequence | in a batch | newcomers | cached prefix serves |
| --- | --- | --- | --- |
| `KVCache`: every token | `PromptKVCache` while it prefills, then `SlotKVCache` | join between two steps | any shorter prefix |
| `RotatingKVCache`: the last tokens | `BatchRotatingKVCache` | after a step of their own | until the window is full, any |
| `ArraysCache`: a state (Mamba, convolutions) | `ArraysCache` | after a step of their own | exactly this prefix |
| `CacheList`: several for a layer | `CacheList` of the above | after a step of their own | what all of them serve |
| any other: quantized, chunked, concatenated | none: one sequence at a time | none | nothing is kept |
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

from worker.mlx.backends.cuda_attention import PaddedAttention
from worker.mlx.caches.kv_slots import SlotKVCache
from worker.mlx.caches.prompt_cache import PromptKVCache
from worker.mlx.memory.cache_memory import CacheCost

log = logging.getLogger(__name__)

Caches = list[Any]
"""One per layer: of one sequence, or of all sequences of a batch."""


class CacheOffer(NamedTuple):
    """A sequence whose caches may be kept as a prefix.

    Attributes:
        token_ids: The tokens in the caches.
        extract: Returns them, extracted from a batch's and not evaluated yet.
    """

    token_ids: list[int]
    extract: Callable[[], Caches]


_EVERY_TOKEN = (BatchKVCache, PromptKVCache)


def new(model: Any) -> Caches:
    """A sequence's caches, empty."""
    caches: Caches = make_prompt_cache(model)
    return caches


def can_batch(model: Any) -> bool:
    """Whether sequences of the model can be decoded together: those of different lengths are, which some models do not expect."""
    if not _can_merge(new(model)):
        return False
    try:
        # Three: a mask that lacks an axis may fit two sequences by chance, as there may be two key heads.
        caches = merge([new(model) for _ in range(3)])
        for cache in caches:
            cache.prepare(lengths=[2, 1, 1], right_padding=[0, 1, 1])
        model(mx.zeros((3, 2), mx.int32), cache=caches)
        for cache in caches:
            cache.finalize()
        mx.eval(model(mx.zeros((3, 1), mx.int32), cache=caches))
    except Exception as error:  # noqa: BLE001 (the model's own code)
        log.warning(
            "the model decodes one sequence at a time: with several it raised %s: %s",
            type(error).__name__,
            error,
        )
        return False
    return True


def _can_merge(caches: Caches) -> bool:
    return all(hasattr(cache, "merge") for cache in caches)


def merge(sequences: Sequence[Caches], num_columns: int = 0) -> Caches:
    """Merge sequences' caches into a batch's; a single sequence of a kind that cannot batch keeps its own.

    Args:
        num_columns: How many tokens layers that keep every token should have room for.

    Raises:
        ValueError: There are several sequences of a kind that cannot batch.
    """
    if not _can_merge(sequences[0]):
        (own,) = sequences
        return own
    return [
        PromptKVCache.merge(layer, num_columns) if type(layer[0]) is KVCache else layer[0].merge(layer)
        for layer in zip(*sequences, strict=True)
    ]


def extend(caches: Caches, newcomers: Caches) -> None:
    """Append the sequences of `newcomers` to those of `caches`."""
    for cache, other in zip(caches, newcomers, strict=True):
        cache.extend(other)


def split(caches: Caches, leaving: list[int], staying: list[int]) -> Caches:
    """The caches of some sequences of a batch, in the order of their indices; those of the others stay in `caches`."""
    taken = copy.deepcopy(caches)  # new objects that share the arrays
    for cache, other in zip(caches, taken, strict=True):
        cache.filter(staying)
        other.filter(leaving)
    return taken


def can_extract(caches: Caches) -> bool:
    """Whether one sequence's caches can be extracted from a batch's."""
    return all(hasattr(cache, "extract") for cache in caches)


def extract(caches: Caches, index: int) -> Caches:
    """One sequence's caches, extracted from a batch's; not evaluated yet."""
    return [cache.extract(index) for cache in caches]


def keep_every_token(caches: Caches) -> bool:
    """Whether all layers do: then sequences can join others at any time, even with no token in their caches."""
    return all(type(cache) in _EVERY_TOKEN for cache in caches)


def with_slots(caches: Caches, max_sequences: int, attention: PaddedAttention | None) -> Caches:
    """A batch's caches with slots in the layers that keep every token; see `worker.mlx.caches.kv_slots`."""
    return [
        SlotKVCache(cache, max_sequences, attention) if type(cache) in _EVERY_TOKEN else cache
        for cache in caches
    ]


def num_bytes(caches: Caches) -> int:
    """The memory that a batch's caches take."""
    return sum(cache.nbytes for cache in caches)


def states(caches: Caches) -> list[Any]:
    """The arrays of the caches, to be evaluated."""
    return [cache.state for cache in caches]


def measured_cost(model: Any) -> CacheCost:
    """What a sequence's caches cost, measured with one token: models differ in what their layers keep."""
    caches = new(model)
    model(mx.array([[0]]), cache=caches)
    mx.eval(states(caches))
    per_token, per_sequence, windows = 0.0, 0, []
    for cache in _flat(caches):
        keys = getattr(cache, "keys", None)
        if keys is None or not hasattr(keys, "shape"):
            per_sequence += int(getattr(cache, "nbytes", 0))
            continue
        each = cache.nbytes / keys.shape[2]
        window = getattr(cache, "max_size", None)
        if isinstance(window, int) and window > 0:
            windows.append((each, window))
        else:
            per_token += each
    return CacheCost(per_token, per_sequence, tuple(windows))


def _flat(caches: Any) -> Caches:
    """Caches in lists of caches (`CacheList`), one after the other."""
    flat: Caches = []
    for cache in caches:
        inner = getattr(cache, "caches", None)
        flat += _flat(inner) if inner is not None else [cache]
    return flat
