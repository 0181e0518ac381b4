"""Copies between strided arrays. The views themselves move nothing: they are formulas."""

from __future__ import annotations

import struct
from math import gcd

from minibert.kernels.gpu.launch import Array, CudaFile, Raw, blocks_for

THREADS, DIMENSIONS = 256, 6

cuda = CudaFile(__file__)
COPIES = {size: cuda.kernel(f"copy_{size}", block=THREADS) for size in (1, 2, 4, 8, 16)}  # by bytes that a thread moves


def copy_strided(source: Array, target: Array) -> None:
    """Copy `source` to `target`, of the same shape and element size, whatever their strides."""
    axes = _merged(list(zip(target.shape, source.strides, target.strides, strict=True)))
    if len(axes) > DIMENSIONS:
        for i in range(target.shape[0]):
            copy_strided(source[i], target[i])
        return
    width = _width(axes, source, target)
    together = width // target.itemsize  # elements that a thread moves
    if together > 1:
        *outer, (inner, _, _) = axes
        axes = [(n, a // together, b // together) for n, a, b in outer] + [(inner // together, 1, 1)]
    used = max(1, len(axes))  # a single element has none
    filled = [*reversed(axes), *[(1, 0, 0)] * (DIMENSIONS - len(axes))]
    sizes, froms, tos = zip(*filled, strict=True)
    layout = struct.pack(f"<{2 + 3 * DIMENSIONS}q", target.size // together, used, *sizes, *froms, *tos)
    grid = blocks_for(target.size // together, THREADS, target.device)
    COPIES[width](Raw(source.address), Raw(target.address), layout, grid=grid, on=target.device)


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


def _width(axes: list[tuple[int, int, int]], source: Array, target: Array) -> int:
    """Bytes that a thread moves at once: an element, or more where both arrays go on in neighbours and are aligned."""
    element = target.itemsize
    if not axes or axes[-1][1:] != (1, 1):
        return element
    steps = [step * element for _, *along in axes[:-1] for step in along]
    return gcd(max(COPIES), source.address, target.address, axes[-1][0] * element, *steps)
