"""Kernels in CUDA C: what is allocated, and the launches."""

import numpy as np

from minibert.kernels.gpu.launch import CudaFile, blocks_for, contiguous, int32

cuda = CudaFile(__file__, "device.cu")
softmax_merged = cuda.kernel("softmax_merged", block=128)
layer_norm_merged = cuda.kernel("layer_norm_merged", block=128)
square_norm_compensated = cuda.kernel("square_norm_compensated", block=128)
linear_tile = cuda.kernel("linear_tile", block=256)
scatter_backwards = cuda.kernel("scatter_backwards", block=128)


def softmax(x):
    """Online, a warp for each row."""
    x = contiguous(x)
    y, columns = x.device.empty(x.shape, x.dtype), x.shape[-1]
    rows = x.size // max(1, columns)
    softmax_merged(x, y, rows, columns, grid=blocks_for(rows, 4, x.device))
    return y


def layer_norm(x, weight, bias, eps=1e-12):
    """Welford, a warp for each row."""
    x, weight, bias = (contiguous(a) for a in (x, weight, bias))
    rows, columns = x.shape
    y, mean, rstd = x.device.empty(x.shape, x.dtype), *(x.device.empty((rows,), np.float32) for _ in range(2))
    grid = blocks_for(rows, 4, x.device)
    layer_norm_merged(x, weight, bias, y, mean, rstd, rows, columns, float(eps), grid=grid)
    return y, mean, rstd


def square_norm(x):
    """Compensated, one block."""
    total = x.device.empty((), np.float32)
    square_norm_compensated(contiguous(x), total, x.size, grid=1)
    return total


def linear(x, weight, bias):
    """Tiles of 16 by 16."""
    x, weight, bias = (contiguous(a) for a in (x, weight, bias))
    outs, inputs = weight.shape
    rows = x.size // max(1, inputs)
    y = x.device.empty((*x.shape[:-1], outs), x.dtype)
    tiles = -(-rows // 16) * -(-outs // 16)
    linear_tile(x, weight, bias, y, rows, inputs, outs, grid=blocks_for(tiles, 1, x.device))
    return y


def scatter_rows(x, index, *, num_rows, skip=None):
    """Each element of the table looks for its rows."""
    x, index = contiguous(x), int32(index)
    y = x.device.empty((num_rows, x.shape[1]), x.dtype)
    grid = blocks_for(y.size, 128, x.device)
    scatter_backwards(x, index, y, len(index), x.shape[1], num_rows, -1 if skip is None else skip, grid=grid)
    return y
