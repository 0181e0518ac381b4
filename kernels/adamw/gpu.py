"""adamw and adamw_shadow: one launch over flat arrays; square_norm: two stages in a fixed order; clip_scale."""

from __future__ import annotations

from typing import Any

import numpy as np

from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for, contiguous

cuda = CudaFile(__file__)
adamw_step = cuda.kernel("adamw_step", block=256)
square_norm_chunks = cuda.kernel("square_norm_chunks", block=256)
square_norm_total = cuda.kernel("square_norm_total", block=1024)
clip_scale_elements = cuda.kernel("clip_scale_elements", block=32)

PACK_BYTES = 16  # a thread of adamw_step takes so many bytes of the gradient at a time
CHUNK = 16384  # elements of one partial sum: fixed, so that the bits do not depend on the device


def adamw(
    param: Array, grad: Array, exp_avg: Array, exp_avg_sq: Array, grad_scale: Array, **numbers: Any
) -> tuple[Array, Array, Array]:
    _step(None, param, grad, exp_avg, exp_avg_sq, grad_scale, **numbers)
    return param, exp_avg, exp_avg_sq


def adamw_shadow(
    shadow: Array, param: Array, grad: Array, exp_avg: Array, exp_avg_sq: Array, grad_scale: Array, **numbers: Any
) -> tuple[Array, Array, Array, Array]:
    _step(shadow, param, grad, exp_avg, exp_avg_sq, grad_scale, **numbers)
    return shadow, param, exp_avg, exp_avg_sq


def _step(
    shadow: Array | None, param: Array, grad: Array, exp_avg: Array, exp_avg_sq: Array, grad_scale: Array,
    *, lr: float, step: int, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01,
) -> None:  # fmt: skip
    def factors(lr: float, step: int) -> np.ndarray:
        """What changes from step to step, in float64, rounded once."""
        values = (lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, 1 - lr * weight_decay)
        return np.array(values, np.float32)

    device = param.device
    now, live = device.live_floats(factors, lr, step)
    arrays = (shadow, param, grad, exp_avg, exp_avg_sq)
    rows = [a if a is None else contiguous(a, param.shape, "the arrays of AdamW") for a in arrays]
    grid = blocks_for(param.size, adamw_step.block * (PACK_BYTES // grad.itemsize), device)
    adamw_step(
        *rows, contiguous(grad_scale, (), "grad_scale"), live, param.size,
        *now, beta1, 1 - beta1, beta2, 1 - beta2, eps, grid=grid,
    )  # fmt: skip
    for array, row in zip(arrays, rows, strict=True):
        if row is not array and array is not grad:  # a strided view: a copy was updated
            array[...] = row


def square_norm(x: Array) -> Array:
    x, device = contiguous(x), x.device
    chunks = -(-x.size // CHUNK)
    partial = device.empty((chunks,), np.float32)
    total = device.empty((), np.float32)
    square_norm_chunks(x, partial, x.size, CHUNK, grid=blocks_for(chunks, 1, device))
    square_norm_total(partial, total, chunks, grid=1)
    return total


def clip_scale(square_norm: Array, *, max_norm: float) -> Array:
    scale = square_norm.device.empty(square_norm.shape, np.float32)
    grid = blocks_for(scale.size, clip_scale_elements.block, square_norm.device)
    clip_scale_elements(contiguous(square_norm), scale, scale.size, float(max_norm), grid=grid)
    return scale
