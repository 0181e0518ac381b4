"""int8: one and the same float32 from NumPy's formula and the kernels, and how far that lies from the float linear."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numba
import numpy as np
import pytest

from minibert import backends
from minibert.kernels.cpu import microkernel as cpu_microkernel
from minibert.kernels.cpu import vectors
from minibert.kernels.cpu.microkernel import MR, VECTORS
from minibert.kernels.int8 import MOST_INPUTS, linear_int8, linear_int8_gelu, quantize_rows, quantize_weight
from minibert.kernels.op import Array
from tests.kernels.test_cpu_microkernel import microkernel

NUMPY, NUMBA = backends.get("numpy"), backends.get("numba")
SHAPES = [(1, 1, 1), (5, 50, 64), (7, 9, 13), (33, 130, 384), (16, 96, 1536), (9, 49, 3002)]  # rows, outs, inputs
U = 2.0**-24


def inputs(rows: int, columns: int) -> Iterator[tuple[str, np.ndarray]]:
    """Rows of every kind that rounding to 8 bits may go wrong on."""
    rng = np.random.default_rng(rows + columns)
    x = rng.standard_normal((rows, columns))
    yield "normal", x
    yield "one sign, one outlier", np.where(np.arange(columns) == columns // 2, 1000.0, np.abs(x))
    yield "negative", -np.abs(x) - 3
    yield "zeros, and a constant", np.where(np.arange(rows)[:, None] % 2, 3.7, 0.0) * np.ones(columns)
    ties = rng.integers(-127, 128, (rows, columns)) + 0.5
    ties[:, 0], ties[:, -1] = -127.5, 127.5  # a scale of 1: every element is a tie
    yield "ties", ties
    yield "whole numbers", rng.integers(-3, 4, (rows, columns)).astype(float)
    yield "tiny", x * 1e-37
    yield "huge", x * 1e30


def layer(outs: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A weight as floats, and as int8 with its scale; a bias."""
    rng = np.random.default_rng(outs)
    weight = rng.standard_normal((outs, columns)).astype(np.float32)
    return weight, *quantize_weight(weight), rng.standard_normal(outs).astype(np.float32)


def assert_same(found: Array, wanted: Array, said: str) -> None:
    assert found.dtype == wanted.dtype and found.tobytes() == wanted.tobytes(), said


@pytest.mark.parametrize(("rows", "outs", "columns"), SHAPES)
def test_kernels_give_numpys_bits(rows: int, outs: int, columns: int) -> None:
    _, weight, weight_scale, bias = layer(outs, columns)
    packed = NUMBA.prepacked(weight)
    for kind, x in inputs(rows, columns):
        x = x.astype(np.float32)
        quantized = NUMPY.run(quantize_rows, x)
        for found, wanted in zip(NUMBA.run(quantize_rows, x), quantized, strict=True):
            assert_same(found, wanted, kind)
        y = NUMPY.run(linear_int8, *quantized, weight, weight_scale, bias)
        for given in (weight, packed):
            assert_same(NUMBA.run(linear_int8, *quantized, given, weight_scale, bias), y, kind)
            bent = NUMBA.run(linear_int8_gelu, *quantized, given, weight_scale, bias)
            assert_same(bent, NUMBA.run(linear_int8_gelu, *quantized, weight, weight_scale, bias), kind)


@pytest.mark.parametrize(("rows", "outs", "columns"), SHAPES)
def test_what_quantising_costs_is_half_a_step_of_each(rows: int, outs: int, columns: int) -> None:
    """|x - scale (q - zero)| <= scale / 2 and |w - s w_q| <= s / 2, and their roundings, against the float linear."""
    weight, whole, weight_scale, bias = layer(outs, columns)
    wide = weight.astype(np.float64)
    for kind, x in inputs(rows, columns):
        x = x.astype(np.float32)
        q, scale, zero_point = NUMBA.run(quantize_rows, x)
        y = NUMBA.run(linear_int8, q, scale, zero_point, whole, weight_scale, bias).astype(np.float64)
        half = scale.astype(np.float64) * (0.5 + 255 * 4 * U)
        size = np.abs(x.astype(np.float64)).sum(axis=1, keepdims=True)
        allowed = half * np.abs(wide).sum(axis=1)
        allowed = allowed + weight_scale * (0.5 + 127 * 2 * U) * (size + half * columns)
        wanted = x.astype(np.float64) @ wide.T + bias
        assert (np.abs(y - wanted) <= allowed + 4 * U * (np.abs(wanted) + allowed)).all(), kind


def test_zero_is_a_level_of_its_own() -> None:
    """What was 0 before is 0 afterwards, whatever lies beside it: a residual that is masked stays so."""
    for kind, x in inputs(9, 130):
        x[:, 3] = 0
        q, _, zero_point = NUMBA.run(quantize_rows, x.astype(np.float32))
        assert (q[:, 3] == zero_point[:, 0]).all(), kind


def test_a_weights_largest_number_is_the_last_level() -> None:
    weight = np.array([[0.5, -2.0, 1.0], [0.0, 0.0, 0.0], [3.0, 3.0, -3.0]], np.float32)
    whole, scale = quantize_weight(weight)
    assert whole.tolist() == [[32, -127, 64], [0, 0, 0], [127, 127, -127]]
    assert whole.dtype == np.int8 and scale.dtype == np.float32
    np.testing.assert_allclose(whole * scale[:, None], weight, atol=2 / 127 / 2)


def test_sums_that_int32_cannot_hold_are_refused() -> None:
    q, scale, zero_point = NUMPY.run(quantize_rows, np.ones((1, MOST_INPUTS + 1), np.float32))
    weight, weight_scale = quantize_weight(np.ones((1, MOST_INPUTS + 1), np.float32))
    with pytest.raises(ValueError, match=f"at most {MOST_INPUTS}"):
        NUMBA.run(linear_int8, q, scale, zero_point, weight, weight_scale, np.zeros(1, np.float32))
    largest = NUMBA.run(linear_int8, q[:, 1:], scale, zero_point, weight[:, 1:], weight_scale, np.zeros(1, np.float32))
    assert largest[0, 0] == pytest.approx(MOST_INPUTS, rel=1e-6)


def test_the_microkernel_has_the_best_instruction_that_the_processor_has() -> None:
    call = microkernel(cpu_microkernel, VECTORS)
    vector, integer = numba.int32[::1], numba.intp
    call.compile((vector, *[integer] * 4, vector, integer, integer, vector, integer, integer, numba.boolean))
    (assembly,) = call.inspect_asm().values()
    lanes = vectors.VECTOR_BYTES // 4
    by_bytes, by_pairs = (len(re.findall(name, assembly)) for name in (r"\tv?pdpbusd", r"\tv?pmaddwd"))
    if vectors.has_byte_products(lanes):
        assert by_bytes >= MR * VECTORS and not by_pairs
    elif lanes in vectors.PAIR_PRODUCTS and vectors.has(vectors.PAIR_PRODUCTS[lanes][0]):
        assert by_pairs >= 2 * MR * VECTORS and not by_bytes


@pytest.mark.parametrize("number", range(1, VECTORS + 1))
def test_a_microkernel_of_bytes_is_right(number: int) -> None:
    """The largest bytes of both signs too: vpmaddubsw would saturate on them."""
    rng, width, depth = np.random.default_rng(number), number * vectors.VECTOR_BYTES // 4, 5
    call = microkernel(cpu_microkernel, number)
    for rows in range(1, MR + 1):
        left = rng.choice(np.array([0, 1, 127, 128, 254, 255], np.uint8), (rows, 4 * depth))
        right = rng.choice(np.array([-128, -127, -1, 0, 1, 126, 127], np.int8), (depth, width, 4))
        c, before = np.full((MR, width), 7, np.int32), np.full((MR, width), 7, np.int32)
        words, panel = left.reshape(-1).view(np.int32), right.reshape(-1).view(np.int32)
        for add in (False, True):
            call(words, 0, depth, 1, rows, panel, 0, depth, c.reshape(-1), 0, width, add)
            products = left.astype(np.int32) @ right.astype(np.int32).swapaxes(1, 2).reshape(4 * depth, width)
            before[:rows] = products + add * before[:rows]
            assert np.array_equal(c[:rows], before[:rows]), rows
