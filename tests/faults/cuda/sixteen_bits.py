"""Kernels for arrays of 16 bits, right and with one mistake each: sixteen_bits.cu, and how it is launched."""

from collections.abc import Callable
from math import prod
from typing import Any

from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for, contiguous

cuda = CudaFile(__file__, "sixteen_bits.cu")
variance_kernel = cuda.kernel("variance_in_16_bits", block=128)
sums_kernel = cuda.kernel("sums_as_stored", block=128)


def gelu_grad_by(name: str) -> Callable[..., Array]:
    kernel = cuda.kernel(name, block=128)

    def gelu_grad(g: Array, x: Array, *, approximate: str = "none") -> Array:
        dx = x.device.empty(x.shape, x.dtype)
        grid = blocks_for(x.size, 128, x.device)
        kernel(contiguous(g), contiguous(x), dx, x.size, int(approximate == "tanh"), grid=grid)
        return dx

    return gelu_grad


right_gelu_grad = gelu_grad_by("right_gelu_grad")
powers_in_16_bits = gelu_grad_by("powers_in_16_bits")


def variance_in_16_bits(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> tuple[Array, ...]:
    rows, columns = x.shape
    y, mean, rstd = x.device.empty(x.shape, x.dtype), *(x.device.empty((rows,), "float32") for _ in range(2))
    arrays = map(contiguous, (x, weight, bias))
    variance_kernel(*arrays, y, mean, rstd, rows, columns, float(eps), grid=blocks_for(rows, 1, x.device))
    return y, mean, rstd


def relu_by(name: str) -> Callable[[Array], Array]:
    kernel = cuda.kernel(name, block=128)

    def relu(x: Array) -> Array:
        y = x.device.empty(x.shape, x.dtype)
        kernel(contiguous(x), y, x.size, grid=blocks_for(x.size, 128, x.device))
        return y

    return relu


float_for_storage = relu_by("float_for_storage")
pairs_alone = relu_by("pairs_alone")


def sums_as_stored(x: Array, *, axis: Any = None) -> Array:
    """reduce_sum: axes that are summed go to the front."""
    axes = range(x.ndim) if axis is None else [a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)]
    kept = [a for a in range(x.ndim) if a not in axes]
    y = x.device.empty(tuple(x.shape[a] for a in kept), x.dtype)
    moved = contiguous(x.transpose((*axes, *kept)))
    sums_kernel(moved, y, prod(x.shape[a] for a in axes), y.size, grid=blocks_for(y.size, 128, x.device))
    return y
