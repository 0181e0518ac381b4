"""Products by the device's library; bias, its gradient and the tanh form of GELU in its epilogue where it has one."""

from __future__ import annotations

from minibert.kernels.activation.gpu import gelu
from minibert.kernels.gpu.launch import Array, contiguous
from minibert.kernels.op import library
from minibert.kernels.reduction.gpu import reduce_sum


@library
def matmul(a: Array, b: Array) -> Array:
    return a.device.gemm(a, b)


@library
def linear(x: Array, weight: Array, bias: Array) -> Array:
    bias = contiguous(bias, weight.shape[:1], "bias")
    return x.device.gemm(x, weight.swapaxes(0, 1), bias=bias, epilogue="bias")


@library
def linear_grad(g: Array, x: Array) -> tuple[Array, Array]:
    if x.itemsize == 4:  # the library has this epilogue for 16 bits for certain; a sum of our own costs one read of g
        return x.device.gemm(g.swapaxes(0, 1), x), reduce_sum(g, axis=0)
    dweight, dbias = x.device.gemm(g.swapaxes(0, 1), x, epilogue="bias_gradient")
    return dweight, dbias


def linear_gelu(x: Array, weight: Array, bias: Array, *, approximate: str = "none") -> tuple[Array, Array]:
    if approximate == "tanh" and x.itemsize == 2:  # in float32, tanhf: the library states no error of its own
        bias = contiguous(bias, weight.shape[:1], "bias")
        return x.device.gemm(x, weight.swapaxes(0, 1), bias=bias, epilogue="gelu")
    before = linear(x, weight, bias)
    return gelu(before, approximate=approximate), before
