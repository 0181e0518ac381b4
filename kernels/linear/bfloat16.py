"""Products of bfloat16 on a CPU: of pairs, summed in float32 and rounded while a part of the output is in cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from minibert.kernels.activation.cpu import gelu_erf_loop, gelu_tanh_loop
from minibert.kernels.cpu.arrays import empty_on_lines
from minibert.kernels.cpu.bfloat16 import bits_of, left_words, loaded, right_words, stored, widened
from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.prepacked import transpose_of
from minibert.kernels.cpu.product import (
    PACKED,
    UNIT,
    Operand,
    aligned,
    gemm,
    pack_panels,
    part_of,
    product_parts,
    run_parts,
    scratch_for,
)
from minibert.kernels.op import Array

NO_GELU, BY_ERF, BY_TANH = range(3)
AT_ONCE = 64  # rows that are multiplied before they are rounded
KEPT = 1 << 19  # words of a packed B that stay in the second-level cache


@jit
def pairs_parts(
    x: Array, x_row: int, weight: Array, w_k: int, w_column: int, bias: Array, before: Array, y: Array, y_row: int,
    gelu: int, add: bool, m: int, n: int, depth: int, cuts: tuple[int, int], start: int, stop: int,
) -> None:  # fmt: skip
    """x (m, depth) and weight (depth, n) in words, and bias, give the bits of `before` (m, n) and of that GELU's y.

    Where there is no GELU `before` is left alone; with `add` the product is added to y.
    """
    scratch, panels = scratch_for(weight), aligned(0, weight)
    for number in range(start, stop):
        first, rows, left, columns = part_of(bias, m, n, cuts, number)
        right, r_start, r_k, high = weight, left * w_column, w_k, rows
        if w_k == PACKED:
            high = min(rows, AT_ONCE)
        elif rows > AT_ONCE and depth * columns <= KEPT:  # packed once for all rows, which go by a few then
            high, r_start, r_k = AT_ONCE, 0, PACKED
            if panels.size < depth * (columns + UNIT):
                panels = aligned(depth * (columns + UNIT), weight)
            pack_panels(weight, left * w_column, w_k, w_column, depth, columns, panels)
            right = panels
        sums = aligned(high * columns, bias)
        b = bias[left : left + columns]
        for i in range(first, first + rows, high):
            now = min(high, first + rows - i)
            gemm(
                x, i * x_row, x_row, 1, right, r_start, r_k, w_column,
                sums, 0, columns, now, columns, depth, False, scratch,
            )  # fmt: skip
            for r in range(now):
                z, place = sums[r * columns : (r + 1) * columns], (i + r) * y_row + left
                out = y[place : place + columns]
                if add:
                    for j in range(columns):
                        z[j] += loaded(out[j])
                for j in range(columns):
                    z[j] += b[j]
                if gelu == NO_GELU:
                    for j in range(columns):
                        out[j] = stored(z[j], out)
                    continue
                kept = before[place : place + columns]
                for j in range(columns):
                    kept[j] = stored(z[j], kept)
                if gelu == BY_ERF:
                    gelu_erf_loop(z, out, 0, columns)
                else:
                    gelu_tanh_loop(z, out, 0, columns)


def product_of_pairs(a: Array, b: Array, out: Array | None = None, *, add: bool = False, wide: bool = False) -> Array:
    """a (M, K) @ b (K, N) of bfloat16 -> (M, N), rounded to that, into `out` or added to it; in float32 where `wide`.

    Raises ValueError where shapes, or the shape or layout of `out`, do not fit.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"expected (M, K) and (K, N), got {a.shape} and {b.shape}")
    (m, k), n = a.shape, b.shape[1]
    if out is not None and out.shape != (m, n):
        raise ValueError(f"out: expected {m, n}, got {out.shape}")
    placed = out is not None and out.flags.c_contiguous
    y: Any = out if placed else empty_on_lines((m, n), np.float32 if wide else a.dtype)
    if add and not placed:
        y[...] = out
    if m and n:
        left, right, depth = left_words(a), right_words(b), -(-k // 2)
        if wide:
            run_parts(product_parts, m, n, depth, y.dtype, *left, *right, y.reshape(-1), n, m, n, depth, False)
        else:
            _run(left, right, np.zeros(n, np.float32), y, y, NO_GELU, add, depth)
    if out is None or placed:
        return y
    out[...] = y
    return out


def linear_of_pairs(x: Array, weight: Array, bias: Array, gelu: int) -> tuple[Array, Array]:
    """x W' + b for x (M, K) of bfloat16, and its GELU where that is wanted, else the same array."""
    (m, k), n = x.shape, len(weight)
    y = empty_on_lines((m, n), x.dtype)
    before = y if gelu == NO_GELU else empty_on_lines((m, n), x.dtype)
    if m and n:
        _run(left_words(x), transpose_of(weight), widened(bias), before, y, gelu, False, -(-k // 2))
    return before, y


def _run(left: Operand, right: Operand, bias: Array, before: Array, y: Array, gelu: int, add: bool, depth: int) -> None:
    m, n = y.shape
    run_parts(
        pairs_parts, m, n, depth, bias.dtype, left.flat, left.row, *right, bias, bits_of(before).reshape(-1),
        bits_of(y).reshape(-1), n, gelu, add, m, n, depth, packed=right.row == PACKED,
    )  # fmt: skip
