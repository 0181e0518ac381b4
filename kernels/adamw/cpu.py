"""adamw: one pass over the flat arrays, in place; square_norm: blocks summed in float64."""

from __future__ import annotations

import math

import numpy as np

from minibert.kernels.cpu_arrays import flat
from minibert.kernels.cpu_threads import blocks, jit, rows_worth_a_thread, run_rows
from minibert.kernels.op import Array

BLOCK = 1 << 14  # elements of one partial sum
LIGHT = rows_worth_a_thread(1, cost=0.4)  # elements


@jit
def adamw_loop(  # type: ignore[no-untyped-def]
    param, grad, exp_avg, exp_avg_sq, scale, beta1, rest1, beta2, rest2, root, eps, rate, decay, start, stop
):
    p, g, m, v = param[start:stop], grad[start:stop], exp_avg[start:stop], exp_avg_sq[start:stop]
    for i in range(p.size):
        gradient = g[i] * scale
        first = m[i] * beta1 + gradient * rest1
        second = v[i] * beta2 + gradient * gradient * rest2
        m[i], v[i] = first, second
        p[i] = p[i] * decay - first * rate / (math.sqrt(second) / root + eps)


def adamw(
    param: Array, grad: Array, exp_avg: Array, exp_avg_sq: Array, grad_scale: Array,
    *, lr: float, step: int, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01,
) -> tuple[Array, Array, Array]:  # fmt: skip
    arrays = (param, grad, exp_avg, exp_avg_sq)
    vectors = flat(*arrays)
    numbers = (
        float(grad_scale), beta1, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** 0.5, eps,
        lr / (1 - beta1**step), 1 - lr * weight_decay,
    )  # fmt: skip
    run_rows(adamw_loop, param.size, *vectors, *map(param.dtype.type, numbers), grain=LIGHT)
    for array, vector in zip(arrays, vectors, strict=True):
        if array is not grad and not np.shares_memory(array, vector, max_work=1):  # strided: a copy was updated
            array[...] = vector.reshape(array.shape)
    return param, exp_avg, exp_avg_sq


@jit
def square_norm_blocks(x, partial, start, stop):  # type: ignore[no-untyped-def]
    for block in range(start, stop):
        part = x[block * BLOCK : (block + 1) * BLOCK]
        total = 0.0
        for i in range(part.size):
            total += np.float64(part[i]) * np.float64(part[i])
        partial[block] = total


def square_norm(x: Array) -> Array:
    (vector,) = flat(x)
    partial = np.empty(blocks(x.size, BLOCK), np.float64)
    run_rows(square_norm_blocks, len(partial), vector, partial, grain=rows_worth_a_thread(BLOCK, cost=0.03))
    return np.asarray(partial.sum(), x.dtype)
