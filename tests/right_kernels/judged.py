"""Kernels that people write and take for right, and that a check refuses: test_right_kernels.py says why."""

import numpy as np


def three_tf32(a, b):
    """3xTF32: operands in two pieces of 11 bits, and three of their four products (CUTLASS, example 27)."""
    if a.dtype != np.float32:
        return a @ b

    def pieces(x):
        high = np.float32(_tf32(x))
        return high, _tf32(x - high)

    (a1, a2), (b1, b2) = pieces(a), pieces(b)
    return (a1 @ b2 + a2 @ b1) + a1 @ b1


def _tf32(x):
    """float32 rounded to 11 bits: nearest, ties away from 0, as cvt.rna.tf32.f32 does."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def strassen(a, b):
    """Strassen's seven products (1969), one level deep; odd sizes are filled with zeros."""

    def quarters(m):
        fill = [(0, 0)] * (m.ndim - 2) + [(0, m.shape[-2] % 2), (0, m.shape[-1] % 2)]
        m = np.pad(m, fill)
        i, j = m.shape[-2] // 2, m.shape[-1] // 2
        return m[..., :i, :j], m[..., :i, j:], m[..., i:, :j], m[..., i:, j:]

    (a11, a12, a21, a22), (b11, b12, b21, b22) = quarters(a), quarters(b)
    m1, m2, m3 = (a11 + a22) @ (b11 + b22), (a21 + a22) @ b11, a11 @ (b12 - b22)
    m4, m5 = a22 @ (b21 - b11), (a11 + a12) @ b22
    m6, m7 = (a21 - a11) @ (b11 + b12), (a12 - a22) @ (b21 + b22)
    upper = np.concatenate([m1 + m4 - m5 + m7, m3 + m5], axis=-1)
    lower = np.concatenate([m2 + m4, m1 - m2 + m3 + m6], axis=-1)
    return np.ascontiguousarray(np.concatenate([upper, lower], axis=-2)[..., : a.shape[-2], : b.shape[-1]])


def scatter_one_hot(x, index, *, num_rows, skip=None):
    """A product with a matrix of 0 and 1."""
    hot = (index == np.arange(num_rows)[:, None]) & (index != (-1 if skip is None else skip))
    return hot.astype(x.dtype) @ x
