"""mean_pool and normalize with their gradients on a GPU; norm is float32 whatever the arrays are stored in."""

from __future__ import annotations

import numpy as np

from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for, contiguous, int32
from minibert.kernels.pooling import EPS

WARP = 32

cuda = CudaFile(__file__)
mean_pool_tiles = cuda.kernel("mean_pool", block=256)
mean_pool_grad_rows = cuda.kernel("mean_pool_grad", block=256)
normalize_block = cuda.kernel("normalize", block=128)
normalize_grad_block = cuda.kernel("normalize_grad", block=128)


def mean_pool(x: Array, cu_seqlens: Array) -> Array:
    """x (N, C), cu_seqlens (B + 1,) -> (B, C). Raises ValueError where, as far as the host knows, it does not fit x."""
    rows, columns = x.shape
    ends = _ends(cu_seqlens, rows)
    sequences = len(ends) - 1
    y = x.device.empty((sequences, columns), x.dtype)
    grid = blocks_for(sequences * -(-columns // WARP), 1, x.device)
    mean_pool_tiles(contiguous(x), ends, y, sequences, columns, grid=grid)
    return y


def mean_pool_grad(g: Array, cu_seqlens: Array, *, num_rows: int) -> Array:
    """g (B, C) -> (num_rows, C). Raises ValueError likewise."""
    ends, columns = _ends(cu_seqlens, num_rows), g.shape[1]
    sequences = len(ends) - 1
    g = contiguous(g, (sequences, columns), "the gradient of mean_pool")
    dx = g.device.empty((num_rows, columns), g.dtype)
    grid = blocks_for(num_rows, mean_pool_grad_rows.block // WARP, g.device)
    mean_pool_grad_rows(g, ends, dx, sequences, num_rows, columns, grid=grid)
    return dx


def normalize(x: Array, *, eps: float = EPS) -> tuple[Array, Array]:
    """x (N, C) -> y (N, C), norm (N,)."""
    rows, columns = x.shape
    y, norm = x.device.empty(x.shape, x.dtype), x.device.empty((rows,), np.float32)
    normalize_block(contiguous(x), y, norm, rows, columns, eps, grid=blocks_for(rows, 1, x.device))
    return y, norm


def normalize_grad(g: Array, x: Array, norm: Array, *, eps: float = EPS) -> Array:
    """dx (N, C). Raises ValueError where a shape does not fit x."""
    rows, columns = x.shape
    g, norm = contiguous(g, x.shape, "the gradient of normalize"), contiguous(norm, (rows,), "norm")
    dx = x.device.empty(x.shape, x.dtype)
    normalize_grad_block(g, contiguous(x), norm, dx, rows, columns, eps, grid=blocks_for(rows, 1, x.device))
    return dx


def _ends(cu_seqlens: Array, rows: int) -> Array:
    """(B + 1,) int32. Raises ValueError unless, as far as the host knows, it rises from 0 to at most `rows`."""
    known = cu_seqlens.host
    if known is not None and (known[0] != 0 or known[-1] > rows or (np.diff(known) < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to at most {rows} rows, got {known[:8]} of {known.size}")
    return int32(cu_seqlens)
