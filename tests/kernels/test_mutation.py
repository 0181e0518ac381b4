"""The checks are checked: every op made wrong in each of these ways, one output or gradient at a time, must fail them.

A change is applied to one result of an op on the NumPy backend (for a few ops, of the Numba kernel), or to one gradient
of its vjp. No mutant is excused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.backends import Backend
from minibert.kernels import OPS
from minibert.kernels.op import Op, holds_floats, input_name, outputs
from minibert.lab.conform.check import CheckResult, planned, run_check

Memory = dict[Any, np.ndarray]  # what a mutant keeps from call to call
Change = Callable[[np.ndarray, Memory], Any]

NUMPY = backends.get("numpy")
WITH_VJP = [op for op in OPS.values() if op.vjp is not None]
NUMBA = backends.get("numba")
ON_NUMBA = [op for op in OPS.values() if NUMBA.by(op) != "formula"]  # the formulas are NumPy's


def too_large(x: np.ndarray, memory: Memory) -> np.ndarray:
    """By a thousandth, or of whole numbers by one."""
    return x * x.dtype.type(1.001) if holds_floats(x) else x + x.dtype.type(1)


def one_element_too_large(x: np.ndarray, memory: Memory) -> np.ndarray:
    x = np.array(x)
    if x.size:
        at = np.unravel_index(np.abs(x).argmax(), x.shape)
        x[at] = too_large(x[at], memory)
    return x


def zeros(x: np.ndarray, memory: Memory) -> np.ndarray:
    return np.zeros_like(x)


def of_the_last_call(x: np.ndarray, memory: Memory) -> np.ndarray:
    last, memory["last"] = memory.get("last", x), np.array(x)
    return last


def cached_by_shape(x: np.ndarray, memory: Memory) -> np.ndarray:
    return memory.setdefault(x.shape, np.array(x))


def never_written(x: np.ndarray, memory: Memory) -> np.ndarray:
    rng = np.random.default_rng(len(memory))
    return rng.standard_normal(x.shape).astype(x.dtype)  # plausible numbers, as memory may hold from elsewhere


def last_element_never_written(x: np.ndarray, memory: Memory) -> np.ndarray:
    out = np.array(x, order="C")
    out.reshape(-1)[-1:] = never_written(out.reshape(-1)[-1:], memory)
    return out


def dropped(x: np.ndarray, memory: Memory) -> None:
    return None


CHANGES: tuple[Change, ...] = (
    too_large, one_element_too_large, zeros, of_the_last_call, cached_by_shape, never_written,
    last_element_never_written,
)  # fmt: skip


def first_failure(op: Op, backend: Backend, checks: Iterator[tuple[str, str]]) -> CheckResult | None:
    return next((r for name, dtype in checks if not (r := run_check(name, op, backend, dtype)).ok), None)


def assert_caught(failure: CheckResult | None, mutant: str) -> None:
    assert failure is not None, f"no check noticed: {mutant}"
    assert "raised" not in failure.message, f"the mutant {mutant} is broken itself: {failure.message}"


def honest(op: Op, backend: Backend) -> Callable[..., list[np.ndarray]]:
    """All results of `op`, as a list; those of an op that works in place stand in its arrays."""
    kernel = backend.kernel(op)

    def run(*arrays: np.ndarray, **params: Any) -> list[np.ndarray]:
        results = op.formula(backend.xp, *arrays, **params) if kernel is None else kernel(*arrays, **params)
        if not op.writes:
            return [np.asarray(r) for r in outputs(results)]
        if kernel is None:
            for i, value in zip(op.writes, results, strict=True):
                arrays[i][...] = value
        return [arrays[i] for i in op.writes]

    return run


def with_wrong_output(op: Op, backend: Backend, k: int, change: Change) -> Callable[..., Any]:
    run, memory = honest(op, backend), Memory()

    def kernel(*arrays: np.ndarray, **params: Any) -> Any:
        results = run(*arrays, **params)
        wrong = change(results[k], memory)
        if not op.writes:
            results[k] = wrong
        elif wrong.shape == results[k].shape:  # in place, a result of another shape cannot be given back
            results[k][...] = wrong
        return tuple(results) if len(results) > 1 else results[0]

    return kernel


def first_sample(op: Op) -> tuple[list[np.ndarray], dict[str, Any]]:
    arrays, params = next(iter(op.samples(np.random.default_rng(0))))
    return [np.array(a) for a in arrays], dict(params)


def number_of_outputs(op: Op) -> int:
    arrays, params = first_sample(op)
    return len(outputs(op.formula(NUMPY.xp, *arrays, **params)))


def assert_wrong_outputs_are_caught(op: Op, backend: Backend, change: Change) -> None:
    for k in range(number_of_outputs(op)):
        with backend.using({op: with_wrong_output(op, backend, k, change)}):
            failure = first_failure(op, backend, planned(backend, op, ["float32"]))
        assert_caught(failure, f"{op.name} on {backend.name}, output {k} {change.__name__}")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_wrong_output_is_caught(op: Op, change: Change) -> None:
    assert_wrong_outputs_are_caught(op, NUMPY, change)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("op", ON_NUMBA, ids=lambda op: op.name)
def test_a_wrong_output_of_a_kernel_is_caught(op: Op, change: Change) -> None:
    assert_wrong_outputs_are_caught(op, NUMBA, change)


def test_every_op_but_views_has_a_kernel() -> None:
    views = {"reshape", "transpose", "broadcast", "slice_axis", "pad_axis", "concatenate"}
    of_few_numbers = {"binary_cross_entropy", "mse_loss"}  # one row for each sequence: the formula takes no time
    assert {op.name for op in OPS.values()} - {op.name for op in ON_NUMBA} == views | of_few_numbers


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_changed_input_is_caught(op: Op) -> None:
    run = honest(op, NUMPY)
    for i, array in enumerate(first_sample(op)[0]):
        if i in op.writes or array.dtype.kind != "f":
            continue

        def kernel(*arrays: np.ndarray, i: int = i, **params: Any) -> Any:
            results = [np.array(r) for r in run(*arrays, **params)]
            if i < len(arrays):  # concatenate takes any number
                arrays[i][...] += 1
            return tuple(results) if len(results) > 1 else results[0]

        with NUMPY.using({op: kernel}):
            failure = first_failure(op, NUMPY, planned(NUMPY, op, ["float32"]))
        assert_caught(failure, f"{op.name}, input {i} changed")


@contextmanager
def wrong_gradient(op: Op, j: int, change: Change) -> Iterator[None]:
    vjp, memory = op.vjp, Memory()
    assert vjp is not None

    def mutant(run: Any, g: Any, *args: Any, **params: Any) -> tuple[Any, ...]:
        grads = list(vjp(run, g, *args, **params))
        if isinstance(g, np.ndarray):  # not the reading for its error: that must not be mistaken for what is judged
            grads[j] = change(grads[j], memory)
        return tuple(grads)

    object.__setattr__(op, "vjp", mutant)
    try:
        yield
    finally:
        object.__setattr__(op, "vjp", vjp)


@pytest.mark.parametrize("change", (*CHANGES, dropped), ids=lambda change: change.__name__)
@pytest.mark.parametrize("op", WITH_VJP, ids=lambda op: op.name)
def test_a_wrong_gradient_is_caught(op: Op, change: Change) -> None:
    arrays = first_sample(op)[0]
    for j in (j for j, array in enumerate(arrays) if array.dtype.kind == "f"):
        with wrong_gradient(op, j, change):
            failure = first_failure(op, NUMPY, iter([("gradient", "float64")]))
        assert_caught(failure, f"{op.name}, gradient {j} {change.__name__}")
        assert f"gradient of {input_name(op, j)}" in failure.message  # type: ignore[union-attr]


@pytest.mark.parametrize("op", WITH_VJP, ids=lambda op: op.name)
def test_the_tests_leave_every_gradient_as_it_was(op: Op) -> None:
    with wrong_gradient(op, 0, zeros):
        pass
    assert run_check("gradient", op, NUMPY, "float64").ok
