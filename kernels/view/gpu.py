"""Copies between strided arrays. The views themselves move nothing: they are formulas."""

from __future__ import annotations

import struct

from minibert.kernels.gpu_launch import Array, CudaFile, Raw, blocks_for

THREADS, DIMENSIONS = 256, 6

cuda = CudaFile(__file__)
COPIES = {size: cuda.kernel(f"copy_{size}", block=THREADS) for size in (1, 2, 4, 8)}  # by bytes of an element


def copy_strided(source: Array, target: Array) -> None:
    """Copy `source` to `target`, of the same shape and element size, whatever their strides."""
    axes = _merged(list(zip(target.shape, source.strides, target.strides, strict=True)))
    if len(axes) > DIMENSIONS:
        for i in range(target.shape[0]):
            copy_strided(source[i], target[i])
        return
    used = max(1, len(axes))  # a single element has none
    filled = [*reversed(axes), *[(1, 0, 0)] * (DIMENSIONS - len(axes))]
    sizes, froms, tos = zip(*filled, strict=True)
    layout = struct.pack(f"<{2 + 3 * DIMENSIONS}q", target.size, used, *sizes, *froms, *tos)
    grid = blocks_for(target.size, THREADS, target.device)
    launch = COPIES[target.itemsize]
    launch(Raw(source.address), Raw(target.address), layout, grid=grid, on=target.device)


def _merged(axes: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Axes that lie one within the other in both arrays, made one; axes of length 1 left out."""
    merged: list[tuple[int, int, int]] = []
    for size, source, target in axes:
        if size == 1:
            continue
        if merged and merged[-1][1:] == (size * source, size * target):
            merged[-1] = (merged[-1][0] * size, source, target)
        else:
            merged.append((size, source, target))
    return merged
