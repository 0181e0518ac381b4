"""gelu, relu, tanh and their gradients on CUDA: one pass over the elements each."""

from __future__ import annotations

from minibert.kernels.gpu.launch import Array, CudaFile, CudaKernel, blocks_for, contiguous

BLOCK = 256
BYTES = 32  # of each array that a thread moves in one turn of its loop: PACKS packs of 16

cuda = CudaFile(__file__)
gelu_erf = cuda.kernel("gelu_erf", block=BLOCK)
gelu_tanh = cuda.kernel("gelu_tanh", block=BLOCK)
relu_of = cuda.kernel("relu", block=BLOCK)
tanh_of = cuda.kernel("tanh_of", block=BLOCK)
gelu_erf_grad = cuda.kernel("gelu_erf_grad", block=BLOCK)
gelu_tanh_grad = cuda.kernel("gelu_tanh_grad", block=BLOCK)
relu_gradient = cuda.kernel("relu_grad", block=BLOCK)
tanh_gradient = cuda.kernel("tanh_grad", block=BLOCK)


def _each(kernel: CudaKernel, *arrays: Array) -> Array:
    """One output element for the elements at each place of `arrays`. Raises ValueError unless their shapes agree."""
    arrays = tuple(contiguous(x, arrays[0].shape) for x in arrays)
    x = arrays[0]
    y = x.device.empty(x.shape, x.dtype)
    kernel(*arrays, y, x.size, grid=blocks_for(x.size, BLOCK * BYTES // x.itemsize, x.device))
    return y


def gelu(x: Array, *, approximate: str = "none") -> Array:
    return _each(gelu_tanh if approximate == "tanh" else gelu_erf, x)


def gelu_grad(g: Array, x: Array, *, approximate: str = "none") -> Array:
    return _each(gelu_tanh_grad if approximate == "tanh" else gelu_erf_grad, g, x)


def relu(x: Array) -> Array:
    return _each(relu_of, x)


def relu_grad(g: Array, x: Array) -> Array:
    return _each(relu_gradient, g, x)


def tanh(x: Array) -> Array:
    return _each(tanh_of, x)


def tanh_grad(g: Array, y: Array) -> Array:
    return _each(tanh_gradient, g, y)
