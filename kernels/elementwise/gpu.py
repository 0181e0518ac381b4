"""add, mul, scale, where on CUDA: one pass over the elements each, operands that broadcast read where they lie."""

from __future__ import annotations

from math import prod

import numpy as np

from minibert.kernels.gpu.launch import Array, CudaFile, CudaKernel, blocks_for, contiguous

BLOCK = 256
WARP = 32
BYTES = 32  # of each array that a thread moves in one turn of its loop: PACKS packs of 16
AXES = 3  # that the kernels know: outer, middle, inner

cuda = CudaFile(__file__)
scale_each = cuda.kernel("scale", block=BLOCK)
add_number = cuda.kernel("add_number", block=BLOCK)
mul_number = cuda.kernel("mul_number", block=BLOCK)
add_arrays = cuda.kernel("add", block=BLOCK)
mul_arrays = cuda.kernel("mul", block=BLOCK)
where_arrays = cuda.kernel("where", block=BLOCK)


def add(a: Array, b: Array) -> Array:
    return _both(add_arrays, add_number, a, b)


def mul(a: Array, b: Array) -> Array:
    return _both(mul_arrays, mul_number, a, b)


def scale(a: Array, *, factor: float) -> Array:
    a = contiguous(a)
    y = a.device.empty(a.shape, a.dtype)
    scale_each(a, y, a.size, float(factor), grid=_turns(a))
    return y


def where(condition: Array, a: Array, b: Array) -> Array:
    y = a.device.empty(np.broadcast_shapes(condition.shape, a.shape, b.shape), a.dtype)
    _broadcast(where_arrays, y, condition, a, b)
    return y


def _both(kernel: CudaKernel, number_kernel: CudaKernel, a: Array, b: Array) -> Array:
    """A commutative op. The result is stored as the operands are; a float32 number goes with any array."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    if _is_number(a) and not (_is_number(b) and a.dtype == b.dtype):
        a, b = b, a
    y = a.device.empty(shape, a.dtype)
    if _is_number(b):
        a = contiguous(a)
        number_kernel(a, contiguous(b), y, a.size, grid=_turns(a))
    else:
        _broadcast(kernel, y, a, b)
    return y


def _is_number(x: Array) -> bool:
    return x.size == 1 and x.dtype == np.float32


def _turns(x: Array) -> int:
    return blocks_for(x.size, BLOCK * BYTES // x.itemsize, x.device)


def _broadcast(kernel: CudaKernel, y: Array, *operands: Array) -> None:
    """y = kernel(*operands), which broadcast to the shape of y; axes that all of them walk alike are taken as one."""
    operands = tuple(contiguous(x) for x in operands)
    extents, steps = _merged(y.shape, [x.broadcast_to(y.shape).strides for x in operands])
    if len(extents) > AXES:  # operands repeated along axes in turn: the outermost of them goes one by one
        parts = [
            x.reshape([n if step else 1 for n, step in zip(extents, along, strict=True)])
            for x, along in zip(operands, steps, strict=True)
        ]
        for i, y_part in enumerate(y.reshape(extents)[i] for i in range(extents[0])):
            _broadcast(kernel, y_part, *(x[i if x.shape[0] > 1 else 0] for x in parts))
        return
    missing = AXES - len(extents)
    chunks = prod(extents[:-1]) * -(-extents[-1] // (WARP * BYTES // y.itemsize)) if extents else 1
    kernel(
        *operands, y, *[1] * missing, *extents, *(step for along in steps for step in [0] * missing + along),
        grid=blocks_for(chunks, BLOCK // WARP, y.device),
    )  # fmt: skip


def _merged(shape: tuple[int, ...], strides: list[tuple[int, ...]]) -> tuple[list[int], list[list[int]]]:
    """`shape` without axes of length one, neighbours joined where every operand steps on evenly; each one's steps."""
    extents: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for axis in reversed(range(len(shape))):
        if shape[axis] == 1:
            continue
        here = [along[axis] for along in strides]
        if extents and all(step == done[0] * extents[0] for step, done in zip(here, steps, strict=True)):
            extents[0] *= shape[axis]
            continue
        extents.insert(0, shape[axis])
        for done, step in zip(steps, here, strict=True):
            done.insert(0, step)
    return extents, steps
