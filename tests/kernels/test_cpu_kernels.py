"""Numba kernels of attention, cross entropy and linear, beyond the checks that hold for every op.

Wrong numbers that their loops would index by are refused; odd mixes of lengths stay within the bound of the formula.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.kernels import OPS
from minibert.kernels.attention import attention, attention_grad
from minibert.kernels.attention.cpu import QUERIES
from minibert.kernels.cpu.jit import jit
from minibert.kernels.cross_entropy import cross_entropy, linear_cross_entropy
from minibert.kernels.linear import linear, matmul
from minibert.kernels.op import Op, outputs
from minibert.kernels.readings import bound

numba = backends.get("numba")
BOTH = (backends.get("numpy"), numba)


def assert_within_bound(op: Op, *arrays: np.ndarray, **params: Any) -> Any:
    found = numba.run(op, *arrays, **params)
    for one, truth in zip(outputs(found), bound(op, *arrays, **params), strict=True):
        assert one.shape == truth.value.shape
        assert (np.abs(one - truth.value) <= truth.error).all()
    return found


@pytest.mark.parametrize("labels", [[0, 1, 4], [0, -1, 3], [0, -99, 3], [0, 1], [0, 1, 2, 3], [0.0, 1.0, 2.0]])
def test_labels_that_would_leave_the_row_are_refused(labels: list[float]) -> None:
    logits, x, weight, bias = np.zeros((3, 4)), np.zeros((3, 2)), np.zeros((4, 2)), np.zeros(4)
    with pytest.raises(ValueError, match="labels: expected"):
        numba.run(cross_entropy, logits, np.array(labels))
    with pytest.raises(ValueError, match="labels: expected"):
        numba.run(linear_cross_entropy, x, weight, bias, np.array(labels))


@pytest.mark.parametrize("offsets", [[0, 3, 7], [1, 6], [0, 4, 3, 6], [0, 9, 6], [0, 5], []])
def test_offsets_that_would_leave_the_tokens_are_refused(offsets: list[int]) -> None:
    qkv, y, lse, cu_seqlens = np.zeros((6, 24)), np.zeros((6, 8)), np.zeros((6, 2)), np.array(offsets, np.int32)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 6 rows"):
        numba.run(attention, qkv, cu_seqlens, num_heads=2)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 6 rows"):
        numba.run(attention_grad, y, qkv, y, lse, cu_seqlens, num_heads=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "does not split"),
        ({"num_heads": 0}, "does not split"),
        ({"y": np.zeros((6, 9))}, "y: expected the shape"),
        ({"g": np.zeros((5, 8))}, "g: expected the shape"),
        ({"lse": np.zeros((6, 3))}, "log sum exp: expected the shape"),
        ({"rate": 1.0}, "rate must lie in"),
    ],
)
def test_shapes_that_attention_grad_relies_on(change: dict[str, Any], message: str) -> None:
    arrays = {"g": np.zeros((6, 8)), "qkv": np.zeros((6, 24)), "y": np.zeros((6, 8)), "lse": np.zeros((6, 2))}
    arrays |= {name: value for name, value in change.items() if name in arrays}
    params = {"num_heads": 2, **{name: value for name, value in change.items() if name not in arrays}}
    with pytest.raises(ValueError, match=message):
        numba.run(attention_grad, *arrays.values(), np.array([0, 6]), **params)


def test_a_bias_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="bias: expected the shape"):
        numba.run(linear, np.zeros((3, 4)), np.zeros((5, 4)), np.zeros(4))


def test_no_tokens_at_all() -> None:
    empty, cu_seqlens = np.zeros((0, 24), np.float32), np.array([0, 0, 0])
    y, lse = numba.run(attention, empty, cu_seqlens, num_heads=2)
    assert y.shape == (0, 8) and lse.shape == (0, 2)
    assert numba.run(attention_grad, y, empty, y, lse, cu_seqlens, num_heads=2).shape == (0, 24)


@pytest.mark.parametrize("seed", range(12))
def test_attention_of_any_mix_of_lengths_and_heads_follows_the_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cu_seqlens = np.cumsum([0, *rng.integers(0, 40, rng.integers(1, 7)), 1])
    heads, size = rng.integers(1, 6, 2)
    stream = tuple(rng.integers(0, 2**32, 4).tolist())  # the whole range of each word
    params = {"num_heads": int(heads), "rate": [0.0, 0.1, 0.9][seed % 3], "stream": stream}
    qkv = rng.standard_normal((cu_seqlens[-1], 3 * heads * size), np.float32)
    y, lse = assert_within_bound(attention, qkv, cu_seqlens, **params)
    g = rng.standard_normal(y.shape, np.float32)
    assert_within_bound(attention_grad, g, qkv, y, lse, cu_seqlens, **params)


def test_attention_of_sequences_longer_than_a_block_of_queries() -> None:
    rng, heads, size = np.random.default_rng(0), 2, 20
    cu_seqlens = np.cumsum([0, 3, QUERIES + 1, 2 * QUERIES + 9])
    params = {"num_heads": heads, "rate": 0.3, "stream": (1, 2, 3, 4)}
    qkv = rng.standard_normal((cu_seqlens[-1], 3 * heads * size), np.float32)
    y, lse = assert_within_bound(attention, qkv, cu_seqlens, **params)
    g = rng.standard_normal(y.shape, np.float32)
    assert_within_bound(attention_grad, g, qkv, y, lse, cu_seqlens, **params)


def test_products_of_views_that_blas_cannot_read() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((6, 140, 9), np.float32)[:, ::-2, ::3]
    b = np.broadcast_to(rng.standard_normal((3, 1), np.float32), (3, 5))
    assert_within_bound(matmul, a, b)


def test_a_constant_among_the_arguments_compiles_no_kernel_anew() -> None:
    @jit
    def inner(x: Any, step: int, back: bool) -> None:
        for i in range(0, x.size, step):
            x[i] += -1 if back else 1

    @jit
    def outer(x: Any, step: int) -> None:
        inner(x, 1, False)
        inner(x, 2, back=True)
        inner(x, step, False)

    x = np.zeros(6)
    outer(x, 3)
    assert x.tolist() == [1, 1, 0, 2, 0, 1]
    assert len(inner.overloads) == 1


@pytest.mark.parametrize("op", ["add", "mul", "where", "scale"])
def test_mixed_types_give_what_numpy_gives(op: str) -> None:
    a, b = np.arange(6, dtype="f4").reshape(2, 3), np.arange(6.0).reshape(2, 3)
    arrays: tuple[Any, ...] = (a > 2, a, b) if op == "where" else (a, b)
    found = [p.run(OPS[op], *arrays) if op != "scale" else p.run(OPS[op], np.arange(4), factor=0.5) for p in BOTH]
    assert found[0].dtype == found[1].dtype
    np.testing.assert_array_equal(*found)
