"""What the bound allows to other orders of evaluation, and what a sensible one reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minibert.kernels import OPS
from minibert.kernels.array_module import numpy_module
from minibert.kernels.readings import bounded_module
from minibert.lab.conform.judge import Judgement, judge

F = np.float32

# Factors distributed over sums, terms in any order: right.


def rearranged_layer_norm(x: Any, w: Any, b: Any) -> tuple[Any, ...]:
    mean = x.mean(axis=-1)
    d = x - mean[:, None]
    rstd = 1 / np.sqrt((d * d).mean(axis=-1) + F(1e-12))
    a = rstd[:, None] * w
    return x * a + (b - mean[:, None] * a), mean, rstd


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 33, 768])
def test_a_layer_norm_that_multiplies_out_is_right(columns: int) -> None:
    """y = x a + (b - mean a), a = rstd w: at every offset, and where the bias outweighs the rest."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        for offset in (0, 1, 100, 1e4):
            x = (rng.standard_normal((4, columns)) + offset).astype(F)
            w, b = rng.standard_normal((2, columns)).astype(F)
            for bias in (b, 30 * b):
                assert judge(OPS["layer_norm"], (x, w, bias), {}, rearranged_layer_norm(x, w, bias), "float32").ok


def test_terms_of_a_chain_may_be_added_in_any_order_with_factors_on_each() -> None:
    """((a - b) r + c) w + d, against a r w - b r w + c w + d from left to right in all orders."""
    rng = np.random.default_rng(0)
    module = bounded_module("float32")
    worst = 0.0
    for _ in range(50):
        a, b, r, c, w, d = (rng.standard_normal((6, 200)) * 10.0 ** rng.integers(-3, 4, (6, 200))).astype(F)
        b = np.where(rng.random(200) < 0.5, a * F(1.001), b)
        found = (module.reading.lift(a) - module.reading.lift(b)) * module.reading.lift(r) + module.reading.lift(c)
        found = found * module.reading.lift(w) + module.reading.lift(d)
        rw = r * w if rng.random() < 0.5 else None
        terms = [a * r * w if rw is None else a * rw, -(b * r * w) if rw is None else -(b * rw), c * w, d]
        total = np.zeros_like(a)
        for k in rng.permutation(4):
            total = total + terms[k]
        worst = max(worst, float((np.abs(total - found.value) / found.error).max()))
    assert 0.2 < worst <= 1


# Sums one after the other over random data are not poor; what loses digits is, though under its bound.

DATA: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "of both signs": lambda rng, n: rng.standard_normal(n),
    "exp of normals": lambda rng, n: np.exp(rng.standard_normal(n)),
    "squares": lambda rng, n: rng.standard_normal(n) ** 2,
    "uniform": lambda rng, n: rng.random(n),
    "far from 0": lambda rng, n: (rng.standard_normal(n) + 100) ** 2,
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("count", [2, 16, 256, 3072, 2**17])
def test_a_naive_sum_of_random_numbers_is_not_poor(data: str, count: int) -> None:
    for seed in range(5):
        x = DATA[data](np.random.default_rng(seed), count).astype(F)
        judgement = judge(OPS["reduce_sum"], (x,), {}, np.cumsum(x)[-1], "float32")
        assert judgement.ok and judgement.likely_share < (0.6 if count > 2 else 1)


def naive_layer_norm(x: Any, w: Any, b: Any) -> tuple[Any, ...]:
    def mean(x: Any) -> Any:
        return np.cumsum(x, axis=-1)[:, -1] / F(x.shape[-1])

    d = x - mean(x)[:, None]
    rstd = 1 / np.sqrt(mean(d * d) + F(1e-12))
    return d * rstd[:, None] * w + b, mean(x), rstd


@pytest.mark.parametrize("offset", [0, 100])
def test_a_naive_layer_norm_is_not_poor(offset: float) -> None:
    rng = np.random.default_rng(0)
    for columns in (7, 768, 4096):
        arrays = ((rng.standard_normal((9, columns)) + offset).astype(F), *rng.standard_normal((2, columns)).astype(F))
        judgement = judge(OPS["layer_norm"], arrays, {}, naive_layer_norm(*arrays), "float32")
        assert judgement.ok and judgement.likely_share < 0.6


def tf32(x: np.ndarray) -> np.ndarray:
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(F)


def poor_norm(rng: np.random.Generator) -> tuple[str, Any, Any]:
    x = rng.standard_normal(1_000_000).astype(F)
    return "square_norm", (x,), F(1.05 * (x.astype(float) ** 2).sum())


def product_on_tensor_cores(rng: np.random.Generator) -> tuple[str, Any, Any]:
    a, b = rng.standard_normal((16, 3072)).astype(F), rng.standard_normal((3072, 32)).astype(F)
    return "matmul", (a, b), tf32(a) @ tf32(b)


def exp_to_four_digits(rng: np.random.Generator) -> tuple[str, Any, Any]:
    x = (3 * rng.standard_normal((4, 4096))).astype(F)
    e = (np.exp(x - x.max(axis=-1, keepdims=True)) * (1 + 1e-4 * rng.uniform(-1, 1, x.shape))).astype(F)
    return "softmax", (x,), e / e.sum(axis=-1, keepdims=True)


def sum_in_half_precision(rng: np.random.Generator) -> tuple[str, Any, Any]:
    x = rng.standard_normal((4, 8192)).astype(F)
    return "reduce_sum", (x,), np.cumsum(x.astype(np.float16), axis=-1)[:, -1].astype(F)


def cancelling_variance(rng: np.random.Generator) -> tuple[str, Any, Any]:
    x = (rng.standard_normal((16, 768)) + 400).astype(F)
    w, b = rng.standard_normal((2, 768)).astype(F)
    mean = x.mean(axis=-1)
    rstd = 1 / np.sqrt(np.maximum((x * x).mean(axis=-1) - mean * mean, 0) + F(1e-12))
    return "layer_norm", (x, w, b), ((x - mean[:, None]) * rstd[:, None] * w + b, mean, rstd)


@pytest.mark.parametrize(
    "case", [poor_norm, product_on_tensor_cores, exp_to_four_digits, sum_in_half_precision, cancelling_variance]
)
def test_what_loses_digits_is_poor_where_the_bound_hides_it(case: Any) -> None:
    name, arrays, got = case(np.random.default_rng(0))
    params = {"axis": -1} if name == "reduce_sum" else {}
    judgement = judge(OPS[name], arrays, params, got, "float32")
    assert judgement.ok and judgement.poor
    off, likely = judgement.poorest.off, judgement.poorest.likely  # type: ignore[union-attr]
    assert off / likely == pytest.approx(judgement.likely_share)
    said = f"off by {off:.3g} u S, where sensible orders of evaluation stay under {likely:.3g}"
    assert said in str(judgement.poorest)

    with np.errstate(all="ignore"):
        right = OPS[name].formula(numpy_module, *arrays, **params)
    honest: Judgement = judge(OPS[name], arrays, params, right, "float32")
    assert honest.ok and not honest.poor


def test_what_is_wrong_is_not_called_poor() -> None:
    x = np.ones(10, F)
    judgement = judge(OPS["reduce_sum"], (x,), {}, F(11), "float32")
    assert not judgement.ok and not judgement.poor and judgement.likely_share > 1
