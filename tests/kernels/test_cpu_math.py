"""exp, log, erf, tanh, max and Philox of the CPU kernels: within their stated ulp over float32, and bit for bit."""

import os

import numba
import numpy as np
import pytest
import scipy.special

from minibert.kernels.cpu import math as cpu_math
from minibert.kernels.cpu.jit import KERNEL_FLAGS, OPTIONS, jit
from minibert.kernels.cpu.math import constant, erf, exp, log, philox_row, tanh, vmax
from minibert.kernels.cpu.threads import run_rows
from minibert.kernels.philox import Stream, philox4x32, random_words

FULL_SWEEP = os.environ.get("MINIBERT_FULL_SWEEP") == "1"  # every float32 there is: about 5 minutes
STRIDE = 1 if FULL_SWEEP else 61  # odd, so that all low bits occur
CHUNK = 1 << 21  # floats tried at a time


@jit
def exp_all(x, y, start, stop):
    x, y = x[start:stop], y[start:stop]
    for i in range(x.size):
        y[i] = exp(x[i])


@jit
def log_all(x, y, start, stop):
    x, y = x[start:stop], y[start:stop]
    for i in range(x.size):
        y[i] = log(x[i])


@jit
def erf_all(x, y, start, stop):
    x, y = x[start:stop], y[start:stop]
    for i in range(x.size):
        y[i] = erf(x[i])


@jit
def tanh_all(x, y, start, stop):
    x, y = x[start:stop], y[start:stop]
    for i in range(x.size):
        y[i] = tanh(x[i])


@jit
def max_all(x, y, start, stop):
    for i in range(start, stop):
        largest = x[i, 0]
        for j in range(x.shape[1]):
            largest = vmax(largest, x[i, j])
        y[i] = largest


@jit
def scale_all(x, y, start, stop):
    x, y = x[start:stop], y[start:stop]
    for i in range(x.size):
        y[i] = x[i] * constant(0.1, x[i])


@jit
def philox_all(words, first, seed, stream, step, layer, start, stop):
    for i in range(start, stop):
        philox_row(words[i], first + i * words.shape[1], words.shape[1], seed, stream, step, layer)


KERNELS = {"exp": exp_all, "log": log_all, "erf": erf_all, "tanh": tanh_all}
EXACT = {"exp": np.exp, "log": np.log, "erf": scipy.special.erf, "tanh": np.tanh}
LIMIT = {"exp": 1.25, "log": 1.25, "erf": 2.0, "tanh": 2.0}  # ulp


def evaluate(name, x):
    y = np.full_like(x, 12345.0)
    run_rows(KERNELS[name], x.size, x, y, grain=1 << 16)
    return y


def ulps(got, exact, dtype=np.float32):
    """Distance in units in the last place of the exact value; where that overflows `dtype`, so must `got`."""
    info = np.finfo(dtype)
    with np.errstate(all="ignore"):
        exponent = np.maximum(np.frexp(exact)[1] - 1, info.minexp)
        rounded = exact.astype(dtype)
        distance = np.abs(got.astype(np.float64) - exact) / np.ldexp(1.0, exponent - info.nmant)
    special = ~np.isfinite(rounded) | ~np.isfinite(got)
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    return np.where(special, np.where(same, 0.0, np.inf), distance)


@pytest.mark.parametrize("name", KERNELS)
def test_float32_stays_within_its_ulp_over_all_bit_patterns(name):
    worst, where, tried = 0.0, None, 0
    for begin in range(0, 1 << 32, CHUNK * STRIDE):
        patterns = np.arange(begin, min(begin + CHUNK * STRIDE, 1 << 32), STRIDE, dtype=np.uint64)
        x = patterns.astype(np.uint32).view(np.float32)
        with np.errstate(all="ignore"):
            exact = EXACT[name](x.astype(np.float64))
        error = ulps(evaluate(name, x), exact)
        tried += x.size
        i = int(np.argmax(error))
        if error[i] > worst:
            worst, where = float(error[i]), x[i]
    print(f"{name}: at most {worst:.3f} ulp, at {where!r}, of {tried} floats")
    assert worst <= LIMIT[name], f"{name}({where!r}) is {worst} ulp off"


@pytest.mark.parametrize("name", KERNELS)
def test_float64_stays_within_two_ulp(name):
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.uniform(-30, 30, 100_000), rng.uniform(-700, 700, 100_000), rng.normal(size=100_000) * 1e-3]
    )
    x = np.abs(x) if name == "log" else x
    got, exact = evaluate(name, x), EXACT[name](x)
    assert got.dtype == np.float64
    assert ulps(got, exact, np.float64).max() <= 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("exp", [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45], [np.nan, np.inf, 0, 1, 1, 1]),
        ("exp", [1000.0, -1000.0, 3.4e38, -3.4e38], [np.inf, 0, np.inf, 0]),
        ("log", [np.nan, np.inf, 0.0, -0.0, 1.0, -1.0, -np.inf], [np.nan, np.inf, -np.inf, -np.inf, 0, np.nan, np.nan]),
        ("erf", [np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 10.0], [np.nan, 1, -1, 1, -1, 1]),
        ("tanh", [np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 30.0], [np.nan, 1, -1, 1, -1, 1]),
        ("erf", [0.0, -0.0], [0.0, -0.0]),
        ("tanh", [0.0, -0.0, 1e-44, -1e-44], [0.0, -0.0, 1e-44, -1e-44]),
    ],
)
def test_special_values(name, x, expected, dtype):
    got = evaluate(name, np.array(x, dtype))
    np.testing.assert_array_equal(got, np.array(expected, dtype))
    if name in ("erf", "tanh"):
        np.testing.assert_array_equal(np.signbit(got)[1:], np.signbit(x)[1:])


def test_exp_goes_through_the_subnormal_numbers_to_zero():
    x = np.linspace(-104, -87, 100_001, dtype=np.float32)
    got = evaluate("exp", x)
    assert np.all(np.diff(got) >= 0)
    assert got[0] == 0 and 0 < got[np.searchsorted(x, np.float32(-100))] < np.finfo(np.float32).tiny


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vmax_is_the_maximum_and_keeps_nan(dtype):
    x = np.random.default_rng(1).normal(size=(7, 1001)).astype(dtype)
    x[1] = -np.inf
    x[2, 500] = np.inf
    x[3, 17] = np.nan
    got = np.zeros(7, dtype)
    run_rows(max_all, 7, x, got)
    np.testing.assert_array_equal(got, x.max(axis=1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constants_do_not_widen(dtype):
    x = np.random.default_rng(2).normal(size=1000).astype(dtype)
    got = np.zeros_like(x)
    scale_all(x, got, 0, x.size)
    np.testing.assert_array_equal(got, x * dtype(0.1))


@pytest.mark.parametrize("name", KERNELS)
def test_float32_loops_are_vector_code(name):
    x = np.zeros(8, np.float32)
    fresh = numba.njit(fastmath=KERNEL_FLAGS, **OPTIONS)(KERNELS[name].py_func)  # loaded code cannot be inspected
    fresh(x, x.copy(), 0, 8)
    assert "x float>" in next(iter(fresh.inspect_llvm().values()))


def test_in_plain_python_they_are_those_of_math():
    assert [round(f(0.5), 12) for f in (exp, erf, tanh)] == [1.6487212707, 0.520499877813, 0.46211715726]
    assert vmax(1.0, 2.0) == 2.0 and np.isnan(vmax(np.nan, 2.0)) and constant(1, np.float32(2)).dtype == np.float32


@pytest.mark.parametrize(
    ("word", "expected"),
    [(0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"), (0xFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd")],
)
def test_philox_known_answers(word, expected):
    """Random123's kat_vectors, philox 4x32, 10 rounds."""
    got = philox4x32(np, (np.array([word]),) * 4, (word, word))
    assert " ".join(f"{int(w[0]):08x}" for w in got) == expected


def test_philox_block_is_that_of_the_reference():
    u = np.uint64
    for block, layer, step, seed, stream in [(0, 0, 0, 0, 0), (0xFFFFFFFF,) * 5, (5, 4, 3, 2, 1)]:
        got = cpu_math.philox_block(u(block), u(layer), u(step), u(seed), u(stream))
        expected = philox4x32(np, tuple(np.array([c]) for c in (block, layer, step, 0)), (seed, stream))
        assert [int(w) for w in got] == [int(w[0]) for w in expected]


@pytest.mark.parametrize("first", [0, 1, 2, 3, 4, 1027, 4 * 0xFFFFFFFF - 1030])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 64, 1001])
def test_philox_row_draws_the_words_of_random_words(first, count):
    stream = Stream(seed=0xDEADBEEF, stream=3, step=0xFFFFFFFF, layer=11)
    words = np.full((1, count), 77, np.uint32)
    philox_all(words, first, *stream, 0, 1)
    np.testing.assert_array_equal(words[0], random_words(stream, count, start=first))


def test_philox_row_writes_only_the_words_asked_for():
    @jit
    def some(words, first, count, start, stop):
        philox_row(words, first, count, 1, 2, 3, 4)

    words = np.full(100, 77, np.uint32)
    some(words, 3, 90, 0, 1)
    np.testing.assert_array_equal(words[:90], random_words((1, 2, 3, 4), 90, start=3))
    assert np.all(words[90:] == 77)


def test_philox_rows_go_on_from_one_another_on_any_number_of_threads():
    stream = Stream(seed=1, stream=2, step=3, layer=4)
    words = np.zeros((50, 37), np.uint32)
    run_rows(philox_all, 50, words, 5, *stream)
    np.testing.assert_array_equal(words.ravel(), random_words(stream, words.size, start=5))
