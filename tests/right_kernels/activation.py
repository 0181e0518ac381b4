"""Activations and their gradients, made otherwise than the formula."""

import math

import numpy as np
from numba import njit
from scipy import special


def gelu_by_erfc(x, approximate="none"):
    """x erfc(-x / sqrt 2) / 2; and x / (1 + exp(-2 u)), since (1 + tanh u) / 2 is the logistic function of 2 u."""
    kind = x.dtype.type
    if approximate == "tanh":
        u = kind(math.sqrt(2 / math.pi)) * (x + kind(0.044715) * x * x * x)
        return x / (1 + np.exp(-2 * u))
    return kind(0.5) * x * special.erfc(-x * kind(math.sqrt(0.5)))


@njit
def _gelu(x, y, approximate):
    for i in range(x.size):
        v = np.float64(x[i])
        if approximate:
            e = math.expm1(-2 * abs(math.sqrt(2 / math.pi) * v * (1 + 0.044715 * v * v)))
            t = math.copysign(-e / (e + 2), v)
            y[i] = 0.5 * v * (1 + t)
        else:
            y[i] = 0.5 * v + 0.5 * v * math.erf(v * math.sqrt(0.5))


def gelu_wide(x, approximate="none"):
    """float64 inside: x / 2 + x erf / 2, and tanh by expm1."""
    y = np.empty(x.shape, x.dtype)
    _gelu(np.ascontiguousarray(x).reshape(-1), y.reshape(-1), approximate == "tanh")
    return y


def gelu_grad_by_erfc(g, x, approximate="none"):
    """g Phi + g x phi, Phi by erfc; the approximation by the logistic function s of 2 u: s + 2 x s (1 - s) u'."""
    kind = x.dtype.type
    if approximate == "tanh":
        root = kind(math.sqrt(2 / math.pi))
        s = 1 / (1 + np.exp(-2 * root * (x + kind(0.044715) * x * x * x)))
        return g * (s + 2 * x * s * (1 - s) * (root * (1 + kind(3 * 0.044715) * x * x)))
    density = kind(math.sqrt(0.5 / math.pi)) * np.exp(x * x * kind(-0.5))
    return g * (kind(0.5) * special.erfc(-x * kind(math.sqrt(0.5)))) + g * (x * density)


def relu_where(x):
    """Zero where x < 0: what is not a number stays so."""
    return np.where(x < 0, x.dtype.type(0), x)


@njit
def _relu_grad(g, x, dx):
    for i in range(x.size):
        dx[i] = 0
        if x[i] > 0:
            dx[i] = g[i]


def relu_grad_branch(g, x):
    """A branch for each element."""
    dx = np.empty(x.shape, x.dtype)
    _relu_grad(np.ascontiguousarray(g).reshape(-1), np.ascontiguousarray(x).reshape(-1), dx.reshape(-1))
    return dx


def tanh_by_expm1(x):
    """-e / (e + 2), e = expm1(-2 |x|), with the sign of x."""
    e = np.expm1(-2 * np.abs(x))
    return np.copysign(e / (e + 2), x)


def tanh_by_sinh(x):
    """sinh x / cosh x; from 20 on it is 1 to the last bit, and both would overflow."""
    z = np.clip(x, -20, 20)
    return np.sinh(z) / np.cosh(z)


def tanh_grad_factored(g, y):
    """g (1 - y) (1 + y), which does not cancel."""
    return g * (1 - y) * (1 + y)


def tanh_grad_distributed(g, y):
    """g - g y y."""
    return g - g * y * y


def relu_halved(x):
    """(x + |x|) / 2."""
    return (x + np.abs(x)) * x.dtype.type(0.5)
