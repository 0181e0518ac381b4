"""A random search for formulas whose float32 result escapes its bound, or whose derivative is not the true one.

Formulas are grown from every primitive that a formula may use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minibert.kernels.array_module import numpy_module
from minibert.kernels.readings import PRECISIONS, bounded_module, dual_module
from minibert.kernels.readings.counted import Counted, CountingModule
from minibert.kernels.readings.dual import Dual

ORACLE = 1 + 2.0**-28  # the float64 evaluation beside the bound rounds too
MODULES = {
    "bounded": bounded_module("float32"),
    "dual": dual_module,
    "counted": CountingModule(type("Counting", (Counted,), {"flops": [0]})),
}
Formula = Callable[[Any, Any, Any], Any]  # (xp, x, y) -> an array of shape (4, 6), as x and y are
LEAVES: list[Formula] = [lambda xp, x, y: x, lambda xp, x, y: y, lambda xp, x, y: x * 0.1, lambda xp, x, y: y + 3.7]
STEPS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "add": lambda xp, a, b: a + b,
    "subtract": lambda xp, a, b: a - b,
    "multiply": lambda xp, a, b: a * b,
    "divide": lambda xp, a, b: a / (b * b + 0.5),
    "negative": lambda xp, a, b: -a,
    "power": lambda xp, a, b: a**3,
    "exp": lambda xp, a, b: xp.exp(xp.tanh(a) * 3.0),
    "log": lambda xp, a, b: xp.log(a * a + 0.3),
    "sqrt": lambda xp, a, b: xp.sqrt(a * a + b * b),
    "tanh": lambda xp, a, b: xp.tanh(a),
    "erf": lambda xp, a, b: xp.erf(a),
    "max": lambda xp, a, b: a - a.max(axis=1, keepdims=True),
    "maximum": lambda xp, a, b: xp.maximum(a, b),
    "sum": lambda xp, a, b: a + b.sum(axis=0, keepdims=True),
    "mean": lambda xp, a, b: a - a.mean(axis=-1, keepdims=True),
    "matmul": lambda xp, a, b: a @ (b.swapaxes(0, 1) @ b),
    "segment_sum": lambda xp, a, b: xp.segment_sum(a, np.array([2, 0, 2, 1]), 4),
    "softmax": lambda xp, a, b: xp.exp(a - a.max(axis=-1, keepdims=True)) / (1 + xp.exp(-(xp.tanh(b)))),
    "reshape": lambda xp, a, b: a.reshape(6, 4).transpose(1, 0),
    "concatenate": lambda xp, a, b: xp.concatenate([a[:, 3:], b[:, :3]], axis=1),
    "where": lambda xp, a, b: xp.where(np.arange(6) % 2 == 0, a, b),
    "broadcast_to": lambda xp, a, b: xp.broadcast_to(a[:1], (4, 6)) + b,
}
PROGRAMS = st.tuples(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7),
    st.integers(0, 2**31),
    st.sampled_from([1e-3, 1.0, 30.0]),
)


def grown(steps: list[tuple[str, int, int]]) -> Formula:
    """Each step takes two of the values made so far, the newest counted first."""

    def formula(xp: Any, x: Any, y: Any) -> Any:
        values = [leaf(xp, x, y) for leaf in LEAVES]
        for name, i, j in steps:
            values.append(STEPS[name](xp, values[-1 - i % len(values)], values[-1 - j % len(values)]))
        return values[-1]

    return formula


@settings(max_examples=400)
@given(PROGRAMS)
def test_no_formula_escapes_its_bound(program: tuple[list[tuple[str, int, int]], int, float]) -> None:
    steps, seed, size = program
    x, y = (np.random.default_rng(seed).standard_normal((2, 4, 6)) * size).astype(np.float32)
    formula = grown(steps)
    lift = bounded_module("float32").reading.lift
    with np.errstate(all="ignore"):
        got = formula(numpy_module, x, y)
        b = formula(bounded_module("float32"), lift(x), lift(y))
    assert got.dtype == np.float32
    within = np.abs(b.value) + b.error < 3e38
    off = np.abs(got.astype(np.float64) - b.value)
    assert np.all((off <= b.error * ORACLE) | ~within), (off / b.error).max()


@settings(max_examples=200)
@given(PROGRAMS)
def test_the_derivative_of_any_formula_is_that_of_the_complex_step(
    program: tuple[list[tuple[str, int, int]], int, float],
) -> None:
    steps, seed, size = program
    x, y, dx, dy = np.random.default_rng(seed).standard_normal((4, 4, 6))
    x, y = x * size, y * size
    formula, h = grown(steps), 1e-30
    with np.errstate(all="ignore"):
        d = formula(dual_module, Dual(x, dx), Dual(y, dy))
        stepped = formula(numpy_module, x + 1j * h * dx, y + 1j * h * dy)
    assume(np.isfinite(d.tangent).all() and np.abs(d.tangent).max() < 1e12)
    lift = bounded_module("float64").reading.lift
    b = formula(bounded_module("float64"), lift(x), lift(y))  # how far cancellation magnifies rounding here
    conditioning = 1 + float((b.error / (PRECISIONS["float64"].roundoff * (np.abs(b.value) + 1e-300))).max())
    assert np.all(np.abs(stepped.imag / h - d.tangent) <= 1e-14 * conditioning * (np.abs(d.tangent).max() + 1e-300))


@pytest.mark.parametrize("name", MODULES)
def test_every_reading_gives_the_shapes_of_numpy(name: str) -> None:
    module = MODULES[name]
    x, y = np.random.default_rng(0).standard_normal((2, 4, 6))
    for step in STEPS.values():
        read = step(module, module.reading.lift(x), module.reading.lift(y))
        assert read.shape == step(numpy_module, x, y).shape == (4, 6)
