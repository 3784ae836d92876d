"""MLX 0.32: what `worker/mlx/` relies on beyond its documented interface, on this machine's device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from worker.mlx import model
from worker.mlx.backends.append_attention import CudaAppendAttention, Step

ONLY_CUDA = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs MLX's CUDA back-end")
ONLY_CPU = pytest.mark.skipif(model.has_gpu(), reason="compares addresses, which only a CPU's arrays show")


class Calls:
    """Replaces a function of `mx.fast` and records its calls."""

    def __init__(self) -> None:
        self.arguments: list[tuple[Any, ...]] = []
        self.options: list[dict[str, Any]] = []

    def __call__(self, x: Any, *arguments: Any, **options: Any) -> Any:
        self.arguments.append(arguments)
        self.options.append(options)
        return x


def test_rope_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nn.RoPE` calls `mx.fast.rope` with these options; the CPU back-end replaces it during a step.

    With other options the fused rotation would never be used, and decode steps on a CPU would be slow. Open worker/mlx/backends/cpu_ops.py.
    """
    calls = Calls()
    monkeypatch.setattr(mx.fast, "rope", calls)
    nn.RoPE(4)(mx.zeros((1, 1, 1, 4)), offset=3)
    assert calls.arguments == [(4,)]
    assert calls.options == [{"traditional": False, "base": 10000, "scale": 1.0, "offset": 3}]


def test_rms_norm_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nn.RMSNorm` calls `mx.fast.rms_norm(x, weight, eps)`. Open worker/mlx/backends/cpu_ops.py."""
    calls = Calls()
    monkeypatch.setattr(mx.fast, "rms_norm", calls)
    norm = nn.RMSNorm(2)
    norm(mx.zeros((1, 2)))
    assert [len(arguments) for arguments in calls.arguments] == [2]
    assert calls.options == [{}]


def test_compiled_norm_checks_no_shapes() -> None:
    """A function that is compiled without shapes accepts any number of rows: it is compiled once. Open worker/mlx/backends/cpu_ops.py."""
    num_traced = 0

    def traced(x: mx.array) -> mx.array:
        nonlocal num_traced
        num_traced += 1
        return x + 1

    compiled = mx.compile(traced, shapeless=True)
    assert [compiled(mx.zeros((rows, 2))).shape for rows in (1, 2, 3)] == [(1, 2), (2, 2), (3, 2)]
    assert num_traced == 1


def test_a_copy_keeps_its_values() -> None:
    """Slots are written by assignment to a slice of a buffer; a copy that was taken before keeps its values.

    Open worker/mlx/caches/kv_slots.py.
    """
    buffer = mx.zeros((3, 2))
    before = mx.contiguous(buffer[1:2])
    mx.eval(before)
    buffer[1:2] = mx.ones((1, 2))
    assert buffer.tolist() == [[0, 0], [1, 1], [0, 0]]
    assert before.tolist() == [[0, 0]]


def _address(array: mx.array) -> int:
    return int(np.array(array, copy=False).ctypes.data)


@ONLY_CPU
def test_buffers_are_written_in_place() -> None:
    """A slice assignment and `slice_update` reuse a buffer that nothing else holds; while something does, it is copied.

    Copied buffers would make each decode step as slow as a copy of all keys and values. Open worker/mlx/caches/kv_slots.py.
    """
    buffer = mx.zeros((3, 2))
    mx.eval(buffer)
    address = _address(buffer)
    buffer[1:2] = mx.ones((1, 2))
    mx.eval(buffer)
    assert _address(buffer) == address
    buffer = mx.slice_update(buffer, mx.ones((1, 2)), mx.array([0]), axes=(0,))
    mx.eval(buffer)
    assert _address(buffer) == address
    held = buffer[:]
    mx.eval(held)
    buffer[1:2] = mx.zeros((1, 2))
    mx.eval(buffer)
    assert _address(buffer) != address
    assert held.tolist() == [[1, 1], [1, 1], [0, 0]]


class Traced:
    """A method to compile, which counts how often it is traced."""

    def __init__(self) -> None:
        self.num_traces = 0

    def add(self, x: mx.array, pairs: list[tuple[mx.array, mx.array]]) -> tuple[mx.array, list[Any]]:
        """Returns nested results, one of them empty; cannot add three numbers."""
        self.num_traces += 1
        if x.shape == (3,):
            raise LookupError(x.shape)
        return x + pairs[0][1], []


def test_compiled_functions_are_traced_once_a_shape() -> None:
    """Other values and known shapes use a trace again; each `mx.compile` of the same method has traces of its own.

    Arguments and results may be nested. Open worker/mlx/decoding/compiled_forward.py and worker/mlx/sampling/device_sampler.py.
    """
    traced = Traced()
    first, second = mx.compile(traced.add), mx.compile(traced.add)
    pairs = [(mx.zeros(1), mx.ones(1))]
    for values in ([1.0, 2.0], [3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [5.0, 6.0]):
        total, nothing = first(mx.array(values), pairs)
        assert total.tolist() == [value + 1 for value in values]
        assert nothing == []
    assert traced.num_traces == 2
    second(mx.array([1.0, 2.0]), pairs)
    assert traced.num_traces == 3


def test_errors_of_traced_functions() -> None:
    """They keep their type, and the function can still be used with other shapes. Open worker/mlx/decoding/compiled_forward.py."""
    traced = Traced()
    compiled = mx.compile(traced.add)
    pairs = [(mx.zeros(1), mx.ones(1))]
    for _ in range(2):
        with pytest.raises(LookupError):
            compiled(mx.zeros(3), pairs)
    assert compiled(mx.zeros(2), pairs)[0].tolist() == [1, 1]


def test_tracing_calls_replaced_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of `mx.fast` that is replaced while a step is traced is the one in the trace, also after it was put back.

    Open worker/mlx/decoding/compiled_forward.py and worker/mlx/backends/append_attention.py.
    """
    compiled = mx.compile(lambda x: mx.fast.rms_norm(x, None, 1e-5))
    with monkeypatch.context() as patch:
        patch.setattr(mx.fast, "rms_norm", lambda x, _weight, _eps: x + 1)
        assert compiled(mx.zeros(2)).tolist() == [1, 1]
    assert compiled(mx.zeros(2)).tolist() == [1, 1]


@ONLY_CUDA
def test_a_kernel_writes_into_its_input() -> None:
    """In a compiled function too: the step's keys and values are in the buffers afterwards, not in copies of them.

    Open worker/mlx/backends/append_attention.py.
    """
    attention = CudaAppendAttention()
    queries, new = mx.ones((1, 2, 1, 64), mx.float16), mx.ones((1, 1, 1, 64), mx.float16)
    keys, values = mx.zeros((1, 1, 8, 64), mx.float16), mx.zeros((1, 1, 8, 64), mx.float16)
    start, end = mx.array([0], mx.int32), mx.array([5], mx.int32)
    assert attention.supports(queries, keys, values)

    def attend(keys: mx.array, values: mx.array) -> mx.array:
        return attention(Step(queries, new, new, keys, values, start, end, 1.0)).output

    mx.eval(keys, values)
    mx.eval(mx.compile(attend)(keys, values))
    for buffer in (keys, values):
        assert mx.sum(buffer, axis=(0, 1, 3)).tolist() == [0, 0, 0, 0, 0, 64, 0, 0]


@ONLY_CUDA
@pytest.mark.parametrize("name", ["MLX_CUDA_SDPA_CACHE_SIZE", "MLX_CUDA_USE_CUDNN_SDPA"])
def test_variables_of_cudnn(name: str) -> None:
    """MLX reads this variable. Open worker/mlx/__init__.py and worker/mlx/backends/prompt_attention.py."""
    (library,) = Path(mx.__file__).parent.rglob("libmlx.so")
    assert name.encode() in library.read_bytes()


@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 32), lambda: nn.QuantizedLinear(64, 32)])
def test_linear_layers_have_a_row_for_each_output(make: Any) -> None:
    """The first axis of all their arrays, by which layers with the same input are fused. Open worker/mlx/fused_projections.py."""
    arrays = {name: each for name, each in make().items() if isinstance(each, mx.array)}
    assert {"weight", "bias"} <= arrays.keys()
    assert {each.shape[0] for each in arrays.values()} == {32}


@pytest.mark.parametrize(
    "name",
    [
        "async_eval",
        "clear_cache",
        "get_cache_memory",
        "set_cache_limit",
        "set_memory_limit",
        "default_device",
        "default_stream",
    ],
)
def test_functions(name: str) -> None:
    """The worker calls this to overlap steps or to bound memory. Open worker/mlx/model.py, then worker/mlx/batch.py."""
    assert callable(getattr(mx, name))


def test_kinds_of_devices() -> None:
    """`has_gpu` compares these; `mx.cuda.is_available` tells whether the GPU is CUDA's. Open worker/mlx/model.py."""
    assert mx.default_device().type in (mx.DeviceType.cpu, mx.DeviceType.gpu)
    assert mx.Device(mx.gpu).type == mx.DeviceType.gpu
    assert mx.cuda.is_available() in (True, False)


def test_device_info() -> None:
    """On a GPU one of these keys has the size of its memory; which one differs between Metal and CUDA. Open worker/mlx/memory/memory_share.py, `_machine_limit_bytes`."""
    if not model.has_gpu():
        pytest.skip("this machine has no GPU")
    about = mx.device_info()
    assert about.keys() & {"max_recommended_working_set_size", "memory_size", "total_memory"}


def test_cuda_kernels() -> None:
    """Our kernels are built with these options, which are documented with and without CUDA. Open worker/mlx/backends/attention_kernel.py."""
    options = {"name", "input_names", "output_names", "source", "header", "ensure_row_contiguous"}
    written = str(mx.fast.cuda_kernel.__doc__)
    assert all(f"{option}:" in written for option in options), written[:500]


def test_safetensors(tmp_path: Path) -> None:
    """The demo model is written with metadata, and types are looked up by name. Open worker/mlx/gguf.py, `save_gguf_weights`."""
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), {"a.weight": mx.zeros((2,), mx.float16)}, metadata={"format": "mlx"})
    loaded, metadata = mx.load(str(path), return_metadata=True)
    assert metadata == {"format": "mlx"}
    assert str(loaded["a.weight"].dtype) == "mlx.core.float16"
    assert getattr(mx, "float16") == loaded["a.weight"].dtype  # noqa: B009 (as it is looked up)


def test_parameters_are_flattened() -> None:
    """Weights are measured through `tree_flatten(parameters())`, which gives pairs of name and array. Open worker/mlx/memory/cache_memory.py, `cache_memory`."""
    flat = dict(tree_flatten(nn.Linear(2, 3).parameters()))
    assert {name: weight.nbytes for name, weight in flat.items()} == {"weight": 24, "bias": 12}


def test_arrays_share_with_numpy() -> None:
    """The sampler and the scorer read logits through NumPy without a copy, float32 only. Open worker/sampling/sampler.py."""
    assert np.array(mx.array([1.0, 2.0]), copy=False).tolist() == [1.0, 2.0]
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        np.array(mx.array([1.0], mx.bfloat16), copy=False)


def test_operations_of_the_device_sampler() -> None:
    """Integers of 64 bits wrap, sums run from the end, bits of floats can be read. Open worker/mlx/sampling/."""
    large = mx.array(np.array([2**63 + 5, 3], np.uint64))
    factor = mx.array(np.array(2**63 + 1, np.uint64))
    assert (large * factor).tolist() == [(2**63 + 5) * (2**63 + 1) % 2**64, 3 * (2**63 + 1) % 2**64]
    assert (large >> 40).dtype == mx.uint64
    assert mx.cumsum(mx.array([[1, 2, 3]]), axis=-1, reverse=True).tolist() == [[6, 5, 3]]
    assert mx.array([1.0]).view(mx.uint32).tolist() == [0x3F800000]
    assert mx.argmax(mx.array([[1.0, 3.0]]), axis=-1).dtype == mx.uint32


def test_precise_softmax() -> None:
    """The CPU back-end's attention requests a softmax that sums in float32. Open worker/mlx/backends/cpu_ops.py."""
    assert "precise" in str(mx.softmax.__doc__)
    assert mx.finfo(mx.float32).min < -1e38
