"""Products by `cpu_product`; bias and GELU are added to each part of the output while that is in cache."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from minibert.kernels.activation.cpu import gelu_erf_loop, gelu_tanh_loop
from minibert.kernels.cpu.arrays import contiguous
from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.prepacked import transpose_of
from minibert.kernels.cpu.product import PACKED, gemm, operand, part_of, product, run_parts, scratch_for
from minibert.kernels.linear.bfloat16 import BY_ERF, BY_TANH, NO_GELU, linear_of_pairs, product_of_pairs
from minibert.kernels.op import Array, is_bfloat16, takes_bfloat16
from minibert.kernels.reduction.cpu import reduce_sum

KINDS = {None: NO_GELU, "none": BY_ERF, "tanh": BY_TANH}  # by `approximate`


@jit
def linear_parts(
    x: Array, x_row: int, x_k: int, weight: Array, w_k: int, w_column: int, bias: Array, before: Array, y: Array,
    gelu: int, m: int, n: int, depth: int, cuts: tuple[int, int], start: int, stop: int,
) -> None:  # fmt: skip
    """x (m, depth) and weight (depth, n), with their strides, and bias give `before` (m, n), and that GELU's y.

    One kernel with GELU and without: each one would hold, and have compiled, all of `gemm`.
    """
    scratch = scratch_for(y)
    for number in range(start, stop):
        first, rows, left, columns = part_of(y, m, n, cuts, number)
        gemm(
            x, first * x_row, x_row, x_k, weight, left * w_column, w_k, w_column,
            before, first * n + left, n, rows, columns, depth, False, scratch,
        )  # fmt: skip
        b = bias[left : left + columns]
        for i in range(first, first + rows):
            row, to_row = before[i * n + left : i * n + left + columns], y[i * n + left :]
            for j in range(columns):
                row[j] += b[j]
            if gelu == BY_ERF:
                gelu_erf_loop(row, to_row, 0, columns)
            elif gelu == BY_TANH:
                gelu_tanh_loop(row, to_row, 0, columns)


def product_with_transpose(x: Array, weight: Array) -> Array:
    """x W' for x (..., in) and W (out, in), row after row whatever the order of x's axes; of bfloat16 in float32."""
    rows = x if x.ndim == 2 else np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    right = weight.swapaxes(0, 1)
    y = product_of_pairs(rows, right, wide=True) if is_bfloat16(x) else product(rows, right)
    return y.reshape(*x.shape[:-1], len(weight))


def _product(a: Array, b: Array, out: Array | None = None, *, add: bool = False) -> Array:
    return (product_of_pairs if is_bfloat16(a) else product)(a, b, out, add=add)


@takes_bfloat16
def matmul(a: Array, b: Array) -> Array:
    if a.ndim == b.ndim == 2:
        return _product(a, b)
    stack = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (_stacked(x, stack) for x in (a, b))
    y = np.empty((*stack, a.shape[-2], b.shape[-1]), a.dtype)
    for index in np.ndindex(stack):
        _product(a[index], b[index], y[index])
    return y


def _stacked(x: Array, stack: tuple[int, ...]) -> Array:
    """`x` as so many matrices. Not read-only, as `broadcast_to` is: `gemm` would be compiled once more for that."""
    shape = (*stack, *x.shape[-2:])
    return np.lib.stride_tricks.as_strided(x, shape, np.broadcast_to(x, shape).strides)


@takes_bfloat16
def linear(x: Array, weight: Array, bias: Array) -> Array:
    return _linear(x, weight, bias)[0]


@takes_bfloat16
def linear_gelu(x: Array, weight: Array, bias: Array, *, approximate: str = "none") -> tuple[Array, Array]:
    before, y = _linear(x, weight, bias, approximate)
    return y, before


def _linear(x: Array, weight: Array, bias: Array, gelu: str | None = None) -> tuple[Array, Array]:
    """x W' + b, and its GELU where that is wanted, else the same array."""
    n, depth = weight.shape
    bias = contiguous(bias, (n,), "bias")
    if x.shape[-1] != depth:
        raise ValueError(f"x: expected rows of {depth}, got {x.shape}")
    if is_bfloat16(x):
        made = linear_of_pairs(np.ascontiguousarray(x).reshape(-1, depth), weight, bias, KINDS[gelu])
        before, y = (a.reshape(*x.shape[:-1], n) for a in made)
        return before, y
    before = np.empty((*x.shape[:-1], n), x.dtype)
    y = before if gelu is None else np.empty_like(before)
    m = prod(x.shape[:-1])
    if m and n:
        rows, columns = operand(np.ascontiguousarray(x).reshape(m, depth)), transpose_of(weight)
        outs, packed = (before.reshape(-1), y.reshape(-1)), columns.row == PACKED
        run_parts(
            linear_parts, m, n, depth, x.dtype, *rows, *columns, bias, *outs, KINDS[gelu], m, n, depth, packed=packed
        )
    return before, y


@takes_bfloat16
def linear_grad(g: Array, x: Array, *, into: Sequence[Array | None] = (None,)) -> tuple[Array, Array]:
    return _product(g.swapaxes(0, 1), x, into[0]), reduce_sum(g, axis=0)


@takes_bfloat16
def add_linear_grad(total: Array, g: Array, x: Array) -> None:
    if total.flags.c_contiguous or is_bfloat16(total):
        _product(g.swapaxes(0, 1), x, total, add=True)
    else:
        total += _product(g.swapaxes(0, 1), x)
