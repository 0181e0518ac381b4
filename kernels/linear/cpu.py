"""Products by `cpu_product`; bias and GELU are added to each part of the output while that is in cache."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from minibert.kernels.activation.cpu import gelu_erf_loop, gelu_tanh_loop
from minibert.kernels.cpu_arrays import contiguous
from minibert.kernels.cpu_jit import jit
from minibert.kernels.cpu_product import gemm, operand, part_of, product, run_parts, scratch_for
from minibert.kernels.op import Array
from minibert.kernels.reduction.cpu import reduce_sum


@jit
def linear_parts(
    x: Array, x_row: int, x_k: int, weight: Array, w_k: int, w_column: int, bias: Array, y: Array, m: int, n: int,
    depth: int, add: bool, cuts: tuple[int, int], start: int, stop: int,
) -> None:  # fmt: skip
    """x (m, depth) and weight (depth, n), with their strides, give y (m, n), contiguous; `add` is False."""
    scratch = scratch_for(y)
    for number in range(start, stop):
        part = part_of(y, m, n, cuts, number)
        linear_part(x, x_row, x_k, weight, w_k, w_column, bias, y, n, depth, add, scratch, part)


@jit
def linear_part(
    x: Array, x_row: int, x_k: int, weight: Array, w_k: int, w_column: int, bias: Array, y: Array, n: int, depth: int,
    add: bool, scratch: Array, part: tuple[int, int, int, int],
) -> None:  # fmt: skip
    # no constant among gemm's arguments: Numba would compile gemm, and all that it calls, once more for that constant
    first, rows, left, columns = part
    gemm(
        x, first * x_row, x_row, x_k, weight, left * w_column, w_k, w_column,
        y, first * n + left, n, rows, columns, depth, add, scratch,
    )  # fmt: skip
    b = bias[left : left + columns]
    for i in range(first, first + rows):
        row = y[i * n + left : i * n + left + columns]
        for j in range(columns):
            row[j] += b[j]


@jit
def linear_gelu_parts(
    x: Array, x_row: int, x_k: int, weight: Array, w_k: int, w_column: int, bias: Array, before: Array, y: Array,
    by_tanh: bool, m: int, n: int, depth: int, add: bool, cuts: tuple[int, int], start: int, stop: int,
) -> None:  # fmt: skip
    scratch = scratch_for(y)
    for number in range(start, stop):
        part = part_of(y, m, n, cuts, number)
        linear_part(x, x_row, x_k, weight, w_k, w_column, bias, before, n, depth, add, scratch, part)
        first, rows, left, columns = part
        for i in range(first, first + rows):
            from_row, to_row = before[i * n + left :], y[i * n + left :]
            if by_tanh:
                gelu_tanh_loop(from_row, to_row, 0, columns)
            else:
                gelu_erf_loop(from_row, to_row, 0, columns)


def product_with_transpose(x: Array, weight: Array) -> Array:
    """x W' for x (..., in) and W (out, in), row after row whatever the order of x's axes."""
    rows = x if x.ndim == 2 else np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    return product(rows, weight.swapaxes(0, 1)).reshape(*x.shape[:-1], len(weight))


def matmul(a: Array, b: Array) -> Array:
    if a.ndim == b.ndim == 2:
        return product(a, b)
    stack = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (np.broadcast_to(x, (*stack, *x.shape[-2:])) for x in (a, b))
    y = np.empty((*stack, a.shape[-2], b.shape[-1]), a.dtype)
    for index in np.ndindex(stack):
        product(a[index], b[index], y[index])
    return y


def linear(x: Array, weight: Array, bias: Array) -> Array:
    return _linear(x, weight, bias)[0]


def linear_gelu(x: Array, weight: Array, bias: Array, *, approximate: str = "none") -> tuple[Array, Array]:
    before, y = _linear(x, weight, bias, approximate)
    return y, before


def _linear(x: Array, weight: Array, bias: Array, gelu: str | None = None) -> list[Array]:
    """x W' + b, and its GELU where that is wanted."""
    n, depth = weight.shape
    bias = contiguous(bias, (n,), "bias")
    if x.shape[-1] != depth:
        raise ValueError(f"x: expected rows of {depth}, got {x.shape}")
    outs = [np.empty((*x.shape[:-1], n), x.dtype) for _ in range(1 if gelu is None else 2)]
    m = prod(x.shape[:-1])
    if m and n:
        rows, columns = operand(np.ascontiguousarray(x).reshape(m, depth)), operand(weight.T)
        flat = [out.reshape(-1) for out in outs]
        if gelu is None:
            run_parts(linear_parts, m, n, depth, x.dtype, *rows, *columns, bias, *flat, m, n, depth, False)
        else:
            run_parts(
                linear_gelu_parts, m, n, depth, x.dtype,
                *rows, *columns, bias, *flat, gelu == "tanh", m, n, depth, False,
            )  # fmt: skip
    return outs


def linear_grad(g: Array, x: Array, *, into: Sequence[Array | None] = (None,)) -> tuple[Array, Array]:
    return product(g.swapaxes(0, 1), x, into[0]), reduce_sum(g, axis=0)


def add_linear_grad(total: Array, g: Array, x: Array) -> None:
    if total.flags.c_contiguous:
        product(g.swapaxes(0, 1), x, total, add=True)
    else:
        total += product(g.swapaxes(0, 1), x)
