"""mlx-lm 0.32.2: what `worker/mlx/` relies on of its caches, its loader and its sampling functions. No model is loaded.

The cache classes are called as the batch calls them, with arrays of a few numbers, and what comes out is compared number by number.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx import nn
from mlx_lm.models import base, cache, gemma2
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, load_config

from tests.contract.signatures import accepts, parameters
from worker.models import model_folder

BATCHABLE = (cache.KVCache, cache.RotatingKVCache, cache.ArraysCache, cache.CacheList)
"""Classes of a single sequence's cache that have `merge`."""

BATCHED = (cache.BatchKVCache, cache.BatchRotatingKVCache, cache.ArraysCache, cache.CacheList)


def _values(*rows: Sequence[float]) -> mx.array:
    """(rows, 1 head, tokens, 1 number)."""
    return mx.array(rows, mx.float32)[:, None, :, None]


def _filled(numbers: Sequence[float]) -> cache.KVCache:
    filled = cache.KVCache()
    filled.update_and_fetch(_values(numbers), _values(numbers))
    return filled


def _numbers(array: Any) -> Any:
    return array.squeeze((1, 3)).tolist()


class Layers(nn.Module):
    """A model of two layers without a cache of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(1, 1), nn.Linear(1, 1)]


def test_make_prompt_cache() -> None:
    """One cache a layer; a model's own `make_cache` decides, if it has one. Open worker/mlx/caches/kinds.py."""
    model = Layers()
    assert [type(each) for each in cache.make_prompt_cache(model)] == [cache.KVCache] * 2
    model.make_cache = lambda: ["its own"]
    assert cache.make_prompt_cache(model) == ["its own"]


@pytest.mark.parametrize("kind", BATCHABLE)
def test_single_caches(kind: type) -> None:
    """A sequence's cache can be merged, measured and copied: `can_batch`, the estimate of memory and the prefix cache rely on it.

    Open worker/mlx/caches/kinds.py, worker/mlx/prefixes/prefix_cache.py.
    """
    for name in ("merge", "state", "nbytes", "is_trimmable", "empty", "size"):
        assert hasattr(kind, name), name
    assert parameters(kind.merge)[-1:] == ["caches"]


@pytest.mark.parametrize("kind", [cache.ConcatenateKVCache, cache.QuantizedKVCache, cache.ChunkedKVCache])
def test_caches_that_cannot_batch(kind: type) -> None:
    """Caches without `merge` are those that cannot be batched: their models decode one sequence at a time.

    If one has it now, its models can be batched, once tests/model covers them. Open worker/mlx/caches/kinds.py.
    """
    assert not hasattr(kind, "merge")


@pytest.mark.parametrize("kind", BATCHED)
def test_batched_caches(kind: type) -> None:
    """The methods of a batch's caches, called as the batch calls them. Open worker/mlx/caches/kinds.py."""
    assert accepts(kind.filter, None, [0])
    assert accepts(kind.extend, None, "other")
    assert accepts(kind.extract, None, 0)
    assert accepts(kind.prepare, None, lengths=[1], right_padding=[0])
    assert accepts(kind.finalize, None)
    assert isinstance(inspect.getattr_static(kind, "nbytes"), property)
    assert isinstance(inspect.getattr_static(kind, "state"), property)


def test_merge_pads_on_the_left() -> None:
    """`merge` pads shorter sequences on the left and records it in `left_padding` and `offset`.

    Slots are built from these numbers. Open worker/mlx/caches/kv_slots.py.
    """
    merged = cache.KVCache.merge([_filled([1, 2, 3]), _filled([4])])
    assert type(merged) is cache.BatchKVCache
    assert merged.left_padding.tolist() == [0, 2]
    assert merged.offset.tolist() == [3, 1]
    assert merged._idx == merged.size() == 3
    assert _numbers(merged.keys_and_values()[0]) == [[1, 2, 3], [0, 0, 4]]


def test_merge_of_empty_caches() -> None:
    """Empty caches can be merged, and filled afterwards. Open worker/mlx/caches/kinds.py."""
    merged = cache.KVCache.merge([cache.KVCache(), cache.KVCache()])
    assert merged.keys is None
    assert merged.empty()
    assert merged.left_padding.tolist() == merged.offset.tolist() == [0, 0]
    keys, _ = merged.update_and_fetch(_values([1], [2]), _values([1], [2]))
    assert _numbers(keys) == [[1], [2]]


def test_right_padding_moves_to_the_left() -> None:
    """Prompts of different lengths are prefilled with padding on the right, which `finalize` turns into padding on the left.

    Otherwise padding would be attended to, or part of the prompt would not. Open worker/mlx/prefill/prompts.py.
    """
    batch = cache.KVCache.merge([cache.KVCache(), cache.KVCache()])
    batch.prepare(lengths=[3, 1], right_padding=[0, 2])
    batch.update_and_fetch(_values([1, 2, 3], [4, 9, 9]), _values([1, 2, 3], [4, 9, 9]))
    batch.finalize()
    assert batch.left_padding.tolist() == [0, 2]
    assert batch.offset.tolist() == [3, 1]
    keys = _numbers(batch.keys_and_values()[0])
    assert keys[0] == [1, 2, 3]
    assert keys[1][2] == 4


def test_extract_is_a_cache_of_its_own() -> None:
    """`extract` copies a sequence without its padding: the prefix cache keeps that. Open worker/mlx/prefixes/prefix_cache.py."""
    merged = cache.KVCache.merge([_filled([1, 2, 3]), _filled([4])])
    single = merged.extract(1)
    assert type(single) is cache.KVCache
    assert single.offset == single.size() == 1
    assert _numbers(single.keys_and_values()[0]) == [[4]]


def test_extend_and_filter_keep_order() -> None:
    """`extend` appends new sequences after the present ones, and `filter` accepts any order. Open worker/mlx/caches/kinds.py."""
    batch = cache.KVCache.merge([_filled([1, 2])])
    batch.extend(cache.KVCache.merge([_filled([3, 4, 5])]))
    assert _numbers(batch.keys_and_values()[0]) == [[0, 1, 2], [3, 4, 5]]
    assert batch.left_padding.tolist() == [1, 0]
    batch.filter([1, 0])
    assert _numbers(batch.keys_and_values()[0]) == [[3, 4, 5], [0, 1, 2]]
    batch.filter(mx.array([1]))
    assert _numbers(batch.keys_and_values()[0]) == [[1, 2]], "padding common to all is dropped"
    assert batch.offset.tolist() == [2]


def test_slots_override_what_a_step_calls() -> None:
    """`SlotKVCache` is a `BatchKVCache` with its own buffers: these are the methods that a model's layers and mlx-lm call.

    Open worker/mlx/caches/kv_slots.py.
    """
    made = cache.BatchKVCache([])
    assert {"keys", "values", "left_padding", "offset", "_idx"} <= vars(made).keys()
    assert parameters(cache.BatchKVCache.update_and_fetch) == ["keys", "values"]
    assert parameters(cache.BatchKVCache.keys_and_values) == []
    assert parameters(cache.BatchKVCache.make_mask) == ["N", "return_array", "kwargs"]


def test_masks() -> None:
    """A decode step's mask excludes each sequence's left padding and nothing else; a single cache needs none.

    Open worker/mlx/caches/kv_slots.py, `make_mask`.
    """
    merged = cache.KVCache.merge([_filled([1, 2, 3]), _filled([4])])
    assert merged.make_mask(1).squeeze((1, 2)).tolist() == [[True] * 4, [False, False, True, True]]
    assert _filled([1, 2]).make_mask(1, return_array=False, window_size=None) is None


def test_models_ask_caches_for_masks() -> None:
    """Models request a mask from the first cache with `return_array` and `window_size`. Open worker/mlx/caches/kv_slots.py, `make_mask`."""
    assert accepts(base.create_attention_mask, "h", "cache", window_size=None, return_array=False)
    source = inspect.getsource(base.create_attention_mask)
    assert "cache.make_mask(N, return_array=return_array, window_size=window_size)" in source


def test_trimming() -> None:
    """The prefix cache provides a shorter prefix by trimming the end of a copy. Open worker/mlx/prefixes/prefix_cache.py, `find`."""
    kept = [_filled([1, 2, 3]), _filled([4, 5, 6])]
    assert cache.can_trim_prompt_cache(kept)
    copied = copy.deepcopy(kept)
    assert cache.trim_prompt_cache(copied, 1) == 1
    assert [each.size() for each in copied] == [2, 2]
    assert [each.size() for each in kept] == [3, 3]
    assert _numbers(kept[0].keys_and_values()[0]) == [[1, 2, 3]]
    assert not cache.can_trim_prompt_cache([cache.ArraysCache(2)])


def test_rotating_caches_have_a_window() -> None:
    """`max_size` is a window, which bounds the memory of a sequence. Open worker/mlx/caches/kinds.py, `measured_cost`."""
    assert cache.RotatingKVCache(max_size=4).max_size == 4
    merged = cache.RotatingKVCache.merge([cache.RotatingKVCache(max_size=4)])
    assert type(merged) is cache.BatchRotatingKVCache
    assert merged.max_size == 4


def test_recurrent_states() -> None:
    """`ArraysCache` is also its own batched class, and has no keys. Open worker/mlx/caches/kinds.py, `measured_cost`."""
    one, other = cache.ArraysCache(1), cache.ArraysCache(1)
    one[0], other[0] = mx.array([[1.0]]), mx.array([[2.0]])
    merged = cache.ArraysCache.merge([one, other])
    assert type(merged) is cache.ArraysCache
    assert merged[0].tolist() == [[1], [2]]
    assert merged.extract(1)[0].tolist() == [[2]]
    merged.filter([1])
    assert merged[0].tolist() == [[2]]
    assert not hasattr(merged, "keys")


def test_lists_of_caches() -> None:
    """A `CacheList` has its caches in `caches`, and applies each operation to all of them. Open worker/mlx/caches/kinds.py, `_flat`."""
    listed = cache.CacheList(_filled([1]), _filled([2]))
    assert [type(each) for each in listed.caches] == [cache.KVCache] * 2
    merged = cache.CacheList.merge([listed, cache.CacheList(_filled([3]), _filled([4]))])
    assert [type(each) for each in merged.caches] == [cache.BatchKVCache] * 2
    assert [_numbers(each.keys_and_values()[0]) for each in merged.extract(1).caches] == [[[3]], [[4]]]


def test_caches_grow_in_steps() -> None:
    """Caches of single sequences grow by 256 tokens: memory is estimated in these steps. Open worker/mlx/memory/cache_memory.py, `columns`."""
    assert cache.KVCache.step == cache.BatchKVCache.step == 256
    assert _filled([1]).keys.shape[2] == 256
    assert _filled([1]).nbytes == 2 * 256 * 4


def test_load() -> None:
    """`load_model` passes these to `mlx_lm.load`. Open worker/mlx/model.py."""
    options = {
        "tokenizer_config": {},
        "adapter_path": None,
        "return_config": True,
        "trust_remote_code": False,
    }
    assert accepts(mlx_lm.load, "folder", **options)


def test_download_patterns() -> None:
    """We download the same files of a repository as mlx-lm. Open worker/models/model_folder.py, `HUB_PATTERNS`."""
    assert list(model_folder.HUB_PATTERNS) == DEFAULT_ALLOW_PATTERNS


def test_processors_context() -> None:
    """`TokenBuffer` passes all token ids so far to a logits processor, on the device. Open worker/mlx/decoding/decode_batch.py."""
    context = cache.TokenBuffer([1, 2])
    assert context.update_and_fetch(mx.array([3], mx.uint32)).tolist() == [1, 2, 3]
    assert context.update_and_fetch(mx.array([4], mx.uint32)).tolist() == [1, 2, 3, 4]


def test_logits_processors() -> None:
    """The repetition penalty is mlx-lm's processor, called with all token ids and (1, vocab) logits. Open worker/mlx/decoding/decode_batch.py."""
    (processor,) = make_logits_processors(repetition_penalty=2.0, repetition_context_size=2)
    logits = processor(mx.array([0, 1, 2]), mx.array([[1.0, 1.0, -1.0, 1.0]]))
    assert logits.tolist() == [[1, 0.5, -2, 1]]


def test_attention_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models call `mx.fast.scaled_dot_product_attention`, which our back-ends replace during a step, with these options.

    Open worker/mlx/backends/.
    """
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda *_, **options: seen.append(options))
    base.scaled_dot_product_attention("q", "k", "v", cache.KVCache(), scale=1.0, mask=None)
    assert seen == [{"scale": 1.0, "mask": None, "sinks": None}]


def test_gemma2_lacks_an_axis_in_masks() -> None:
    """Its attention has an axis for the query heads of a key head, the masks of padded sequences have none.

    If this fails, `worker/mlx/padding_masks.py` can go. Open worker/mlx/padding_masks.py.
    """
    attention = gemma2.Attention(gemma2.ModelArgs("gemma2", 8, 1, 8, 4, 4, 1e-5, 8, 2))
    assert attention.repeats == 2
    x, mask = mx.ones((3, 2, 8)), mx.ones((3, 1, 2, 2), mx.bool_)
    with pytest.raises(ValueError, match="broadcast"):
        mx.eval(attention(x, mask))
    assert attention(x, mask[:, :, None]).shape == x.shape


class _Tokenizer(SimpleNamespace):
    """As transformers', as far as the wrapper looks at it."""

    def apply_chat_template(self) -> None:
        raise NotImplementedError


def test_a_tokenizers_wrapper_can_be_copied() -> None:
    """The wrapper calls its `_tokenizer`: a copy with a tokenizer of its own serves another thread. Open worker/text/prompt_tokenizer.py."""
    source = inspect.getsource(TokenizerWrapper.__init__)
    assert "self._tokenizer = tokenizer" in source
    inner = _Tokenizer(
        chat_template=None,
        eos_token_id=0,
        get_vocab=lambda: {"a": 0},
        encode=lambda *_, **__: [0],
        decode=lambda *_, **__: "original",
    )
    wrapper = TokenizerWrapper(inner)
    copied = copy.copy(wrapper)
    copied._tokenizer = SimpleNamespace(decode=lambda *_, **__: "copy")
    assert (wrapper.decode([0]), copied.decode([0])) == ("original", "copy")


def test_ends_of_text_of_the_generation_config(tmp_path: Path) -> None:
    """`load` takes them from the file that has a model's sampling defaults, which we read ourselves. Open common/models/sampling_defaults.py."""
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.5}')
    assert load_config(tmp_path)["eos_token_id"] == [2, 3]
