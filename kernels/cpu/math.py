"""exp, log, erf, tanh, max and Philox for the loops of Numba kernels, written so that those loops vectorise.

Numba's `math.exp` on float32 is a call per element; here it is a polynomial that LLVM turns into vector code. Nothing
is approximated beyond the stated ulp, over all of float32 (tests/kernels/test_cpu_math.py). On float64 they are libm's.
Called from plain Python (`kernel.py_func`) they are `math`'s.

Both sides of a choice are computed, then selected: `a if test else b` on finished values becomes a vector blend.
A Python literal is a float64 to Numba: use `constant(0.5, x)`, or np.float32(...) in float32 code.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from minibert.kernels.cpu.jit import HELPER_OPTIONS, helper, inline
from minibert.kernels.philox import MASK, MULTIPLY_0, MULTIPLY_1, WEYL_0, WEYL_1

F = np.float32
ONE, TWO = F(1), F(2)

# --- exp: x = n ln 2 + r, exp(x) = 2^n exp(r) -------------------------------------------------------------------------

LOG2_E = F(1.44269504)
LN2_HIGH, LN2_LOW = F(0.693145752), F(1.42860677e-6)  # the high part has 15 bits: n * LN2_HIGH is exact
ROUND = F(12582912)  # 1.5 * 2^23: adding it rounds to a whole number and leaves that in the low bits
ROUND_BITS = np.int32(0x4B400000)
EXP_LOWEST, EXP_HIGHEST = F(-104), F(89)  # beyond these it is 0 and infinity
# N. Juffa's minimax polynomial for exp on [-ln 2 / 2, ln 2 / 2]
E6, E5, E4, E3, E2 = F(1.37805939e-3), F(8.37312452e-3), F(4.16695364e-2), F(1.66664720e-1), F(4.99999851e-1)


@intrinsic
def _bits(typingctx: Any, x: Any) -> Any:
    """The bits of a float32 as an int32."""
    return types.int32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _from_bits(typingctx: Any, x: Any) -> Any:
    """The float32 of these 32 bits."""
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


def _exp_float32(x: Any) -> Any:
    clamped = EXP_LOWEST if x < EXP_LOWEST else x  # in this form a NaN stays a NaN
    clamped = EXP_HIGHEST if clamped > EXP_HIGHEST else clamped
    rounded = clamped * LOG2_E + ROUND
    whole = rounded - ROUND
    r = clamped - whole * LN2_HIGH
    r = r - whole * LN2_LOW
    p = E6 * r + E5
    p = p * r + E4
    p = p * r + E3
    p = p * r + E2
    p = p * r + ONE
    p = p * r + ONE
    # 2^n as two factors, each a normal number: subnormal results round once, the largest do not overflow early
    n = np.int32(_bits(rounded) - ROUND_BITS)
    half = np.int32(n >> 1)
    first = _from_bits(np.int32((half + 127) << 23))
    second = _from_bits(np.int32((n - half + 127) << 23))
    return p * first * second


def _exp_float64(x: Any) -> Any:
    return math.exp(x)


# --- log: x = 2^n (1 + m), m from -1/3 to 1/3, log(x) = n ln 2 + log(1 + m) by N. Juffa's polynomial -----------------

LN2 = F(0.693147182)
SUBNORMAL, TWO_TO_23 = np.finfo(F).tiny, F(2**23)
TWO_THIRDS_BITS, EXPONENT_BITS = np.int32(0x3F2AAAAB), np.int32(-0x800000)
L10, L8, L6, L4 = F(-0.130310059), F(-0.121484190), F(-0.166846052), F(-0.249996200)
L9, L7, L5, L3 = F(0.140869141), F(0.139814854), F(0.200120345), F(0.333331972)
HALF, INFINITY, NAN = F(0.5), F(np.inf), F(np.nan)


def _log_float32(x: Any) -> Any:
    normal = x * TWO_TO_23 if x < SUBNORMAL else x
    bits = _bits(normal)
    exponent = np.int32((bits - TWO_THIRDS_BITS) & EXPONENT_BITS)
    m = _from_bits(np.int32(bits - exponent)) - ONE
    n = F(exponent >> 23) - (F(23) if x < SUBNORMAL else F(0))
    s = m * m
    p = L10 * s + L8
    q = L9 * s + L7
    p = p * s + L6
    q = q * s + L5
    p = p * s + L4
    p = q * m + p
    p = p * m + L3
    p = p * m - HALF
    y = n * LN2 + (p * s + m)
    special = INFINITY if x > ONE else (-INFINITY if x == F(0) else NAN)
    return y if (x > F(0)) & (x < INFINITY) else special


def _log_float64(x: Any) -> Any:
    return math.log(x) if x > 0.0 else (-math.inf if x == 0.0 else math.nan)  # where Python's raises


# --- erf: N. Juffa's two polynomials (stackoverflow.com/questions/35148198) -------------------------------------------

ERF_SPLIT = F(0.927734375)
P10, P8, P6 = F(-5.96761703e-4), F(4.99119423e-3), F(-2.67681349e-2)
P4, P2, P0 = F(1.12819925e-1), F(-3.76125336e-1), F(1.28379166e-1)
Q7, Q6, Q5, Q4 = F(-1.72853470e-5), F(3.83197126e-4), F(-3.88396438e-3), F(2.42546219e-2)
Q3, Q2, Q1 = F(-1.06777877e-1), F(-6.34846687e-1), F(-1.28717512e-1)


def _erf_float32(x: Any) -> Any:
    t, s = abs(x), x * x
    p = P10 * s + P8
    p = p * s + P6
    p = p * s + P4
    p = p * s + P2
    p = p * s + P0
    near = p * x + x
    q = (Q7 * t + Q6) * s + (Q5 * t + Q4)
    q = q * t + Q3
    q = q * t + Q2
    q = q * t + Q1
    far = math.copysign(ONE - exp(q * t - t), x)
    return far if t > ERF_SPLIT else near


def _erf_float64(x: Any) -> Any:
    return math.erf(x)


# --- tanh: x + x^3 P(x^2) near 0, else 1 - 2 / (exp(2 |x|) + 1) -------------------------------------------------------

TANH_SPLIT = F(0.6)
# Weighted least squares driven to minimax (Lawson) on [0, 0.6], relative error of tanh 4.6e-9
T8, T6, T4 = F(-5.8951196e-3), F(2.0795941e-2), F(-5.3783823e-2)
T2, T0 = F(1.3331924e-1), F(-3.3333300e-1)


def _tanh_float32(x: Any) -> Any:
    t, s = abs(x), x * x
    p = T8 * s + T6
    p = p * s + T4
    p = p * s + T2
    p = p * s + T0
    near = (p * s) * t + t
    far = ONE - TWO / (exp(t + t) + ONE)
    return math.copysign(far if t > TANH_SPLIT else near, x)


def _tanh_float64(x: Any) -> Any:
    return math.tanh(x)


# --- what kernels call ------------------------------------------------------------------------------------------------


def exp(x: float) -> float:
    """e^x. float32: within 0.87 ulp (1.13 where the processor has no fused multiply-add), subnormal results included;
    0 below -103.97, infinity above 88.72."""
    return math.exp(x)


def log(x: float) -> float:
    """The natural logarithm. float32: within 0.9 ulp (1.25 without fused multiply-add); of 0 it is minus infinity, of
    less NaN."""
    return math.log(x)


def erf(x: float) -> float:
    """The error function. float32: within 2 ulp everywhere."""
    return math.erf(x)


def tanh(x: float) -> float:
    """The hyperbolic tangent. float32: within 2 ulp everywhere."""
    return math.tanh(x)


def vmax(a: float, b: float) -> float:
    """The larger of two floats, NaN if one is; LLVM makes vector maxima of it, which it does not of `max`."""
    return a if a > b or a != a else b


def constant(value: float, x: float) -> float:
    """`value` in the dtype of `x`."""
    return type(x)(value)


@overload(exp, jit_options=HELPER_OPTIONS)
def _exp(x: Any) -> Any:
    return {types.float32: _exp_float32, types.float64: _exp_float64}.get(x)


@overload(log, jit_options=HELPER_OPTIONS)
def _log(x: Any) -> Any:
    return {types.float32: _log_float32, types.float64: _log_float64}.get(x)


@overload(erf, jit_options=HELPER_OPTIONS)
def _erf(x: Any) -> Any:
    return {types.float32: _erf_float32, types.float64: _erf_float64}.get(x)


@overload(tanh, jit_options=HELPER_OPTIONS)
def _tanh(x: Any) -> Any:
    return {types.float32: _tanh_float32, types.float64: _tanh_float64}.get(x)


@intrinsic
def _larger(typingctx: Any, a: Any, b: Any) -> Any:
    """IEEE 754-2019 maximum: unlike a compare that promises "no NaN" it leaves nothing undefined, and is as fast."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        maximum = builder.module.declare_intrinsic("llvm.maximum", [kind], ir.FunctionType(kind, [kind, kind]))
        return builder.call(maximum, args, fastmath=("nsz",))

    return a(a, a), code


@overload(vmax, jit_options=HELPER_OPTIONS, strict=False)
def _vmax(a: Any, b: Any) -> Any:
    return (lambda a, b: _larger(a, b)) if a == b and isinstance(a, types.Float) else None


@overload(constant, jit_options=HELPER_OPTIONS, strict=False)
def _constant(value: Any, x: Any) -> Any:
    dtype = {types.float32: np.float32, types.float64: np.float64}.get(x)
    return (lambda value, x: dtype(value)) if dtype else None


# --- Philox4x32-10 ----------------------------------------------------------------------------------------------------

M0, M1, W0, W1 = np.uint64(MULTIPLY_0), np.uint64(MULTIPLY_1), np.uint64(WEYL_0), np.uint64(WEYL_1)
LOW, SHIFT = np.uint64(MASK), np.uint64(32)
U1, U2, U3, FOUR = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)


@inline
def philox_block(block: Any, layer: Any, step: Any, seed: Any, stream: Any) -> tuple[Any, Any, Any, Any]:
    """The four words of one block. All arguments and results are uint64 that hold 32-bit words: 32 x 32 -> 64 bits
    is one vector instruction (vpmuludq) in that form."""
    c0, c1, c2, c3 = block & LOW, layer & LOW, step & LOW, np.uint64(0)
    k0, k1 = seed & LOW, stream & LOW
    for _ in range(10):
        p0, p1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = (p1 >> SHIFT) ^ c1 ^ k0, p1 & LOW, (p0 >> SHIFT) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return c0, c1, c2, c3


@helper
def _part_of_block(words: Any, skip: Any, block: Any, layer: Any, step: Any, seed: Any, stream: Any) -> None:
    four = philox_block(block, layer, step, seed, stream)
    for j in range(words.size):
        words[j] = np.uint32(four[skip + j])


@helper
def philox_row(
    words: Any, first: Any, count: Any, seed: Any, stream: Any, step: Any, layer: Any, block: Any = 0
) -> None:  # fmt: skip
    """words[:count] = elements first .. first + count of a stream that begins with `block`, in vector code.

    `words` is a contiguous uint32 scratch of `count` words or more; `first` need not be a multiple of 4. The same
    words as `minibert.kernels.philox.random_words(Stream(seed, stream, step, layer), count, start=first)`.
    The vector loop takes 64 blocks at once with AVX-512: ask for 256 words or more where that can be arranged.
    """
    seed, stream, step, layer = np.uint64(seed), np.uint64(stream), np.uint64(step), np.uint64(layer)
    first, count = np.int64(first) + 4 * np.int64(block), np.int64(count)
    head = min(-first % 4, count)  # words of a block begun before
    whole = (count - head) // 4
    tail = head + 4 * whole
    if head > 0:
        _part_of_block(words[:head], first % 4, np.uint64(first // 4), layer, step, seed, stream)
    begin = np.uint64((first + head) // 4)
    body = words[head:tail]
    for i in range(np.uint64(whole)):  # unsigned indices: Numba adds no test for negative ones
        a, b, c, d = philox_block(begin + i, layer, step, seed, stream)
        j = FOUR * i
        body[j], body[j + U1], body[j + U2], body[j + U3] = np.uint32(a), np.uint32(b), np.uint32(c), np.uint32(d)
    if tail < count:
        _part_of_block(words[tail:count], 0, begin + np.uint64(whole), layer, step, seed, stream)
