"""bfloat16 on numba: conversions bit for bit, the order in which an instruction adds a word's two products, batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from minibert import backends
from minibert.kernels import OPS
from minibert.kernels.cpu import tiles, vectors
from minibert.kernels.cpu.bfloat16 import left_words, narrowed, right_words, widened
from minibert.kernels.linear import linear, linear_gelu, matmul
from minibert.kernels.linear.bfloat16 import product_of_pairs
from minibert.kernels.op import Array

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NUMBA = backends.get("numba")
TINY = np.float32(2.0**-126)
SHAPES = [(1, 1, 1), (3, 5, 2), (17, 49, 31), (33, 70, 64), (16, 48, 66), (40, 200, 897)]  # rows, outs, inputs


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Numbers of both signs and many sizes, so that sums cancel."""
    rng = np.random.default_rng(seed + sum(shape))
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-6, 7, shape)).astype(BFLOAT16)


# --------------------------------------------------------------------------------------------------------- conversions


def test_every_bfloat16_is_the_float32_that_it_is() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(BFLOAT16)
    assert np.array_equal(widened(every).view(np.uint32), np.arange(2**16, dtype=np.uint32) << 16)
    assert np.array_equal(narrowed(widened(every), BFLOAT16).astype(np.float32), widened(every), True)


@pytest.mark.parametrize("below", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_a_float32_goes_to_the_nearest_and_ties_to_even(below: int) -> None:
    x = ((np.arange(2**16, dtype=np.uint32) << 16) + np.uint32(below)).view(np.float32)
    with np.errstate(invalid="ignore"):  # of NaN
        found, wanted = narrowed(x, BFLOAT16), x.astype(BFLOAT16)
    assert np.array_equal(np.isnan(found.astype(np.float32)), np.isnan(x))
    number = ~np.isnan(x)
    assert np.array_equal(found.view(np.uint16)[number], wanted.view(np.uint16)[number])


def test_what_is_not_contiguous_is_converted_where_it_lies() -> None:
    x = drawn(6, 10)
    assert np.array_equal(widened(x.T), x.T.astype(np.float32))
    assert np.array_equal(narrowed(x.T.astype(np.float32), BFLOAT16), x.T)


def layouts(x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    yield "rows", x
    yield "columns", np.asfortranarray(x)
    yield "every second", np.repeat(np.repeat(x, 2, axis=0), 2, axis=1)[::2, ::2]
    wide = np.zeros((x.shape[0], x.shape[1] + 3), x.dtype)
    wide[:, 1:-2] = x
    yield "part of wider rows", wide[:, 1:-2]
    yield "one row for all", np.broadcast_to(x[:1], x.shape)
    yield "from behind", np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1]


@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (5, 7), (70, 3), (2, 130)])
def test_words_hold_neighbours_along_k(shape: tuple[int, int]) -> None:
    for said, x in layouts(drawn(*shape)):
        filled = np.zeros((shape[0], shape[1] + shape[1] % 2), np.uint16)
        filled[:, : shape[1]] = np.ascontiguousarray(x).view(np.uint16)
        wanted = filled.view(np.uint32)
        for operand, turned in ((left_words(x), False), (right_words(x.T), True)):
            down, across = (operand.column, operand.row) if turned else (operand.row, operand.column)
            strides = (4 * down, 4 * across)
            assert np.array_equal(np.lib.stride_tricks.as_strided(operand.flat, wanted.shape, strides), wanted), said


# --------------------------------------------------------------------------------------------- what an instruction adds


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32 that were bfloat16, rounded once: to odd in float64, which 2 digits more would do for."""
    product = a.astype(np.float64) * b  # exact
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    even = total.view(np.int64) % 2 == 0
    return np.where((error != 0) & even, np.nextafter(total, np.copysign(np.inf, error)), total).astype(np.float32)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def by_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """vdpbf16ps along K, and its like by fused float32: the upper element of a pair first."""
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for k in range(0, a.shape[1], 2):
        for upper in (1, 0):
            total = fused(a[:, k + upper, None], b[k + upper], total)
    return total


def by_tiles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """TDPBF16PS: even and odd terms of up to 32 apart, each sum fused, then both together added."""
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for k in range(0, a.shape[1], 32):
        sums = [np.zeros_like(total), np.zeros_like(total)]
        for j in range(k, min(k + 32, a.shape[1])):
            sums[j % 2] = flushed(fused(a[:, j, None], b[j], sums[j % 2]))
        total = flushed(total + flushed(sums[0] + sums[1]))
    return total


def wide(x: np.ndarray) -> np.ndarray:
    """As float32, with an element of zeros where K is odd."""
    x = x.astype(np.float32)
    return np.pad(x, ((0, 0), (0, x.shape[1] % 2)))


@pytest.mark.parametrize(("rows", "outs", "inputs"), SHAPES)
def test_sums_are_added_in_the_order_of_the_instruction(rows: int, outs: int, inputs: int) -> None:
    if inputs > 2 * 384:
        pytest.skip("longer sums are cut, each part begins at 0 and is added")
    a, b = drawn(rows, inputs), drawn(inputs, outs, seed=1)
    model = by_tiles if vectors.PAIRS in tiles.INSTRUCTIONS else by_pairs
    found = product_of_pairs(a, b, wide=True)
    assert found.dtype == np.float32
    assert np.array_equal(found, model(wide(a), wide(b.T).T))


def test_the_instructions_on_vectors_add_as_their_model_says() -> None:
    """Also where products are made in tiles: kernels of other processors have these."""
    from minibert.kernels.cpu import microkernel as cpu_microkernel
    from tests.kernels.test_cpu_microkernel import microkernel

    width, depth = vectors.VECTOR_BYTES // 4, 9
    call = microkernel(cpu_microkernel, 1)
    a, b = drawn(cpu_microkernel.MR, 2 * depth), drawn(2 * depth, width, seed=2)
    c = np.zeros((cpu_microkernel.MR, width), np.float32)
    left, right = left_words(a), right_words(b)
    call(left.flat, 0, left.row, 1, cpu_microkernel.MR, right.flat, 0, depth, c.reshape(-1), 0, width, False)
    assert np.array_equal(c, by_pairs(wide(a), wide(b.T).T))


def test_the_model_rounds_once() -> None:
    a, b = drawn(40, 40).astype(np.float32), drawn(40, 40, seed=3).astype(np.float32)
    c = (np.random.default_rng(0).standard_normal((40, 40)) * 2.0**-20).astype(np.float32)
    exact = a.astype(np.longdouble) * b + c
    assert (np.abs(fused(a, b, c) - exact) <= 2.0**-24 * np.abs(exact)).all()


@pytest.mark.parametrize("size", [2.0**-130, 2.0**-100, 2.0**60])
def test_numbers_near_the_ends_of_the_range_stay_within_the_bound(size: float) -> None:
    from minibert.lab.conform.judge import judge

    a, b = (drawn(9, 40).astype(np.float32) * size).astype(BFLOAT16), drawn(40, 13, seed=1)
    judged = judge(matmul, (a, b), {}, NUMBA.run(matmul, a, b), "bfloat16")
    assert judged.ok, judged.worst


# ------------------------------------------------------------------------------------------------------------- products


def assert_near(found: np.ndarray, exact: np.ndarray, size: np.ndarray) -> None:
    """Rounded once to bfloat16 from a sum in float32, whose terms are together of this size."""
    assert found.dtype == BFLOAT16
    assert (np.abs(found.astype(np.float64) - exact) <= 2.0**-8 * np.abs(exact) + 2.0**-14 * size).all()


@pytest.mark.parametrize(("rows", "outs", "inputs"), SHAPES)
def test_products_are_right_in_every_layout(rows: int, outs: int, inputs: int) -> None:
    for said, a in layouts(drawn(rows, inputs)):
        b = drawn(inputs, outs, seed=1)
        left, right = a.astype(np.float64), b.astype(np.float64)
        first = product_of_pairs(a, b)
        assert_near(first, left @ right, np.abs(left) @ np.abs(right))
        for other, laid in layouts(b):
            if other != "one row for all":
                assert np.array_equal(product_of_pairs(a, laid), first), (said, other)


@pytest.mark.parametrize("strided", [False, True])
def test_a_product_is_added_in_float32_and_rounded_once(strided: bool) -> None:
    a, b = drawn(20, 30), drawn(30, 50, seed=1)
    out = np.zeros((20, 100), BFLOAT16)[:, ::2] if strided else np.zeros((20, 50), BFLOAT16)
    out[...] = before = drawn(20, 50, seed=2)
    assert product_of_pairs(a, b, out, add=True) is out
    wanted = before.astype(np.float32) + product_of_pairs(a, b, wide=True)
    assert np.array_equal(out, wanted.astype(BFLOAT16))


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected \(M, K\) and \(K, N\), got \(2, 3\) and \(4, 5\)"):
        product_of_pairs(drawn(2, 3), drawn(4, 5))
    with pytest.raises(ValueError, match=r"out: expected \(2, 5\), got \(2, 6\)"):
        product_of_pairs(drawn(2, 3), drawn(3, 5), np.zeros((2, 6), BFLOAT16))


@pytest.mark.parametrize("op", [linear, linear_gelu], ids=lambda op: op.name)
def test_a_row_has_the_same_bits_in_any_batch_on_any_threads_and_by_a_packed_weight(op: Any) -> None:
    x, weight, bias = drawn(65, 130), drawn(70, 130, seed=1), drawn(70, seed=2)

    def of(rows: Array, given: Array = weight) -> bytes:
        return b"".join(np.asarray(y)[:1].tobytes() for y in results(NUMBA.run(op, rows, given, bias)))

    whole = of(x)
    assert of(x[:1]) == of(x[:17]) == of(x, NUMBA.prepacked(weight)) == whole
    for _, divided in NUMBA.orders():
        with divided:
            assert of(x) == whole


def results(found: Any) -> tuple[Array, ...]:
    return found if isinstance(found, tuple) else (found,)


def test_kernels_that_read_bfloat16_are_those_that_read_much() -> None:
    """What is marked is given no copies in float32: a table of words, a weight, a gradient."""
    marked = {op.name for op in OPS.values() if getattr(NUMBA.kernel(op), "takes_bfloat16", False)}
    assert {"linear", "linear_gelu", "matmul", "linear_grad", "embedding", "linear_cross_entropy"} <= marked
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(NUMBA), "widened", lambda self, x: seen.append(x) or x.astype(np.float32))
        NUMBA.run(OPS["linear"], drawn(3, 4), drawn(5, 4), drawn(5))
        assert not seen
        NUMBA.run(OPS["softmax"], drawn(3, 4))
        assert len(seen) == 1


@pytest.mark.parametrize("length", [1, 2, 31, 130])
def test_a_sequence_has_the_same_attention_alone_and_beside_others(length: int) -> None:
    heads, others = 3, (130, 17, 2)
    ends = np.cumsum([0, *others[:2], length, others[2]])
    qkv = drawn(int(ends[-1]), 3 * heads * 32)
    y, lse = NUMBA.run(OPS["attention"], qkv, ends, num_heads=heads)
    alone = NUMBA.run(OPS["attention"], qkv[ends[2] : ends[3]], np.array([0, length]), num_heads=heads)
    assert y[ends[2] : ends[3]].tobytes() == alone[0].tobytes()
    assert lse.dtype == np.float32 and lse[ends[2] : ends[3]].tobytes() == alone[1].tobytes()


def test_a_head_of_odd_size_has_no_words_and_is_computed_in_float32() -> None:
    qkv, ends = drawn(9, 3 * 2 * 5), np.array([0, 4, 9])
    y, lse = NUMBA.run(OPS["attention"], qkv, ends, num_heads=2)
    wanted, log_sum = NUMBA.run(OPS["attention"], widened(qkv), ends, num_heads=2)
    assert y.tobytes() == wanted.astype(BFLOAT16).tobytes() and lse.tobytes() == log_sum.tobytes()


@pytest.mark.parametrize(
    "op", [linear, matmul, OPS["gelu"], OPS["reduce_sum"], OPS["gather_rows"]], ids=lambda op: op.name
)
def test_float16_is_not_taken_for_bfloat16(op: Any) -> None:
    """It has two bytes as well; the door gives kernels that read bfloat16 copies of it in float32."""
    sample = next(iter(op.samples(np.random.default_rng(0))))
    wide = [x.astype(np.float16).astype(np.float32) if x.dtype.kind == "f" else x for x in sample.arrays]
    narrow = [x.astype(np.float16) if x.dtype.kind == "f" else x for x in wide]
    found = results(NUMBA.run(op, *narrow, **sample.params))
    for y, wanted in zip(found, results(NUMBA.run(op, *wide, **sample.params)), strict=True):
        assert y.dtype == np.float16 and np.array_equal(y, wanted.astype(np.float16))
