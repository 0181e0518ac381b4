"""adamw: one pass over the flat arrays, in place; square_norm: blocks summed in float64; clip_scale: one number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minibert.kernels.cpu.arrays import flat
from minibert.kernels.cpu.bfloat16 import bits_of, loaded, narrowed
from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.threads import blocks, rows_worth_a_thread, run_rows
from minibert.kernels.op import Array, is_bfloat16, takes_bfloat16

BLOCK = 1 << 14  # elements of one partial sum
LIGHT = rows_worth_a_thread(1, cost=0.4)  # elements


@jit
def adamw_loop(
    param: Array, grad: Array, exp_avg: Array, exp_avg_sq: Array, scale: Any, beta1: Any, rest1: Any, beta2: Any,
    rest2: Any, root: Any, eps: Any, rate: Any, decay: Any, start: int, stop: int,
) -> None:  # fmt: skip
    p, g, m, v = param[start:stop], grad[start:stop], exp_avg[start:stop], exp_avg_sq[start:stop]
    for i in range(p.size):
        gradient = loaded(g[i]) * scale
        first = m[i] * beta1 + gradient * rest1
        second = v[i] * beta2 + gradient * gradient * rest2
        m[i], v[i] = first, second
        p[i] = p[i] * decay - first * rate / (math.sqrt(second) / root + eps)


@takes_bfloat16
def adamw(
    param: Array, grad: Array, exp_avg: Array, exp_avg_sq: Array, grad_scale: Array,
    *, lr: float, step: int, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01,
) -> tuple[Array, Array, Array]:  # fmt: skip
    arrays = (param, bits_of(grad), exp_avg, exp_avg_sq)
    vectors = flat(*arrays)
    numbers = (
        float(grad_scale), beta1, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** 0.5, eps,
        lr / (1 - beta1**step), 1 - lr * weight_decay,
    )  # fmt: skip
    run_rows(adamw_loop, param.size, *vectors, *map(param.dtype.type, numbers), grain=LIGHT)
    for array, vector in zip(arrays, vectors, strict=True):
        if array is not arrays[1] and not np.may_share_memory(array, vector):  # strided: a copy was updated
            array[...] = vector.reshape(array.shape)
    return param, exp_avg, exp_avg_sq


@takes_bfloat16
def adamw_shadow(
    shadow: Array, param: Array, grad: Array, exp_avg: Array, exp_avg_sq: Array, grad_scale: Array, **numbers: Any
) -> tuple[Array, Array, Array, Array]:
    """`shadow` is of use where it is stored in fewer bits; else it is a copy."""
    adamw(param, grad, exp_avg, exp_avg_sq, grad_scale, **numbers)
    shadow[...] = narrowed(param, shadow.dtype) if is_bfloat16(shadow) else param
    return shadow, param, exp_avg, exp_avg_sq


@jit
def square_norm_blocks(x: Array, partial: Array, start: int, stop: int) -> None:
    for block in range(start, stop):
        part = x[block * BLOCK : (block + 1) * BLOCK]
        total = 0.0
        for i in range(part.size):
            x_i = np.float64(loaded(part[i]))
            total += x_i * x_i
        partial[block] = total


@takes_bfloat16
def square_norm(x: Array) -> Array:
    (vector,) = flat(bits_of(x))
    partial = np.empty(blocks(x.size, BLOCK), np.float64)
    run_rows(square_norm_blocks, len(partial), vector, partial, grain=rows_worth_a_thread(BLOCK, cost=0.03))
    return np.asarray(partial.sum(), np.float32 if is_bfloat16(x) else x.dtype)


@jit
def clip_scale_element(square_norm: Array, max_norm: float, y: Array, start: int, stop: int) -> None:
    for i in range(start, stop):
        norm = math.sqrt(square_norm[i]) + 1e-6
        ratio = max_norm / norm
        y[i] = 1.0 if ratio > 1.0 else ratio  # NaN stays NaN


def clip_scale(square_norm: Array, *, max_norm: float) -> Array:
    y = np.empty(square_norm.shape, square_norm.dtype)
    run_rows(clip_scale_element, y.size, *flat(square_norm), float(max_norm), y.reshape(-1))
    return y
