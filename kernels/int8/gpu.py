"""quantize_rows, linear_int8 and linear_int8_gelu on a GPU: bits of the formulas, sums by __dp4a."""

from __future__ import annotations

import numpy as np

from minibert.kernels.gpu.launch import Array, CudaFile, CudaKernel, blocks_for, contiguous
from minibert.kernels.int8 import MOST_INPUTS

TILE = 64  # rows, and outputs, of a block

cuda = CudaFile(__file__)
quantize_block = cuda.kernel("quantize_rows", block=128)
linear_tiles = cuda.kernel("linear_int8", block=128)
gelu_erf_tiles = cuda.kernel("linear_int8_gelu_erf", block=128)
gelu_tanh_tiles = cuda.kernel("linear_int8_gelu_tanh", block=128)


def quantize_rows(x: Array) -> tuple[Array, Array, Array]:
    """x (N, in) -> q (N, in) uint8, scale (N, 1) float32, zero_point (N, 1) int32; of a row with a NaN the scale is."""
    rows, columns = x.shape
    q, scale = x.device.empty(x.shape, np.uint8), x.device.empty((rows, 1), np.float32)
    zero_point = x.device.empty((rows, 1), np.int32)
    quantize_block(contiguous(x), q, scale, zero_point, rows, columns, grid=blocks_for(rows, 1, x.device))
    return q, scale, zero_point


def _linear(
    kernel: CudaKernel, q: Array, scale: Array, zero_point: Array, weight: Array, weight_scale: Array, bias: Array
) -> Array:
    """y (N, out) like `bias`. Raises ValueError where a shape does not fit, or rows are too long for sums in int32."""
    (rows, inputs), outs = q.shape, weight.shape[0]
    if inputs > MOST_INPUTS:
        raise ValueError(f"expected rows of at most {MOST_INPUTS} numbers, whose products fit in 32 bits, got {inputs}")
    arrays = (
        contiguous(q),
        contiguous(scale, (rows, 1), "scale"),
        contiguous(zero_point, (rows, 1), "zero_point"),
        contiguous(weight, (outs, inputs), "weight"),
        contiguous(weight_scale, (outs,), "weight_scale"),
        contiguous(bias, (outs,), "bias"),
    )
    y = bias.device.empty((rows, outs), bias.dtype)
    tiles = -(-rows // TILE) * -(-outs // TILE)
    kernel(*arrays, y, rows, outs, inputs, grid=blocks_for(tiles, 1, y.device))
    return y


def linear_int8(
    q: Array, scale: Array, zero_point: Array, weight: Array, weight_scale: Array, bias: Array
) -> Array:  # fmt: skip
    """q (N, in), scale, zero_point (N, 1), weight (out, in), weight_scale, bias (out,) -> y (N, out).

    Raises ValueError where a shape does not fit, or rows are too long for sums in int32.
    """
    return _linear(linear_tiles, q, scale, zero_point, weight, weight_scale, bias)


def linear_int8_gelu(
    q: Array, scale: Array, zero_point: Array, weight: Array, weight_scale: Array, bias: Array, *,
    approximate: str = "none",
) -> Array:  # fmt: skip
    """gelu of what `linear_int8` gives. Raises ValueError likewise."""
    kernel = gelu_tanh_tiles if approximate == "tanh" else gelu_erf_tiles
    return _linear(kernel, q, scale, zero_point, weight, weight_scale, bias)
