"""The other readings of a formula, each tested for itself: error bounds, derivatives, counts."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.kernels import OPS
from minibert.kernels.array_module import numpy_module
from minibert.kernels.drawing import IGNORED
from minibert.kernels.op import BertSize, Op, outputs
from minibert.kernels.readings import PRECISIONS, bound, bounded_module, cost, dual_module, jvp
from minibert.kernels.readings.bounded import Bounded
from minibert.kernels.readings.counted import Counted, CountingModule
from minibert.kernels.readings.dual import Dual
from minibert.kernels.readings.reading import ARITHMETIC, UNARY, Reading

U = {name: p.roundoff for name, p in PRECISIONS.items()}
ORACLE = 1 + 2.0**-28  # the float64 evaluation beside the bound rounds too
BY_NAME = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def samples(op: Op, dtype: Any = np.float64, seed: int = 0) -> Iterator[tuple[tuple[np.ndarray, ...], dict[str, Any]]]:
    for arrays, params in op.samples(np.random.default_rng(seed)):
        yield tuple(np.asarray(a, dtype) if a.dtype.kind == "f" else a for a in arrays), dict(params)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to 8 bits of mantissa, to nearest, ties to even; kept in float32."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000)).view(np.float32)


def to_float16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float16).astype(np.float32)


ROUND: dict[str, Callable[[np.ndarray], np.ndarray]] = {"float16": to_float16, "bfloat16": to_bfloat16}
LARGEST = {"float16": 65504.0, "bfloat16": 3.38e38}

# Sums, in every order.


def summands(kind: str, count: int) -> np.ndarray:
    rng = np.random.default_rng(count)
    x = rng.random(count) + 0.5
    if kind == "alternating":
        return np.stack([x, -x * (1 + 1e-6)], axis=1).ravel()[:count]
    if kind == "rising":
        return np.sort(x**8)
    if kind == "falling":
        return np.sort(x**8)[::-1]
    if kind == "one large":
        x[0] = 3e4
    if kind == "vanishing":  # each is half an ulp of 1 and is lost one by one
        return np.concatenate([[1.0], np.full(count - 1, 2.0**-24)])
    if kind == "random sign":
        x *= rng.choice([-1, 1], count)
    return x


def rounded_sum(x: np.ndarray, precision: str, order: str) -> float:
    """The sum in one precision: every partial sum is rounded to it."""
    if order == "pairs":
        while len(x) > 1:
            half = len(x) // 2
            pairs = _add(x[:half], x[half : 2 * half], precision)
            x = np.concatenate([pairs, x[2 * half :]])
        return float(x[0])
    if order == "backwards":
        x = x[::-1]
    if precision == "bfloat16":
        total = np.float32(0)
        for value in x:
            total = to_bfloat16(total + value)
        return float(total)
    return float(np.cumsum(x, dtype=precision)[-1])  # one after the other


def _add(a: np.ndarray, b: np.ndarray, precision: str) -> np.ndarray:
    return to_bfloat16(a + b) if precision == "bfloat16" else a + b


def in_precision(x: np.ndarray, precision: str) -> np.ndarray:
    return to_bfloat16(x) if precision == "bfloat16" else x.astype(precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("order", ["forwards", "backwards", "pairs"])
@pytest.mark.parametrize(
    "kind", ["same sign", "random sign", "alternating", "rising", "falling", "one large", "vanishing"]
)
def test_a_sum_in_any_order_lies_under_its_bound(kind: str, order: str, precision: str) -> None:
    for count in (1, 2, 3, 100) if precision in ROUND else (1, 2, 3, 1000, 30522):
        x = in_precision(summands(kind, count), precision)
        (b,) = bound(OPS["reduce_sum"], np.asarray(x, np.float64), precision=precision)
        exact = math.fsum(x.astype(float))
        off = abs(rounded_sum(x, precision, order) - exact)
        slack = 2 if precision == "float64" else ORACLE  # there the reference commits as much
        assert off <= b.error * slack, (count, off / b.error)
        assert b.terms == pytest.approx(math.fsum(abs(x.astype(float))), rel=1e-12)


def test_the_bound_of_a_sum_is_reached() -> None:
    """1 + u + u + ... one by one loses every u: the bound is no more pessimistic than the worst order deserves."""
    x = summands("vanishing", 30000).astype(np.float32)
    (b,) = bound(OPS["reduce_sum"], x)
    assert rounded_sum(x, "float32", "forwards") == 1
    assert 0.99 < abs(1 - math.fsum(x.astype(float))) / b.error <= 1


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("k", [1, 7, 100])
def test_the_bound_of_a_dot_product_is_highams(k: int, precision: str) -> None:
    """|fl(x'y) - x'y| <= gamma_k |x|'|y| (Higham, equation 3.5), and a gradual underflow per product."""
    x, y = np.random.default_rng(k).standard_normal((2, k))
    (b,) = bound(OPS["matmul"], x[None], y[:, None], precision=precision)
    u = U[precision]
    gamma = k * u / (1 - k * u)
    assert b.error[0, 0] == pytest.approx(gamma * (abs(x) @ abs(y)) + k * PRECISIONS[precision].tiny, rel=1e-14)
    assert b.terms[0, 0] == pytest.approx(abs(x) @ abs(y), rel=1e-14)
    assert b.value[0, 0] == pytest.approx(x @ y, rel=1e-12)


def test_a_sum_too_long_for_its_precision_has_no_bound() -> None:
    (b,) = bound(OPS["reduce_sum"], np.ones(3000), precision="float16")  # stagnates at 2048
    assert b.error == np.inf


# Whole ops.


@BY_NAME
@pytest.mark.parametrize("storage", ROUND)
def test_sixteen_bits_of_storage(op: Op, storage: str) -> None:
    """Computed in float32, stored in 16 bits: under the bound, which without the storage would be broken."""
    broken = 0
    for arrays, params in samples(op):
        arrays = tuple(
            ROUND[storage](a) if a.dtype.kind == "f" and i not in op.wide_inputs else a for i, a in enumerate(arrays)
        )
        if any(np.isinf(a).any() for a in arrays if a.dtype.kind == "f"):  # the square of a norm, in float16
            continue
        with np.errstate(all="ignore"):
            results = outputs(op.formula(numpy_module, *arrays, **params))
        stored, plain = (bound(op, *arrays, storage=s, **params) for s in (storage, None))
        for k, (result, b, p) in enumerate(zip(results, stored, plain, strict=True)):
            wide = k in op.wide_outputs or k in op.whole_outputs
            kept = np.asarray(result, np.float32) if wide else ROUND[storage](np.asarray(result))
            assert b.dtype == op.whole_outputs.get(k, "float32" if wide else storage)
            off = abs(kept.astype(np.float64) - b.value)
            overflows = abs(b.value) + b.error > LARGEST[storage]
            assert np.all((off <= b.error * ORACLE) | overflows)
            broken += np.any(off > p.error * ORACLE)
    exact = ("reshape", "transpose", "slice_axis", "pad_axis", "concatenate", "broadcast", "where", "gather_rows")
    unrounded = {*op.wide_outputs, *op.whole_outputs}
    all_wide = unrounded and set(range(len(results))) <= unrounded
    assert broken or all_wide or op.name in (*exact, "relu", "relu_grad")


@BY_NAME
def test_every_bound_is_finite_and_none_is_vacuous(op: Op) -> None:
    """A result off by 0.1 % breaks it somewhere in every sample that has more than a handful of elements."""
    for arrays, params in samples(op, np.float32):
        for b in bound(op, *arrays, **params):
            assert np.isfinite(b.error).all() and np.isfinite(b.value).all()
            assert np.all(b.terms >= abs(b.value) * (1 - 1e-12))
            assert b.value.size < 20 or not b.value.any() or np.any(abs(b.value) * 1e-3 > b.error)


@pytest.mark.parametrize(
    ("name", "number", "off", "at_least"),
    [
        ("softmax", 3, 1e-3, 0.99), ("softmax", 3, 1e-4, 0.99), ("gelu", 2, 1e-3, 0.75), ("layer_norm", 2, 1e-3, 0.9),
        ("linear", 2, 1e-3, 0.85), ("attention", 2, 1e-3, 0.5), ("layer_norm_grad", 2, 1e-3, 0.7),
        ("adamw", 2, 1e-3, 0.99),
    ],
)  # fmt: skip
def test_how_many_elements_betray_a_small_error(name: str, number: int, off: float, at_least: float) -> None:
    arrays, params = list(samples(OPS[name], np.float32))[number]
    b = bound(OPS[name], *arrays, **params)[0]
    caught = float(np.mean(abs(b.value) * off > b.error))
    assert caught >= at_least


@BY_NAME
def test_float32_bounds_hold_on_other_inputs_than_the_suite_draws(op: Op) -> None:
    for seed in (101, 102):
        for arrays, params in samples(op, np.float32, seed):
            with np.errstate(all="ignore"):
                results = outputs(op.formula(numpy_module, *arrays, **params))
            for result, b in zip(results, bound(op, *arrays, **params), strict=True):
                assert np.all(abs(np.asarray(result, np.float64) - b.value) <= b.error * ORACLE)


# Derivatives of the ops.


def at_a_kink(op: Op, arrays: tuple[np.ndarray, ...]) -> bool:
    """sqrt has none at 0: three ops are never differentiated, and are sampled there. A mark, IGNORED, has none."""
    if op.name in ("binary_cross_entropy", "mse_loss"):
        return bool(np.any(arrays[1] == IGNORED))
    return op.name in ("adamw", "adamw_shadow", "clip_scale") and not all(np.all(a) for a in arrays)


@BY_NAME
def test_the_derivative_is_that_of_the_complex_step(op: Op) -> None:
    """f(x + i h v) = f(x) + i h f'(x) v + O(h^2): with h = 1e-30 exact to rounding (Squire and Trapp 1998)."""
    rng, h = np.random.default_rng(1), 1e-30
    for arrays, params in samples(op):
        if sum(a.size for a in arrays) > 20_000 or at_a_kink(op, arrays):
            continue
        tangents = tuple(rng.standard_normal(a.shape) if a.dtype.kind == "f" else None for a in arrays)
        stepped = (a if t is None else a + 1j * h * t for a, t in zip(arrays, tangents, strict=True))
        with np.errstate(all="ignore"):
            expected = np.asarray(outputs(op.formula(numpy_module, *stepped, **params))[0]).imag / h
            got = jvp(op, arrays, tangents, **params)
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11 * np.abs(expected).max(initial=1e-30))


@pytest.mark.parametrize("name", ["softmax", "gelu", "tanh", "layer_norm", "cross_entropy", "attention", "linear_gelu"])
def test_the_derivative_is_that_of_a_four_point_stencil(name: str) -> None:
    """(f(x - 2h) - 8 f(x - h) + 8 f(x + h) - f(x + 2h)) / 12 h, in error by h^4."""
    op, h = OPS[name], 1e-3
    rng = np.random.default_rng(2)
    arrays, params = next(samples(op))
    tangents = tuple(rng.standard_normal(a.shape) * 0.3 if a.dtype.kind == "f" else None for a in arrays)

    def f(step: float) -> np.ndarray:
        moved = (a if t is None else a + step * t for a, t in zip(arrays, tangents, strict=True))
        return np.asarray(outputs(op.formula(numpy_module, *moved, **params))[0])

    difference = (f(-2 * h) - 8 * f(-h) + 8 * f(h) - f(2 * h)) / (12 * h)
    got = jvp(op, arrays, tangents, **params)
    np.testing.assert_allclose(got, difference, rtol=0, atol=2e-10 * np.abs(difference).max())


def test_a_tangent_of_none_holds_its_array_fixed() -> None:
    (a, b), params = next(samples(OPS["mul"]))
    v = np.ones_like(a)
    np.testing.assert_array_equal(jvp(OPS["mul"], (a, b), (v, None), **params), b * v)
    np.testing.assert_array_equal(jvp(OPS["mul"], (a, b), (None, None), **params), np.zeros_like(a))


# Counts.


def zeros(*shape: int) -> np.ndarray:
    return np.broadcast_to(np.float32(0), shape)  # of any size, without memory


@pytest.mark.parametrize(
    ("name", "shapes", "flops"),
    [
        ("add", [(3, 7), (3, 7)], 21),
        ("add", [(3, 7), (7,)], 21),
        ("reduce_sum", [(3, 7)], 21),
        ("matmul", [(3, 4), (4, 5)], 2 * 3 * 4 * 5),
        ("matmul", [(2, 6, 3, 4), (4, 5)], 2 * 12 * 3 * 4 * 5),
        ("linear", [(3, 4), (5, 4), (5,)], 2 * 3 * 4 * 5 + 3 * 5),
        ("softmax", [(3, 7)], 5 * 3 * 7),  # max, subtract, exp, sum, divide
        ("layer_norm", [(3, 7), (7,), (7,)], 7 * 3 * 7 + 5 * 3),  # sum - d^2 sum * * +, and 5 per row
        ("reshape", [(3, 8)], 0),
        ("square_norm", [(9,)], 18),
    ],
)  # fmt: skip
def test_counts_of_ops_written_out_by_hand(name: str, shapes: list[tuple[int, ...]], flops: int) -> None:
    params = {"shape": (24,)} if name == "reshape" else {}
    assert cost(OPS[name], *(zeros(*shape) for shape in shapes), **params).flops == flops


def test_count_of_attention() -> None:
    """q k' and p v: 4 n^2 D per head and sequence; scale, max, subtract, exp, sum and divide: 6 n^2; log and +: 2 n."""
    heads, d, lengths = 3, 8, (5, 1, 12)
    cu_seqlens = np.cumsum([0, *lengths]).astype(np.int32)
    counted = cost(OPS["attention"], zeros(sum(lengths), 3 * heads * d), cu_seqlens, num_heads=heads)
    assert counted.flops == heads * sum(4 * n * n * d + 6 * n * n + 2 * n for n in lengths)
    tokens = sum(lengths)
    assert counted.bytes == 4 * (tokens * 3 * heads * d + len(cu_seqlens) + tokens * heads * d + tokens * heads)


def test_bytes_are_those_of_inputs_and_outputs() -> None:
    assert cost(OPS["add"], zeros(3, 7), zeros(7)).bytes == 4 * (21 + 7 + 21)
    assert cost(OPS["add"], *(np.zeros((3, 7)),) * 2).bytes == 8 * 3 * 21
    table, index = zeros(30522, 384), np.zeros(10, np.int32)
    assert cost(OPS["gather_rows"], table, index).bytes == 10 * (2 * 384 * 4 + 4)  # not the whole table


@BY_NAME
def test_a_cost_depends_on_shapes_alone(op: Op) -> None:
    """Not on the values of float arrays: those of NaN cost the same. Views do no arithmetic, all else does some."""
    for arrays, params in samples(op, np.float32):
        nans = tuple(np.full_like(a, np.nan) if a.dtype.kind == "f" else a for a in arrays)
        counted = cost(op, *arrays, **params)
        assert counted == cost(op, *nans, **params)
        assert counted.bytes > 0
    copies = ("reshape", "transpose", "slice_axis", "pad_axis", "concatenate", "broadcast", "where", "gather_rows")
    assert (counted.flops > 0) is (op.name not in (*copies, "relu_grad"))


def test_counting_the_largest_model_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        counted = cost(OPS["linear"], zeros(1 << 20, 4096), zeros(16384, 4096), zeros(16384))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert counted.flops == (1 << 20) * 16384 * (2 * 4096 + 1)
    assert peak < 1_000_000


def test_flops_of_a_training_step_at_bert_shapes_are_known() -> None:
    """linear at the size that bench times: 2 N C I + N I."""
    size = BertSize()
    sample = OPS["linear"].bench(np.random.default_rng(0), size)
    n, c, i = size.tokens, size.hidden, size.intermediate
    assert cost(OPS["linear"], *sample.arrays, **sample.params).flops == 2 * n * c * i + n * i


# What all readings share.

MODULES = {
    "bounded": (bounded_module("float32"), Bounded),
    "dual": (dual_module, Dual),
    "counted": (CountingModule(type("Counting", (Counted,), {"flops": [0]})), Counted),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    "formula",
    [
        lambda xp, x: xp.sinh(x), lambda xp, x: np.exp(x), lambda xp, x: xp.linalg.norm(x), lambda xp, x: xp.cumsum(x),
        lambda xp, x: xp.matmul(x, x), lambda xp, x: np.ones(3) ** x, lambda xp, x: x % 2, lambda xp, x: np.asarray(x),
    ],
)  # fmt: skip
def test_a_primitive_that_readings_do_not_know_is_an_error(formula: Callable[..., Any], name: str) -> None:
    module, _ = MODULES[name]
    with pytest.raises(TypeError):
        formula(module, module.reading.lift(np.ones((3, 3))))


@pytest.mark.parametrize("name", MODULES)
def test_every_reading_knows_every_primitive(name: str) -> None:
    _, reading = MODULES[name]
    placeholders = {Reading.add, Reading.sum}
    missing = [p for p in ARITHMETIC if getattr(reading, p, Reading.add) in placeholders]
    assert missing == []
    assert set(UNARY) < set(ARITHMETIC)


@BY_NAME
def test_every_reading_of_every_op_has_the_shapes_and_values_of_its_formula(op: Op) -> None:
    for arrays, params in samples(op):
        plain = [np.asarray(r) for r in outputs(op.formula(numpy_module, *arrays, **params))]
        bounds = bound(op, *arrays, precision="float64", **params)
        assert [b.value.shape for b in bounds] == [r.shape for r in plain]
        for b, r in zip(bounds, plain, strict=True):
            assert np.all(abs(b.value - r) <= 2 * b.error)
        with np.errstate(divide="ignore", invalid="ignore"):  # at_a_kink: NaN
            tangent = jvp(op, arrays, tuple(a if a.dtype.kind == "f" else None for a in arrays), **params)
        assert tangent.shape == plain[0].shape


def test_readings_compare_and_refuse_powers_they_do_not_know() -> None:
    x = bounded_module("float32").reading.lift(np.array([1.0, 2.0, 3.0]))
    assert (x == 2.0).tolist() == [False, True, False] and (x != 2.0).tolist() == [True, False, True]
    assert (x >= 2.0).tolist() == [False, True, True] and (x <= 2.0).tolist() == [True, True, False]
    for exponent in (-1, 0, 0.5):
        with pytest.raises(TypeError, match="whole powers"):
            x**exponent


def test_long_sums_are_bounded_as_sums_of_blocks() -> None:
    bounded = bounded_module("float32").reading
    assert float(bounded.gamma(2**20)) == float(bounded.gamma(2**30)) < 0.07
    assert np.isinf(float(bounded_module("bfloat16").reading.gamma(2**9)))
    rng = np.random.default_rng(0)
    x = rng.standard_normal(3_000_001).astype("f4")
    (one,) = bound(OPS["square_norm"], x)
    for place in ("numpy", "numba"):
        got = float(backends.get(place).run(OPS["square_norm"], x))
        assert abs(got - float(one.value)) < float(one.error) < 0.1 * float(one.value)


@pytest.mark.parametrize("name", ["cross_entropy", "softmax"])
@pytest.mark.parametrize("least", [-1e4, -1e30, float(np.finfo(np.float32).min)])
def test_what_is_masked_does_not_loosen_the_bound_of_the_rest(name: str, least: float) -> None:
    z = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    masked = np.concatenate([z, np.full((3, 2), least, np.float32)], axis=1)
    labels = (np.array([1, 2, 3]),) if name == "cross_entropy" else ()
    for with_mask, without in zip(bound(OPS[name], masked, *labels), bound(OPS[name], z, *labels), strict=True):
        rest = (..., slice(6)) if without.value.ndim else ...
        np.testing.assert_allclose(with_mask.value[rest], without.value, rtol=1e-12)
        assert (with_mask.error[rest] <= 1.5 * without.error).all()  # two terms more in a sum, which are zero
        assert (with_mask.terms[rest] <= 1.5 * without.terms).all()
        if without.value.ndim:
            assert (with_mask.error[:, 6:] < 1e-30).all()


def test_the_error_of_the_largest_is_that_of_any_that_may_be() -> None:
    value = np.array([[1.0, 1 - 1e-9, -1e30], [1.0, 0.5, -1e30], [1.0, np.nan, 0.0]])
    error = np.array([[1e-12, 1e-3, 1e22]] * 3)
    none = np.zeros(value.shape, np.int32)
    largest = bounded_module("float32").reading(value, error, error, abs(value), none, none).max(axis=-1)
    np.testing.assert_array_equal(largest.value, [1, 1, np.nan])
    np.testing.assert_array_equal(largest.error, [1e-3, 1e-12, 1e22])  # beside NaN nothing is known
    np.testing.assert_array_equal(largest.terms, [1, 1, np.nan])


def test_products_on_tensor_cores_have_a_bound_of_their_own() -> None:
    """tf32 rounds the operands to 10 bits of mantissa: under its bound, over that of float32, and never far under."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((9, 40)).astype(np.float32), rng.standard_normal((40, 7)).astype(np.float32)

    def tf32(x: np.ndarray) -> np.ndarray:
        return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)

    got = (tf32(a) @ tf32(b)).astype(np.float64)
    loose, strict = (bound(OPS["matmul"], a, b, products=mode)[0] for mode in ("tf32", "float32"))
    off = np.abs(got - strict.value)
    assert np.all(off <= loose.error) and np.any(off > strict.error)
    assert np.all(loose.error <= 4 * 2.0**-11 * strict.terms)
