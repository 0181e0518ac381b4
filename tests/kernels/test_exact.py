"""The reading that finds where nothing rounds, against brute force over orders of evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.kernels import OPS
from minibert.kernels.array_module import numpy_module
from minibert.kernels.op import Op, outputs
from minibert.kernels.readings import PRECISIONS, exact
from minibert.kernels.readings.exact import exact_module
from minibert.lab.conform.judge import expect, judge_against, stored_as

F = np.float32
BITS = 24


def integers(rng: np.random.Generator, *shape: int, most: int) -> np.ndarray:
    """Whole numbers up to `most`, times one power of two."""
    return rng.integers(-most, most + 1, shape) * 2.0 ** rng.integers(-40, 40)


def is_exact(formula: Callable[..., Any], *arrays: np.ndarray, **arithmetic: Any) -> np.ndarray:
    module = exact_module("float32", **arithmetic)
    with np.errstate(all="ignore"):
        lifted = module.reading.lift(formula(module, *map(module.reading.lift, arrays)))
    return lifted.within(PRECISIONS["float32"].roundoff)


def added(rng: np.random.Generator, terms: list[Any]) -> Any:
    """The float32 sum in one order and grouping of many: two that are picked at random become their sum."""
    terms = [F(t) for t in terms]
    while len(terms) > 1:
        a, b = (terms.pop(rng.integers(len(terms))) for _ in range(2))
        terms.append(a + b)
    return terms[0]


def dot(rng: np.random.Generator, a: list[Any], b: list[Any]) -> Any:
    """A float32 dot product in one of many ways: products rounded and added in some order, or fused with additions."""
    if rng.random() < 0.5:
        return added(rng, [F(x) * F(y) for x, y in zip(a, b, strict=True)])
    total = 0.0
    for i in rng.permutation(len(a)):
        total = float(F(float(a[i]) * float(b[i]) + total))  # in higher precision, and rounded once
    return F(total)


ORDERS = 40


def all_ways(evaluate: Callable[[], Any]) -> set[float]:
    return {float(evaluate()) for _ in range(ORDERS)}


def sums(rng: np.random.Generator, most: int) -> tuple[bool, set[float], float]:
    x = integers(rng, rng.integers(2, 7), most=most)
    return bool(is_exact(lambda xp, x: x.sum(), x)), all_ways(lambda: added(rng, list(x))), float(x.sum())


def dots(rng: np.random.Generator, most: int) -> tuple[bool, set[float], float]:
    a, b = (integers(rng, rng.integers(3, 4), most=int(most**0.5)) for _ in range(2))
    said = is_exact(lambda xp, a, b: a[None] @ b[:, None], a, b)[0, 0]
    return bool(said), all_ways(lambda: dot(rng, list(a), list(b))), float(a @ b)


def distributed(rng: np.random.Generator, most: int) -> tuple[bool, set[float], float]:
    """(a1 + a2 - a3) b, as it stands and with the factor on every term."""
    a, b = integers(rng, 3, most=int(most**0.5)), integers(rng, 1, most=int(most**0.5))[0]

    def evaluate() -> Any:
        terms = [a[0], a[1], -a[2]]
        return added(rng, terms) * F(b) if rng.random() < 0.5 else dot(rng, terms, [b] * 3)

    said = is_exact(lambda xp, a, b: (a[0] + a[1] - a[2]) * b, a, b)
    return bool(said), all_ways(evaluate), float((a[0] + a[1] - a[2]) * b)


@pytest.mark.parametrize("case", [sums, dots, distributed])
def test_every_order_of_what_is_called_exact_gives_the_same_bits(case: Any) -> None:
    said = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        exact_here, results, value = case(rng, 2 ** int(rng.integers(3, BITS + 1)))
        said += exact_here
        assert not exact_here or results == {value}
    assert said > 50


@pytest.mark.parametrize("case", [sums, dots, distributed])
def test_just_above_the_limit_orders_differ(case: Any) -> None:
    """So the limit is needed. (Numbers that happen to be even are exact above it too, and are not claimed.)"""
    found = [case(np.random.default_rng(seed), 2 ** (BITS + 2)) for seed in range(100)]
    differ = [len(results) > 1 or results != {value} for _, results, value in found]
    assert sum(differ) > 30 and not any(said and d for (said, _, _), d in zip(found, differ, strict=True))


def test_the_limit_is_reached() -> None:
    top = 2.0**BITS
    for terms, expected in [((top - 2, 1), True), ((top - 1, 2), False), ((top - 2, -1), True), ((top, -top), True)]:
        x = np.array(terms)
        assert is_exact(lambda xp, x: x.sum(), x) == expected
        assert is_exact(lambda xp, x: x.sum(), x * 2.0**-60) == expected


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_what_is_stored_in_16_bits_has_fewer(storage: str) -> None:
    most = 1 / PRECISIONS[storage].roundoff
    x, index = np.array([[most - 1], [1.0], [1.0]]), np.zeros(3, np.int64)  # every partial sum up to most + 1
    (mask,) = exact(OPS["scatter_rows"], x, index, num_rows=2, storage=storage)
    assert mask[:, 0].tolist() == [False, True]
    assert exact(OPS["scatter_rows"], x[:2], index[:2], num_rows=1, storage=storage)[0].all()  # 2^p: its last bit is 0
    assert exact(OPS["square_norm"], x - 1, storage=storage)[0].all()  # which stays wide


def test_what_may_overflow_or_vanish_is_not_exact() -> None:
    assert not is_exact(lambda xp, x: x * x, np.array(2.0**64))
    assert not is_exact(lambda xp, x: x * x, np.array(2.0**-64))
    assert not exact(OPS["scale"], np.array([2.0**15, 1.0]), factor=2.0, storage="float16")[0][0]
    assert is_exact(lambda xp, x: x * 0.0, np.array(3.0)) and not is_exact(lambda xp, x: x * 0.0, np.array(np.inf))


def test_products_on_tensor_cores_are_exact_of_operands_with_11_bits() -> None:
    a, b = np.array([[2.0**11 - 1], [2.0**11 + 1]]), np.ones((1, 1))
    assert exact(OPS["matmul"], a, b, products="tf32")[0][:, 0].tolist() == [True, False]
    assert exact(OPS["matmul"], a, b)[0].all()


def test_divisions_are_exact_by_powers_of_two_and_means_of_equal_elements() -> None:
    x = np.array([[3.0, 3, 3, 3], [1, 2, 3, 6]])
    assert is_exact(lambda xp, x: x / 4.0, x).all() and is_exact(lambda xp, x: x * 0.5, x).all()
    assert not is_exact(lambda xp, x: x / 3.0, x).any() and not is_exact(lambda xp, x: x * 0.1, x).any()
    assert is_exact(lambda xp, x: x.mean(axis=-1), x).tolist() == [True, False]  # a running mean is 1, 1.5, 2, 3
    assert not is_exact(lambda xp, x: x[:, :3].mean(axis=-1), x).any()
    running = F(0)
    for k, value in enumerate(x[0].astype(F)):
        running += (value - running) / F(k + 1)
    assert running == 3


def test_zeros_do_not_spoil_a_unit() -> None:
    a, b = np.array([[0.0, 2.0**20], [0.0, 0.0]]), np.array([[1.5], [2.0**10]])
    assert is_exact(lambda xp, a, b: a @ b, a, b).all()
    assert is_exact(lambda xp, a, b: xp.exp(-b) * a, a, b).tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("name", ["exp", "log", "sqrt", "tanh", "erf"])
def test_a_function_is_never_exact(name: str) -> None:
    assert not is_exact(lambda xp, x: getattr(xp, name)(x), np.array([1.0, 4.0])).any()


def whole_numbers(op: Op, seed: int) -> Iterator[tuple[tuple[np.ndarray, ...], dict[str, Any]]]:
    for arrays, params in islice(op.samples(np.random.default_rng(seed)), 5):
        yield tuple(np.rint(a * 3) if a.dtype.kind == "f" else a for a in arrays), dict(params)


NOWHERE = {
    "attention",
    "attention_grad",
    "clip_scale",
    "gelu",
    "gelu_grad",
    "layer_norm",
    "linear_cross_entropy",
    "normalize",
    "normalize_grad",
    "softmax",
    "tanh",
}
SOMEWHERE = frozenset(
    [
        "adamw",
        "adamw_shadow",
        "add",
        "add_layer_norm",
        "add_layer_norm_grad",
        "add_linear_grad",
        "add_rows",
        "binary_cross_entropy",
        "broadcast",
        "concatenate",
        "cross_entropy",
        "dropout",
        "embedding",
        "gather_rows",
        "layer_norm_grad",
        "linear",
        "linear_gelu",
        "linear_grad",
        "matmul",
        "mean_pool",
        "mean_pool_grad",
        "mse_loss",
        "mul",
        "pad_axis",
        "reduce_sum",
        "relu",
        "relu_grad",
        "reshape",
        "scale",
        "scatter_rows",
        "slice_axis",
        "softmax_grad",
        "square_norm",
        "tanh_grad",
        "transpose",
        "where",
    ]
)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_formulas_and_kernels_have_the_same_bits_where_they_are_exact(op: Op, dtype: str) -> None:
    found = set()
    for arrays, params in whole_numbers(op, 5):
        kinds = stored_as(op, arrays, dtype)
        given = tuple(np.asarray(a, kind) for a, kind in zip(arrays, kinds, strict=True))
        with np.errstate(all="ignore"):
            expected = expect(op, given, params, dtype, exactly=True)
            wide = (np.asarray(a, F) if a.dtype.kind == "f" else a for a in given)
            results = [op.formula(numpy_module, *wide, **params)]
            if dtype == "float32" and not op.writes:
                results.append(backends.get("numba").run(op, *given, **params))
        for got in results:
            for b, result in zip(expected, outputs(got), strict=True):
                exactly = b.error == 0
                with np.errstate(over="ignore"):
                    stored = np.asarray(result, b.dtype)
                assert np.array_equal(stored[exactly], b.value[exactly])
        found |= {op.name for b in expected if np.all(b.error == 0)}
    if dtype == "float32" and op.name in NOWHERE | SOMEWHERE:  # an op that somebody adds is in neither
        assert bool(found) == (op.name in SOMEWHERE)


def test_one_element_that_is_dropped_of_many_is_a_difference() -> None:
    x = np.random.default_rng(0).integers(-3, 4, 2**17).astype(F)
    x[-1] = 1
    for exactly in (False, True):
        expected = expect(OPS["square_norm"], (x,), {}, "float32", exactly=exactly)
        assert judge_against(expected, F((x[:-1] ** 2).sum())).ok is not exactly
        assert judge_against(expected, F((x**2).sum())).ok
