"""Products of the CUDA backend, on the emulator: whatever way the operands lie in memory, in each mode and dtype."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert import backends
from minibert.backends import BackendUnavailable
from minibert.backends.base import dtype_of
from minibert.kernels import OPS
from minibert.kernels.readings.bounded import PRECISIONS

STORED = ("float32", "float16", "bfloat16")
Shape = tuple[int, ...]


@pytest.fixture(scope="module")
def emulator() -> Any:
    pytest.importorskip("ml_dtypes")
    try:
        return backends.get("emulator")
    except BackendUnavailable as reason:
        pytest.skip(str(reason))


@st.composite
def laid_out(draw: Any, shape: Shape, dtype: str, emulator: Any, seed: int) -> tuple[Any, np.ndarray]:
    """An array of that shape, however it lies in memory: axes in another order, in steps, backwards, broadcast."""
    axes = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from((1, 1, 2, -1))) for _ in shape]
    shared = [draw(st.integers(0, 6)) == 0 for _ in shape]
    base = [1 if shared[a] else shape[a] * abs(steps[a]) for a in axes]
    host = np.random.default_rng(seed).standard_normal(base).astype(dtype_of(dtype))
    device, order, index = emulator.asarray(host), np.argsort(axes), tuple(slice(None, None, s) for s in steps)
    on_device = device.transpose(*order)[index].broadcast_to(shape)
    return on_device, np.broadcast_to(host.transpose(*order)[index], shape)


@pytest.mark.parametrize("mode", ["float32", "tf32"])
@settings(max_examples=150)
@given(data=st.data(), dtype=st.sampled_from(STORED))
def test_products_however_the_operands_lie(emulator: Any, mode: str, data: Any, dtype: str) -> None:
    m, k, n = (data.draw(st.integers(1, 5)) for _ in range(3))
    lead = data.draw(st.lists(st.integers(1, 3), max_size=3).map(tuple))
    leads = [tuple(1 if data.draw(st.integers(0, 3)) == 0 else size for size in lead) for _ in range(2)]
    leads = [part[data.draw(st.integers(0, len(part))) :] for part in leads]
    a, left = data.draw(laid_out((*leads[0], m, k), dtype, emulator, 1))
    b, right = data.draw(laid_out((*leads[1], k, n), dtype, emulator, 2))
    before, emulator.product_mode = emulator.product_mode, mode
    try:
        got = emulator.numpy(emulator.run(OPS["matmul"], a, b))
    finally:
        emulator.product_mode = before
    left, right = left.astype(np.float64), right.astype(np.float64)
    expected, terms = left @ right, np.abs(left) @ np.abs(right)
    lost = 2.0**-10 + 2.0**-22 if mode == "tf32" and dtype == "float32" else 0.0  # of a product of two operands
    bound = (lost + (k + 1) * 2.0**-24) * terms + PRECISIONS[dtype].roundoff * np.abs(expected) + PRECISIONS[dtype].tiny
    assert got.shape == expected.shape and got.dtype == dtype_of(dtype)
    assert (np.abs(got.astype(np.float64) - expected) <= bound).all()


@pytest.mark.parametrize("index", [np.s_[::-1], np.s_[:, ::-1], np.s_[::-1, ::-1], np.s_[::2, 1:], np.s_[:, ::2]])
def test_batches_taken_backwards_and_in_steps(emulator: Any, index: Any) -> None:
    a, b = np.arange(240.0).reshape(4, 3, 4, 5) % 7, np.arange(360.0).reshape(4, 3, 5, 6) % 5
    on_device = [emulator.asarray(x.astype(np.float32)) for x in (a, b)]
    left = emulator.numpy(emulator.run(OPS["matmul"], on_device[0][index], on_device[1][index].copy()))
    right = emulator.numpy(emulator.run(OPS["matmul"], on_device[0][index].copy(), on_device[1][index]))
    np.testing.assert_array_equal(left, a[index] @ b[index])
    np.testing.assert_array_equal(right, left)


def test_tf32_rounds_and_float32_does_not(emulator: Any) -> None:
    x = emulator.asarray(np.full((1, 1), 1 + 2.0**-12, np.float32))
    one = emulator.asarray(np.ones((1, 1), np.float32))
    assert emulator.numpy(emulator.gemm(x, one))[0, 0] == 1 + 2.0**-12
    before, emulator.product_mode = emulator.product_mode, "tf32"
    try:
        assert emulator.numpy(emulator.gemm(x, one))[0, 0] == 1
    finally:
        emulator.product_mode = before


def test_transposed_operands_are_not_copied(emulator: Any) -> None:
    x, weight = (emulator.asarray(np.ones(s, np.float32)) for s in ((64, 32), (16, 32)))
    with emulator.peak_memory() as peak:
        emulator.gemm(x, weight.swapaxes(0, 1))
    assert peak() == 64 * 16 * 4, "the result and nothing else"


@pytest.mark.parametrize("dtype", STORED)
def test_epilogues(emulator: Any, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(s).astype(dtype_of(dtype)) for s in ((2, 3, 8), (5, 8), (5,)))
    on_device = [emulator.asarray(v) for v in (x, w, b)]
    out, before = emulator.gemm(on_device[0], on_device[1].swapaxes(0, 1), bias=on_device[2], epilogue="gelu")
    plain = emulator.gemm(on_device[0], on_device[1].swapaxes(0, 1), bias=on_device[2], epilogue="bias")
    exact = x.astype(float) @ w.astype(float).T + b.astype(float)
    curve = 0.5 * exact * (1 + np.tanh(np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)))
    for got, expected in ((plain, exact), (before, exact), (out, curve)):
        error = np.abs(emulator.numpy(got).astype(float) - expected).max()
        assert got.shape == (2, 3, 5) and error < 16 * PRECISIONS[dtype].roundoff * np.abs(expected).max()


def test_products_over_nothing(emulator: Any) -> None:
    def ones(*shape: int) -> Any:
        return emulator.asarray(np.ones(shape, np.float32))

    assert (
        emulator.numpy(emulator.run(OPS["matmul"], ones(2, 3, 0), ones(0, 5))).tolist() == np.zeros((2, 3, 5)).tolist()
    )
    assert (
        emulator.numpy(emulator.run(OPS["linear"], ones(3, 0), ones(5, 0), ones(5))).tolist()
        == np.ones((3, 5)).tolist()
    )
    for a, b in (((0, 4), (4, 3)), ((2, 0, 4), (4, 3)), ((0, 2, 4), (0, 4, 3)), ((2, 4), (4, 0))):
        expected = (np.ones(a) @ np.ones(b)).shape
        assert emulator.numpy(emulator.run(OPS["matmul"], ones(*a), ones(*b))).shape == expected


@pytest.mark.parametrize(("more", "message"), [
    ({"epilogue": "bias"}, "epilogue 'bias' and bias None"), ({"epilogue": "relu"}, "epilogue 'relu'"),
    ({"epilogue": "bias", "bias": (4,)}, "expected a bias of shape"), ({"out": (3, 4)}, "expected a contiguous `out`"),
])  # fmt: skip
def test_products_that_make_no_sense(emulator: Any, more: dict[str, Any], message: str) -> None:
    a, b = (emulator.asarray(np.ones(s, np.float32)) for s in ((3, 2), (2, 5)))
    made = {k: emulator.zeros(v, np.float32) if isinstance(v, tuple) else v for k, v in more.items()}
    with pytest.raises(ValueError, match=message):
        emulator.gemm(a, b, **made)
    with pytest.raises(ValueError, match=re.escape("product of shapes (3, 2) and (3, 2)")):
        emulator.gemm(a, a)
    with pytest.raises(TypeError, match="two arrays of one dtype"):
        emulator.gemm(a, emulator.asarray(np.ones((2, 5), np.float16)))
