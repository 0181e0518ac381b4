"""gelu, relu and their gradients, and that of tanh: one loop over the elements each; tanh by NumPy's."""

from __future__ import annotations

from math import pi, sqrt

import numpy as np

from minibert.kernels.activation import CUBIC, SQRT_2_OVER_PI
from minibert.kernels.cpu.arrays import flat
from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.math import erf, exp, vmax
from minibert.kernels.cpu.math import tanh as tanh_of
from minibert.kernels.cpu.threads import rows_worth_a_thread, run_rows
from minibert.kernels.op import Array, library

LIGHT, HEAVY = rows_worth_a_thread(1, cost=0.1), rows_worth_a_thread(1, cost=0.5)  # elements, without and with erf


@jit
def gelu_erf_loop(x: Array, y: Array, start: int, stop: int) -> None:
    x, y = x[start:stop], y[start:stop]
    half, one, root = x.dtype.type(0.5), x.dtype.type(1), x.dtype.type(sqrt(0.5))
    for i in range(x.size):
        y[i] = x[i] * half * (one + erf(x[i] * root))


@jit
def gelu_tanh_loop(x: Array, y: Array, start: int, stop: int) -> None:
    x, y = x[start:stop], y[start:stop]
    half, one = x.dtype.type(0.5), x.dtype.type(1)
    slope, cubic = x.dtype.type(SQRT_2_OVER_PI), x.dtype.type(CUBIC)
    for i in range(x.size):
        v = x[i]
        y[i] = v * half * (one + tanh_of(slope * (v + cubic * v * v * v)))


def gelu(x: Array, *, approximate: str = "none") -> Array:
    y = np.empty(x.shape, x.dtype)
    (vector,) = flat(x)
    run_rows(gelu_tanh_loop if approximate == "tanh" else gelu_erf_loop, x.size, vector, y.reshape(-1), grain=HEAVY)
    return y


@jit
def gelu_erf_grad_loop(g: Array, x: Array, dx: Array, start: int, stop: int) -> None:
    g, x, dx = g[start:stop], x[start:stop], dx[start:stop]
    half, one, root = x.dtype.type(0.5), x.dtype.type(1), x.dtype.type(sqrt(0.5))
    density = x.dtype.type(sqrt(0.5 / pi))
    for i in range(x.size):
        v = x[i]
        dx[i] = g[i] * (half * (one + erf(v * root)) + v * density * exp(-half * v * v))


@jit
def gelu_tanh_grad_loop(g: Array, x: Array, dx: Array, start: int, stop: int) -> None:
    g, x, dx = g[start:stop], x[start:stop], dx[start:stop]
    half, one = x.dtype.type(0.5), x.dtype.type(1)
    slope, cubic, cubic3 = x.dtype.type(SQRT_2_OVER_PI), x.dtype.type(CUBIC), x.dtype.type(3 * CUBIC)
    far = x.dtype.type(20)
    for i in range(x.size):
        v = x[i]
        t = tanh_of(slope * (v + cubic * v * v * v))
        near = vmax(-far, -vmax(-far, -v))  # beyond it 1 - t t is 0, and a product of powers of v would overflow
        dx[i] = g[i] * half * ((one + t) + near * (one - t * t) * slope * (one + cubic3 * near * near))


def gelu_grad(g: Array, x: Array, *, approximate: str = "none") -> Array:
    dx = np.empty(x.shape, x.dtype)
    loop = gelu_tanh_grad_loop if approximate == "tanh" else gelu_erf_grad_loop
    run_rows(loop, x.size, *flat(g, x), dx.reshape(-1), grain=HEAVY)
    return dx


@jit
def relu_loop(x: Array, y: Array, start: int, stop: int) -> None:
    x, y = x[start:stop], y[start:stop]
    zero = x.dtype.type(0)
    for i in range(x.size):
        y[i] = vmax(x[i], zero)


def relu(x: Array) -> Array:
    y = np.empty(x.shape, x.dtype)
    (vector,) = flat(x)
    run_rows(relu_loop, x.size, vector, y.reshape(-1), grain=LIGHT)
    return y


@jit
def relu_grad_loop(g: Array, x: Array, dx: Array, start: int, stop: int) -> None:
    g, x, dx = g[start:stop], x[start:stop], dx[start:stop]
    zero = g.dtype.type(0)
    for i in range(x.size):
        gradient = g[i]  # read first, so that the choice is a blend
        dx[i] = gradient if x[i] > zero else zero


def relu_grad(g: Array, x: Array) -> Array:
    dx = np.empty(x.shape, g.dtype)
    run_rows(relu_grad_loop, x.size, *flat(g, x), dx.reshape(-1), grain=LIGHT)
    return dx


@library
def tanh(x: Array) -> Array:
    return np.tanh(x)  # its vector loop is faster than one by `tanh_of`


@jit
def tanh_grad_loop(g: Array, y: Array, dx: Array, start: int, stop: int) -> None:
    g, y, dx = g[start:stop], y[start:stop], dx[start:stop]
    one = y.dtype.type(1)
    for i in range(y.size):
        dx[i] = g[i] * (one - y[i] * y[i])


def tanh_grad(g: Array, y: Array) -> Array:
    dx = np.empty(y.shape, y.dtype)
    run_rows(tanh_grad_loop, y.size, *flat(g, y), dx.reshape(-1), grain=LIGHT)
    return dx
