"""softmax and its gradient on a GPU: which kernel of gpu.cu takes rows of which length."""

from __future__ import annotations

from minibert.kernels.gpu.launch import Array, CudaFile, CudaKernel, blocks_for, contiguous

cuda = CudaFile(__file__)
softmax_short = cuda.kernel("softmax_short", block=256)
softmax_warp = cuda.kernel("softmax_warp", block=256)
softmax_block = cuda.kernel("softmax_block", block=256)
softmax_grad_short = cuda.kernel("softmax_grad_short", block=128)
softmax_grad_warp = cuda.kernel("softmax_grad_warp", block=128)
softmax_grad_block = cuda.kernel("softmax_grad_block", block=256)

WARP = 32
SHORT_ROWS = 4  # that a warp takes at once where a row is a pack (16 bytes) per lane or less
WARP_COLUMNS = 1024  # the longest row that a warp holds in registers


def _by_rows(short: CudaKernel, warp: CudaKernel, block: CudaKernel, *arrays: Array) -> None:
    """Launch the kernel for rows of this length; all arrays have one shape."""
    like = arrays[0]
    columns = like.shape[-1]
    rows = like.size // max(1, columns)
    if columns * like.itemsize <= WARP * 16:
        kernel, rows_of_a_block = short, short.block // WARP * SHORT_ROWS
    elif columns <= WARP_COLUMNS:
        kernel, rows_of_a_block = warp, warp.block // WARP
    else:
        kernel, rows_of_a_block = block, 1
    kernel(*arrays, rows, columns, grid=blocks_for(rows, rows_of_a_block, like.device))


def softmax(x: Array) -> Array:
    """exp(x - max x) / sum exp(x - max x) along the last axis: any shape, to the same shape."""
    x = contiguous(x)
    y = x.device.empty(x.shape, x.dtype)
    _by_rows(softmax_short, softmax_warp, softmax_block, x, y)
    return y


def softmax_grad(g: Array, y: Array) -> Array:
    """y (g - sum g y) along the last axis. Raises ValueError where the shapes of g and y differ."""
    y = contiguous(y)
    g = contiguous(g, y.shape, "the gradient of softmax")
    dx = y.device.empty(y.shape, y.dtype)
    _by_rows(softmax_grad_short, softmax_grad_warp, softmax_grad_block, g, y, dx)
    return dx
