"""Rows to 8 bits: a pass for their range, one that rounds; products of words of four bytes, scaled while in cache."""

from __future__ import annotations

import numpy as np

from minibert.kernels.activation.cpu import gelu_erf_loop, gelu_tanh_loop
from minibert.kernels.cpu.arrays import contiguous, empty_on_lines, on_lines
from minibert.kernels.cpu.jit import inline_unfused, jit
from minibert.kernels.cpu.math import vmax
from minibert.kernels.cpu.prepacked import row_sums_of, transpose_of, words_of
from minibert.kernels.cpu.product import PACKED, aligned, gemm, part_of, run_parts, scratch_for
from minibert.kernels.cpu.threads import rows_worth_a_thread, run_rows
from minibert.kernels.int8 import LEVELS, MOST_INPUTS, SMALLEST
from minibert.kernels.linear.cpu import BY_ERF, BY_TANH, KINDS, NO_GELU
from minibert.kernels.op import Array

AT_ONCE = 64  # rows whose sums are made before they are scaled, so that these are in cache
ABREAST = 64  # elements of a row that have a maximum each, so that LLVM takes them in vectors
COST = 0.25  # nanoseconds an element, for `rows_worth_a_thread`


@inline_unfused
def steps(x: float, inverse: float, zero_point: float, most: float) -> float:
    whole = np.rint(x * inverse) + zero_point
    whole = whole if whole > most - most else most - most  # NaN to 0, which there is an integer for
    return whole if whole < most else most


@inline_unfused
def scaled(total: float, scale: float, weight_scale: float, bias: float) -> float:
    return total * scale * weight_scale + bias


@jit
def quantize_loop(x: Array, q: Array, scales: Array, zero_points: Array, start: int, stop: int) -> None:
    columns = x.shape[1]
    nought, one, most = x.dtype.type(0), x.dtype.type(1), x.dtype.type(LEVELS)
    highest, lowest = np.empty(ABREAST, x.dtype), np.empty(ABREAST, x.dtype)
    for i in range(start, stop):
        row, out = x[i], q[i]
        for k in range(ABREAST):
            highest[k] = lowest[k] = nought
        for j in range(0, columns, ABREAST):
            part = row[j : j + ABREAST]
            for k in range(part.size):
                highest[k] = vmax(highest[k], part[k])
                lowest[k] = vmax(lowest[k], -part[k])
        above = below = nought
        for k in range(ABREAST):
            above, below = vmax(above, highest[k]), vmax(below, lowest[k])
        scale = vmax((above + below) / most, x.dtype.type(SMALLEST))
        inverse = one / scale
        zero_point = steps(below, inverse, nought, most)
        scales[i, 0], zero_points[i, 0] = scale, np.int32(zero_point)
        for j in range(columns):
            out[j] = np.uint8(steps(row[j], inverse, zero_point, most))


def quantize_rows(x: Array) -> tuple[Array, Array, Array]:
    x = np.ascontiguousarray(x)
    rows, columns = x.shape
    q, scale, zero_point = (
        empty_on_lines(x.shape, np.uint8),
        np.empty((rows, 1), x.dtype),
        np.empty((rows, 1), np.int32),
    )
    run_rows(quantize_loop, rows, x, q, scale, zero_point, grain=rows_worth_a_thread(columns, COST))
    return q, scale, zero_point


@jit
def linear_int8_parts(
    q: Array, scale: Array, zero_point: Array, weight: Array, w_k: int, w_column: int, weight_sums: Array,
    weight_scale: Array, bias: Array, y: Array, gelu: int, m: int, n: int, depth: int,
    cuts: tuple[int, int], start: int, stop: int,
) -> None:  # fmt: skip
    """q (m, depth) and weight (depth, n), with its strides, in words of four bytes give y (m, n)."""
    scratch, before = scratch_for(weight), np.empty(n, y.dtype)
    for number in range(start, stop):
        first, rows, left, columns = part_of(weight_sums, m, n, cuts, number)
        high = min(rows, AT_ONCE) if w_k == PACKED else rows  # else the weight would be packed for each
        sums = aligned(high * columns, weight_sums)
        to_take, factors = weight_sums[left : left + columns], weight_scale[left : left + columns]
        b = bias[left : left + columns]
        for i in range(first, first + rows):
            r = (i - first) % high
            if r == 0:
                gemm(
                    q, i * depth, depth, 1, weight, left * w_column, w_k, w_column,
                    sums, 0, columns, min(high, first + rows - i), columns, depth, False, scratch,
                )  # fmt: skip
            totals, out = sums[r * columns :], y[i * n + left : i * n + left + columns]
            z = out if gelu == NO_GELU else before[:columns]
            for j in range(columns):
                total = np.int32(totals[j] - np.int32(zero_point[i] * to_take[j]))
                z[j] = scaled(y.dtype.type(total), scale[i], factors[j], b[j])
            if gelu == BY_ERF:
                gelu_erf_loop(z, out, 0, columns)
            elif gelu == BY_TANH:
                gelu_tanh_loop(z, out, 0, columns)


def linear_int8(q: Array, scale: Array, zero_point: Array, weight: Array, weight_scale: Array, bias: Array) -> Array:
    return _linear(q, scale, zero_point, weight, weight_scale, bias)


def linear_int8_gelu(
    q: Array, scale: Array, zero_point: Array, weight: Array, weight_scale: Array, bias: Array, *,
    approximate: str = "none",
) -> Array:  # fmt: skip
    return _linear(q, scale, zero_point, weight, weight_scale, bias, approximate)


def _linear(
    q: Array, scale: Array, zero_point: Array, weight: Array, weight_scale: Array, bias: Array,
    gelu: str | None = None,
) -> Array:  # fmt: skip
    (m, inputs), n = q.shape, len(weight)
    if weight.shape[1] != inputs:
        raise ValueError(f"q: expected rows of {weight.shape[1]}, got {q.shape}")
    if inputs > MOST_INPUTS:
        raise ValueError(f"q: expected rows of at most {MOST_INPUTS}, whose sums are int32, got {q.shape}")
    scale, zero_point = (contiguous(a, (m, 1), name) for a, name in ((scale, "scale"), (zero_point, "zero_point")))
    weight_scale, bias = (contiguous(a, (n,), name) for a, name in ((weight_scale, "weight_scale"), (bias, "bias")))
    y = np.empty((m, n), scale.dtype)
    if m and n:
        words, columns = on_lines(words_of(q)), transpose_of(weight)
        run_parts(
            linear_int8_parts, m, n, words.shape[1], words.dtype, words.reshape(-1), scale.reshape(-1),
            zero_point.reshape(-1), *columns, row_sums_of(weight), weight_scale, bias, y.reshape(-1), KINDS[gelu],
            m, n, words.shape[1], packed=columns.row == PACKED,
        )  # fmt: skip
    return y
