"""The optimiser's ops, made otherwise than the formula."""

import math

import numpy as np
from numba import njit


@njit
def _lerp(p, g, m, v, s, lr, step, beta1, beta2, eps, decay):
    one = p.dtype.type(1)
    b1, b2 = p.dtype.type(1 - beta1), p.dtype.type(1 - beta2)
    size, root = p.dtype.type(lr / (1 - beta1**step)), p.dtype.type(math.sqrt(1 - beta2**step))
    for i in range(p.size):
        x = g[i] * s
        m[i] += b1 * (x - m[i])
        v[i] += b2 * (x * x - v[i])
        p[i] *= one - p.dtype.type(lr * decay)
        p[i] -= size * (m[i] / (math.sqrt(v[i]) / root + p.dtype.type(eps)))


def _flat(*arrays):
    return [np.ascontiguousarray(a).reshape(-1) for a in arrays]


def _numbers(lr, step, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    return lr, step, beta1, beta2, eps, weight_decay


def lerp(param, grad, exp_avg, exp_avg_sq, grad_scale, **numbers):
    """m += (1 - b1)(g - m), and so for v; the update as lr (m / denominator); in float32."""
    p, m, v = _flat(param, exp_avg, exp_avg_sq)
    _lerp(p, *_flat(grad), m, v, grad_scale.item(), *_numbers(**numbers))
    for array, new in ((param, p), (exp_avg, m), (exp_avg_sq, v)):
        array[...] = new.reshape(array.shape)


def folded(param, grad, exp_avg, exp_avg_sq, grad_scale, **numbers):
    """Both corrections of the bias in the step size, as Kingma and Ba (2015), section 2, have it."""
    lr, step, beta1, beta2, eps, decay = _numbers(**numbers)
    kind = param.dtype.type
    g = grad * grad_scale
    exp_avg[...] = kind(beta1) * exp_avg + kind(1 - beta1) * g
    exp_avg_sq[...] = kind(beta2) * exp_avg_sq + kind(1 - beta2) * g * g
    root = math.sqrt(1 - beta2**step)
    update = kind(lr * root / (1 - beta1**step)) * exp_avg / (np.sqrt(exp_avg_sq) + kind(eps * root))
    param -= kind(lr * decay) * param + update


def wide(param, grad, exp_avg, exp_avg_sq, grad_scale, **numbers):
    """float64 inside, sqrt v as v rsqrt v."""
    lr, step, beta1, beta2, eps, decay = _numbers(**numbers)
    p, g, m, v = (np.float64(a) for a in (param, grad * np.float64(grad_scale), exp_avg, exp_avg_sq))
    m, v = m + (1 - beta1) * (g - m), v + (1 - beta2) * (g * g - v)
    with np.errstate(divide="ignore"):
        root = np.where(v == 0, 0.0, v * (1 / np.sqrt(v)))
    param[...] = p - lr * (decay * p + m / (1 - beta1**step) / (root / math.sqrt(1 - beta2**step) + eps))
    exp_avg[...], exp_avg_sq[...] = m, v


def shadow_by_chunks(shadow, param, grad, exp_avg, exp_avg_sq, grad_scale, **numbers):
    """1000 parameters at a time, the shadow copied from the new ones."""
    for i in range(0, len(param), 1000):
        some = slice(i, i + 1000)
        folded(param[some], grad[some], exp_avg[some], exp_avg_sq[some], grad_scale, **numbers)
        shadow[some] = param[some]


def clip_by_branch(square_norm, *, max_norm):
    """A branch instead of a minimum, in float64."""
    norm = np.sqrt(np.float64(square_norm)) + 1e-6
    return np.array(1.0 if norm <= max_norm else max_norm / norm, square_norm.dtype)
