"""What every backend owes to every op: the checks of `conform.check`, generic over the registry and the backends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.backends import Backend
from minibert.errors import UserError
from minibert.kernels import OPS
from minibert.kernels.activation import gelu, relu
from minibert.kernels.elementwise import add, scale
from minibert.kernels.linear import linear, matmul
from minibert.kernels.op import Array, Op, outputs
from minibert.kernels.softmax import softmax
from minibert.kernels.view import transpose
from minibert.lab.conform.check import CHECKS, check, find_op, gradient_verdict, planned, run_check
from minibert.lab.conform.judge import judge

HERE = [status.backend for status in backends.available() if status.backend is not None]


DRAWN = ("any_size", "any_values", "propagates")


def demands(drawn: bool) -> Iterator[Any]:
    for op in OPS.values():
        for backend in HERE:
            for name, dtype in planned(backend, op):
                if (name in DRAWN) != drawn or (drawn and backend.emulated):  # that: `.ci/run`, by `check`
                    continue
                yield pytest.param(name, op, backend, dtype, id=f"{op.name}-{backend.name}-{dtype}-{name}")


@pytest.mark.parametrize(("name", "op", "backend", "dtype"), list(demands(drawn=False)))
def test_backend_meets(name: str, op: Op, backend: Backend, dtype: str) -> None:
    result = run_check(name, op, backend, dtype)
    assert result.ok, result.message
    assert result.inputs > 0


@pytest.mark.parametrize(("name", "op", "backend", "dtype"), list(demands(drawn=True)))
def test_backend_meets_what_is_drawn(name: str, op: Op, backend: Backend, dtype: str) -> None:
    test_backend_meets(name, op, backend, dtype)


def in_16_bits() -> Iterator[Any]:
    """What the door does for all kernels alike once for each op; all that is owed where a kernel reads bfloat16."""
    for place in (backends.get("numpy"), backends.get("numba")):
        for op in OPS.values():
            reads = getattr(place.kernel(op), "takes_bfloat16", False)
            for name, dtype in planned(place, op, ["bfloat16"]):
                if dtype == "bfloat16" and (reads or name == "follows_formula"):
                    yield pytest.param(name, op, place, dtype, id=f"{op.name}-{place.name}-{dtype}-{name}")


@pytest.mark.parametrize(("name", "op", "backend", "dtype"), list(in_16_bits()))
def test_a_processor_computes_in_16_bits(name: str, op: Op, backend: Backend, dtype: str) -> None:
    test_backend_meets(name, op, backend, dtype)


def test_backends_that_do_not_run_here_say_why() -> None:
    assert HERE[0].name == "numpy"
    assert all(status.reason for status in backends.available() if status.backend is None)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_with_a_gradient_is_checked_beyond_one_block(op: Op) -> None:
    """Some sample's arrays or outputs have more than 1024 elements, and an axis that no vector's width divides."""
    shapes = []
    for arrays, params in op.samples(np.random.default_rng(0)):
        results = outputs(op.formula(backends.get("numpy").xp, *arrays, **params))
        shapes += [np.shape(x) for x in (*arrays, *results)]
    assert op.vjp is None or any(np.prod(shape) > 1024 and any(n % 2 for n in shape) for shape in shapes), shapes


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_samples_are_the_same_for_the_same_seed_and_others_for_another(op: Op) -> None:
    first, again, other = (
        [b"".join(np.asarray(a).tobytes() for a in arrays) for arrays, _ in op.samples(np.random.default_rng(seed))]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert len(first) == len(other)
    assert first != other or op.name == "clip_scale"  # its samples are the corner cases of one number


# What a check does with kernels wrong in one particular way. `tests/kernels/test_mutation.py` does so for all ops.


def writes_to_its_input(x: np.ndarray, factor: float) -> np.ndarray:
    x *= factor
    return x.copy()


def returns_its_input(x: np.ndarray, factor: float) -> np.ndarray:
    x = x.copy() if factor != 1 / 3 else x
    return np.multiply(x, np.float32(factor), out=x)


def wants_contiguous(x: np.ndarray, factor: float) -> np.ndarray:
    memory = np.lib.stride_tricks.as_strided(x, x.shape, np.empty(x.shape, x.dtype).strides)  # what a raw pointer sees
    return memory * np.float32(factor)


def widens(x: np.ndarray, factor: float) -> np.ndarray:
    return x.astype(np.float64) * factor


def differs_each_time() -> Callable[..., Any]:
    rng = np.random.default_rng()
    return lambda x, factor: x * np.float32(factor) * np.float32(1 + 2.0**-24 * rng.integers(-9, 9))


def keeps_a_buffer() -> Callable[..., Any]:
    buffers: dict[Any, np.ndarray] = {}

    def kernel(x: np.ndarray, factor: float) -> np.ndarray:
        return np.multiply(x, np.float32(factor), out=buffers.setdefault(x.shape, np.empty_like(x)))

    return kernel


def leaves_the_last_unwritten(x: np.ndarray, factor: float) -> np.ndarray:
    out = np.empty_like(x)
    np.multiply(x.ravel()[:-1], np.float32(factor), out=out.reshape(-1)[:-1])
    return out


@pytest.mark.parametrize(
    ("kernel", "caught_by", "message"),
    [
        (writes_to_its_input, "inputs_left_alone", "input a was changed"),
        (returns_its_input, "fresh_output", "output y lies in the memory of input a"),
        (wants_contiguous, "strided_inputs", "inputs laid out every second: y["),
        (widens, "follows_formula", "expected dtype float32, got float64"),
        (differs_each_time(), "deterministic", "a second run gave other bits"),
        (keeps_a_buffer(), "fresh_output", "a later run changed the result of an earlier one"),
        (leaves_the_last_unwritten, "fresh_output", "run after another input of its shapes"),
        (lambda x, factor: x[..., :1] * factor, "follows_formula", "expected shape (3, 7), got (3, 1)"),
        (lambda x, factor: x * np.nan, "follows_formula", "got nan"),
        (lambda x, factor: x / 0, "follows_formula", "got inf"),
        (lambda x, factor: (x * factor, x), "follows_formula", "expected 1 outputs, got 2"),
        (lambda x, factor: x.nonesuch, "follows_formula", "raised AttributeError"),
        (lambda x, factor: x.nonesuch, "gradient_rounding", "test_check.py:"),
        *(
            (lambda x, factor: None, check, "got NoneType")
            for check in CHECKS
            if check not in ("guarded", "part_in_step", "gradient")
        ),
        (lambda x, factor: (None, x), "deterministic", "expected 1 outputs, got 2"),
        (lambda x, factor: "x", "fresh_output", "expected an array of shape (3, 7), got str"),
    ],
)  # fmt: skip
def test_a_wrong_kernel_is_caught_and_named(kernel: Callable[..., Any], caught_by: str, message: str) -> None:
    with backends.get("numpy").using({scale: kernel}) as numpy, np.errstate(all="ignore"):
        result = run_check(caught_by, scale, numpy, "float32", seed=3)
    assert not result.ok
    assert message in result.message
    assert result.by == "kernel"
    assert result.message.endswith("again by: minibert check scale --backend numpy --dtype float32 --seed 3")


@pytest.mark.parametrize(
    ("kernel", "verdict"),
    [
        (lambda x, factor: x * x.dtype.type(factor), "exact"),
        (lambda x, factor: x * x.dtype.type(factor * 1.001) + 1, "wrong"),
        (lambda x, factor: x.nonesuch, ""),
        (lambda x, factor: None, ""),
        (lambda x, factor: x[..., :1] * factor, ""),
    ],
)
def test_a_gradient_is_wrong_only_where_one_was_computed(kernel: Callable[..., Any], verdict: str) -> None:
    with backends.get("numpy").using({scale: kernel}) as numpy:
        assert gradient_verdict([run_check("gradient", scale, numpy, "float64")]) == verdict
    assert gradient_verdict([]) == ""


def test_nothing_is_measured_of_what_is_no_array() -> None:
    with backends.get("numpy").using({scale: lambda x, factor: None}) as numpy:
        result = run_check("follows_formula", scale, numpy, "float32")
    assert (result.ulp_max, result.err_over_us, result.bound_share) == (None, None, None)
    judgement = judge(add, (np.ones(2, np.float32),) * 2, {}, np.asarray(None), "float32")
    assert judgement.problem == "output y: expected an array of shape (2,), got NoneType"


@pytest.mark.parametrize("rows", [100, 1000])
@pytest.mark.parametrize("op", [softmax, gelu, scale, linear], ids=lambda op: op.name)
def test_a_kernel_that_zeroes_its_last_row_above_some_number_of_rows_is_caught(op: Op, rows: int) -> None:
    numpy = backends.get("numpy")

    def kernel(*arrays: np.ndarray, **params: Any) -> np.ndarray:
        y = np.array(op.formula(numpy.xp, *arrays, **params))
        if y.ndim > 1 and y.size // max(1, y.shape[-1]) > rows:
            y[..., -1, :] = 0
        return y

    with numpy.using({op: kernel}):
        failed = [result for result in check([op], [numpy], ["float32"]) if not result.ok]
    assert "part_in_step" in {result.check for result in failed}
    assert "expected" in failed[-1].message and "got 0" in failed[-1].message


def test_a_kernel_that_sums_per_thread_is_caught() -> None:
    numba = pytest.importorskip("minibert.backends.numba_backend").backend
    threads = [1]

    class Threaded(Backend):
        def set_num_threads(self, count: int) -> None:
            threads[0] = count

    def by_thread(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        parts = np.array_split(np.arange(a.shape[-1]), threads[0])
        return sum(a[..., p] @ b[..., p, :] for p in parts)  # type: ignore[return-value]

    place = Threaded("threaded", numba.xp)
    with place.using({matmul: by_thread}):
        assert run_check("follows_formula", matmul, place, "float32").ok
        result = run_check("order_of_work", matmul, place, "float32")
    assert not result.ok and "2 threads gave other bits than 1 thread" in result.message


@pytest.mark.parametrize("fault", ["skips the last row of later ranges", "counts words from the start of its range"])
def test_a_fault_between_ranges_is_caught_on_inputs_that_one_thread_would_do(fault: str) -> None:
    numba = pytest.importorskip("minibert.backends.numba_backend").backend
    from minibert.kernels.cpu.threads import run_rows
    from minibert.kernels.dropout import dropout
    from minibert.kernels.philox import random_words, threshold

    def skipping(x: np.ndarray, y: np.ndarray, start: int, stop: int) -> None:
        y[start : stop - (start > 0)] = x[start : stop - (start > 0)] * 3

    def scaled(x: np.ndarray, *, factor: float) -> np.ndarray:
        y = np.zeros(x.size, x.dtype)
        run_rows(skipping, x.size, x.reshape(-1) * np.float32(factor / 3), y, grain=10**6)
        return y.reshape(x.shape)

    def dropped(x: np.ndarray, *, rate: float, stream: Any) -> np.ndarray:
        y = x.reshape(-1).copy()

        def one(start: int, stop: int) -> None:
            keep = random_words(stream, stop - start) >= threshold(rate)
            y[start:stop] = np.where(keep, y[start:stop] * np.float32(1 / (1 - rate)), 0)

        run_rows(one, x.size, grain=10**6)
        return y.reshape(x.shape)

    op, kernel = (scale, scaled) if fault.startswith("skips") else (dropout, dropped)
    with numba.using({op: kernel}):
        assert run_check("deterministic", op, numba, "float32").ok
        assert not run_check("order_of_work", op, numba, "float32").ok


def test_a_view_is_allowed_where_the_formula_is_one() -> None:
    numpy = backends.get("numpy")
    with numpy.using({transpose: lambda x, axes: x.transpose(axes)}):
        assert run_check("fresh_output", transpose, numpy, "float32").ok
    with numpy.using({relu: lambda x: np.maximum(x, 0, out=x)}):
        assert not run_check("fresh_output", relu, numpy, "float32").ok


def test_an_in_place_op_must_write_where_it_was_told() -> None:
    adamw = OPS["adamw"]
    numpy = backends.get("numpy")
    with numpy.using({adamw: lambda *arrays, **params: adamw.formula(numpy.xp, *arrays, **params)}):
        result = run_check("inputs_left_alone", adamw, numpy, "float32")
    assert not result.ok and "read from the arrays it should have written" in result.message


def test_a_gradient_that_calls_an_op_wrongly_rounded_is_caught() -> None:
    """The gradient itself is right to float64; the op behind it is wrong on the views that only a gradient hands it."""
    numpy = backends.get("numpy")

    def wrong_on_transposed(a: Array, b: Array) -> Array:
        return a @ b * (np.float32(1.001) if a.flags.f_contiguous and not a.flags.c_contiguous else np.float32(1))

    with numpy.using({matmul: wrong_on_transposed}):
        result = run_check("gradient_rounding", matmul, numpy, "float32")
    assert not result.ok and "its gradient calls matmul" in result.message


# The judge.


def one(op: Op, number: int = 0) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    arrays, params = list(op.samples(np.random.default_rng(0)))[number]
    return tuple(np.asarray(a, np.float32) if a.dtype.kind == "f" else a for a in arrays), dict(params)


def test_judgement_of_one_element_off_by_two_ulp() -> None:
    arrays, params = (np.array([1.5, -3.0], np.float32), np.array([0.25, 1.0], np.float32)), {}
    got = np.array([1.75, np.float32(-2 - 2**-21)], np.float32)
    judgement = judge(add, arrays, params, got, "float32")
    assert judgement.ulp_max == 2
    assert judgement.err_over_us == 2  # off by 2^-21, u = 2^-24, S = |-3| + |1|
    assert judgement.bound_share == pytest.approx(4 / 3, rel=1e-6)  # half an ulp for its rounding, and one to spare
    assert not judgement.ok
    assert judgement.worst is not None
    assert judgement.worst[:4] == (0, (1,), -2.0, float(got[1]))
    assert "y[1]: expected -2, got -2.00000048, off by 4.77e-07, allowed 3.58e-07" in str(judgement.worst)


def test_a_bound_of_zero_means_the_very_same_number() -> None:
    arrays, params = one(transpose)
    exact = arrays[0].transpose(params["axes"])
    assert judge(transpose, arrays, params, exact, "float32")[:4] == (0, 0, 0, True)
    off = exact.copy()
    off[0, 0] = np.nextafter(off[0, 0], np.float32(9))
    judgement = judge(transpose, arrays, params, off, "float32")
    assert judgement.bound_share == np.inf and not judgement.ok


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stands_where_the_formula_has_it_and_nowhere_else(value: float) -> None:
    x = np.array([1.0, value], np.float32)
    right = np.array([2.0, 2 * value], np.float32)
    assert judge(scale, (x,), {"factor": 2.0}, right, "float32").ok
    for wrong in ([2 * value, 2 * value], [2.0, 2.0], [2.0, np.nan if np.isinf(value) else np.inf]):
        judgement = judge(scale, (x,), {"factor": 2.0}, np.array(wrong, np.float32), "float32")
        assert not judgement.ok and judgement.ulp_max == np.inf and judgement.bound_share == np.inf


def test_overflow_of_the_dtype_is_infinity_of_the_same_sign() -> None:
    x = np.array([3e38, -3e38], np.float32)
    assert judge(scale, (x,), {"factor": 2.0}, np.array([np.inf, -np.inf], np.float32), "float32").ok
    assert not judge(scale, (x,), {"factor": 2.0}, np.array([-np.inf, -np.inf], np.float32), "float32").ok


def test_float64_is_allowed_the_rounding_of_the_reference_too_and_no_more() -> None:
    a, b = np.array([1.0]), np.array([2.0**-60])
    step = 2.0**-52
    for ulps, ok in [(0, True), (2, True), (3, False)]:  # a rounding here, one in the reference, and two to spare
        assert judge(add, (a, b), {}, a + ulps * step, "float64").ok is ok


def test_zeros_and_constants_do_not_pass() -> None:
    for op in (softmax, gelu, linear):
        arrays, params = one(op)
        right = outputs(op.formula(backends.get("numpy").xp, *arrays, **params))
        assert judge(op, arrays, params, right, "float32").ok
        for fill in (0.0, 1.0, float(np.mean(right[0]))):
            constant = (np.full_like(right[0], fill), *right[1:])
            assert not judge(op, arrays, params, constant, "float32").ok


# `check`, as a command or a script calls it.


def test_check_yields_a_result_per_demand() -> None:
    results = list(check(["softmax", relu], ["numpy"], ["float32"], seed=5))
    assert {r.op for r in results} == {"softmax", "relu"}
    of_kernels = {
        "guarded", "order_of_work", "any_size", "any_values", "propagates", "empty_inputs", "many_calls",
    }  # fmt: skip
    assert {r.check for r in results} == set(CHECKS) - of_kernels  # the reference has none
    assert {r.dtype for r in results if r.check == "gradient"} == {"float64"}
    assert all(r.ok and not r.message and r.backend == "numpy" and r.by == "formula" for r in results)
    follows = next(r for r in results if r.op == "softmax" and r.check == "follows_formula")
    assert follows.inputs == len(list(softmax.samples(np.random.default_rng(0))))
    assert follows.ulp_max is not None and follows.ulp_max > 0
    assert follows.err_over_us is not None and 0 < follows.err_over_us < 10
    assert follows.bound_share is not None and 0 < follows.bound_share < 1
    assert dataclasses.asdict(follows)["op"] == "softmax"


def test_unknown_names_are_told_with_what_is_near() -> None:
    with pytest.raises(UserError, match=r"no op is called 'sofmax': did you mean 'softmax'\?"):
        list(check(["sofmax"]))
    with pytest.raises(UserError, match="no op is called 'zzz': choose from adamw, adamw_shadow, add"):
        find_op("zzz")
    with pytest.raises(UserError, match="backend numpy has arrays of float32, float64, float16, bfloat16: not 'int8'"):
        list(check(dtypes=["int8"]))
    with pytest.raises(ValueError, match="no backend is called 'abacus'"):
        list(check(["softmax"], ["abacus"]))
