"""layer_norm and add_layer_norm with their gradients on a GPU: which kernel of gpu.cu takes rows of which length.

mean and rstd, and the partial sums of the gradients of weight and bias, are float32 whatever the arrays are stored in.
"""

from __future__ import annotations

from typing import Any

from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for, contiguous, cuda_stream
from minibert.kernels.philox import NO_STREAM, Stream, threshold

cuda = CudaFile(__file__)
layer_norm_warp = cuda.kernel("layer_norm_warp", block=128)
add_layer_norm_warp = cuda.kernel("add_layer_norm_warp", block=128)
layer_norm_block = cuda.kernel("layer_norm_block", block=256)
layer_norm_grad_columns = cuda.kernel("layer_norm_grad_columns", block=128)
layer_norm_grad_long = cuda.kernel("layer_norm_grad_long", block=256)
layer_norm_sum_chunks = cuda.kernel("layer_norm_sum_chunks", block=1024)

WARP = 32
REGISTER_COLUMNS = 1024  # the longest row that is held in registers
CHUNK_ROWS = 16  # whose gradients of weight and bias one block adds up: at least these
MOST_CHUNKS = 1024  # more rows make longer chunks


def _dropout(rate: float, stream: Stream) -> tuple[int, float, bytes]:
    """The word below which an element is dropped (0: none is), the factor of those kept, and the stream."""
    return threshold(rate), 1 / (1 - rate), cuda_stream(stream)


def layer_norm(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> tuple[Array, ...]:
    """x (N, C), weight and bias (C,) -> y (N, C), mean and rstd (N,). Raises ValueError for other shapes."""
    rows, columns = x.shape
    x, weight, bias = contiguous(x), contiguous(weight, (columns,), "weight"), contiguous(bias, (columns,), "bias")
    y, mean, rstd = _outputs(x)
    if columns <= REGISTER_COLUMNS:
        grid = blocks_for(rows, layer_norm_warp.block // WARP, x.device)
        layer_norm_warp(x, weight, bias, y, mean, rstd, rows, columns, eps, grid=grid)
    else:
        grid = blocks_for(rows, 1, x.device)
        nothing = _dropout(0.0, NO_STREAM)
        layer_norm_block(x, None, weight, bias, y, None, mean, rstd, rows, columns, eps, *nothing, grid=grid)
    return y, mean, rstd


def add_layer_norm(
    x: Array, residual: Array, weight: Array, bias: Array,
    *, eps: float = 1e-12, rate: float = 0.0, stream: Stream = NO_STREAM,
) -> tuple[Array, ...]:  # fmt: skip
    """x and residual (N, C), weight and bias (C,) -> y and z (N, C), mean and rstd (N,). Raises ValueError likewise."""
    rows, columns = x.shape
    x, residual = contiguous(x), contiguous(residual, x.shape, "residual")
    weight, bias = contiguous(weight, (columns,), "weight"), contiguous(bias, (columns,), "bias")
    y, mean, rstd = _outputs(x)
    z = x.device.empty(x.shape, x.dtype)
    if columns <= REGISTER_COLUMNS:
        kernel, rows_of_a_block = add_layer_norm_warp, add_layer_norm_warp.block // WARP
    else:
        kernel, rows_of_a_block = layer_norm_block, 1
    kernel(
        x, residual, weight, bias, y, z, mean, rstd, rows, columns, eps, *_dropout(rate, stream),
        grid=blocks_for(rows, rows_of_a_block, x.device),
    )  # fmt: skip
    return y, z, mean, rstd


def layer_norm_grad(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, ...]:
    """dx (N, C), dweight and dbias (C,). Raises ValueError where a shape does not fit x."""
    dx, _, dweight, dbias = _gradients(g, x, weight, mean, rstd, 0.0, NO_STREAM)
    return dx, dweight, dbias


def add_layer_norm_grad(
    g: Array, z: Array, weight: Array, mean: Array, rstd: Array, *, rate: float = 0.0, stream: Stream = NO_STREAM
) -> tuple[Array, ...]:
    """dx and dresidual (N, C), dweight and dbias (C,); at rate 0 the first two are one array. Raises likewise."""
    dz, dx, dweight, dbias = _gradients(g, z, weight, mean, rstd, rate, stream)
    return dx, dz, dweight, dbias


def _outputs(x: Array) -> tuple[Array, Array, Array]:
    """y, mean and rstd of `x`, not yet written."""
    empty = x.device.empty
    return empty(x.shape, x.dtype), empty(x.shape[:1], "float32"), empty(x.shape[:1], "float32")


def _gradients(g: Array, z: Array, weight: Array, mean: Array, rstd: Array, rate: float, stream: Stream) -> Any:
    """dz, dx = dropout(dz), dweight, dbias. How rows are cut into chunks depends on their number alone."""
    rows, columns = z.shape
    z, g, weight = contiguous(z), contiguous(g, z.shape, "the gradient"), contiguous(weight, (columns,), "weight")
    mean, rstd = contiguous(mean, (rows,), "mean"), contiguous(rstd, (rows,), "rstd")
    device = z.device
    dz = device.empty(z.shape, z.dtype)
    dx = device.empty(z.shape, z.dtype) if rate else dz
    dweight, dbias = device.empty((columns,), weight.dtype), device.empty((columns,), weight.dtype)

    chunk_rows = max(CHUNK_ROWS, -(-rows // MOST_CHUNKS))
    chunks = -(-rows // chunk_rows)
    sums = device.empty((chunks, 2, columns), "float32")
    kernel = layer_norm_grad_columns if columns <= REGISTER_COLUMNS else layer_norm_grad_long
    kernel(
        g, z, weight, mean, rstd, dz, dx if rate else None, sums, rows, columns, chunk_rows, *_dropout(rate, stream),
        grid=blocks_for(chunks, 1, device),
    )  # fmt: skip
    layer_norm_sum_chunks(sums, dweight, dbias, chunks, columns, grid=blocks_for(2 * columns, WARP, device))
    return dz, dx, dweight, dbias
