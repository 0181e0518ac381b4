"""A gradient kernel may make again what the forward kept: mean and rstd of a layer norm, attention's sum of g y."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.kernels import OPS
from minibert.kernels.array_module import numpy_module
from minibert.kernels.attention import _dropout, _merge, _parts, _split, mask_width, spans
from minibert.kernels.dropout import dropout_formula
from minibert.kernels.op import Op, outputs
from minibert.kernels.readings import bound, exact
from minibert.lab.conform.check import run_check
from minibert.lab.conform.judge import expect, judge_against, stored_as


def statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, deviations and rstd, as a kernel makes them again."""
    mean = x.mean(axis=-1)
    d = x - mean[:, None]
    return mean, d, 1 / np.sqrt((d * d).mean(axis=-1) + x.dtype.type(1e-12))


def layer_norm_grad(g: Any, x: Any, w: Any, mean: Any, rstd: Any) -> tuple[Any, ...]:
    _, d, rstd = statistics(x)
    n = d * rstd[:, None]
    h = g * w
    dx = (h - h.mean(axis=-1, keepdims=True) - n * (h * n).mean(axis=-1, keepdims=True)) * rstd[:, None]
    return dx, (g * n).sum(axis=0), g.sum(axis=0)


def add_layer_norm_grad(g: Any, z: Any, w: Any, mean: Any, rstd: Any, **dropout: Any) -> tuple[Any, ...]:
    dz, dw, db = layer_norm_grad(g, z, w, mean, rstd)
    return dropout_formula(numpy_module, dz, **{"rate": 0.0, "stream": None, **dropout}), dz, dw, db


def attention_grad(
    g: Any, qkv: Any, y: Any, lse: Any, cu_seqlens: Any, *, num_heads: int, rate: float = 0.0, stream: Any = None
) -> Any:
    """With p by its own softmax, and sum p dp instead of sum g y."""
    width, rows = mask_width(cu_seqlens), []
    for span in spans(cu_seqlens):
        q, k, v = _parts(qkv, span, num_heads)
        gy, scale = _split(g, span, num_heads), g.dtype.type(q.shape[2] ** -0.5)
        scores = q @ k.swapaxes(1, 2) * scale
        e = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p = e / e.sum(axis=-1, keepdims=True)
        dropped = _dropout(numpy_module, span, num_heads, width, rate, stream)
        dp = dropped(gy @ v.swapaxes(1, 2))
        dv = dropped(p).swapaxes(1, 2) @ gy
        ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * scale
        rows.append(np.concatenate([_merge(ds @ k), _merge(ds.swapaxes(1, 2) @ q), _merge(dv)], axis=1))
    return np.concatenate(rows)


KERNELS: dict[str, Callable[..., Any]] = {
    "layer_norm_grad": layer_norm_grad, "add_layer_norm_grad": add_layer_norm_grad, "attention_grad": attention_grad,
}  # fmt: skip
KEEPING = [op for op in OPS.values() if op.kept is not None and op.name in KERNELS]


def test_every_op_that_says_what_was_kept_is_tested_here() -> None:
    assert {op.name for op in KEEPING} == set(KERNELS)


def share(op: Op, kernel: Callable[..., Any], arrays: Any, params: Any, dtype: str = "float32") -> float:
    """Of the bound, that a float32 evaluation uses up whose results are stored in `dtype`."""
    given = [np.asarray(a, kind) for a, kind in zip(arrays, stored_as(op, arrays, dtype), strict=True)]
    wide = [np.asarray(a, np.float32) if a.dtype.kind == "f" else a for a in given]
    with np.errstate(all="ignore"):
        expected = expect(op, given, params, dtype)
        results = zip(outputs(kernel(*wide, **params)), expected, strict=True)
        judgement = judge_against(expected, tuple(np.asarray(r, b.dtype) for r, b in results))
    assert not judgement.problem and not judgement.unbounded
    return judgement.bound_share


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("op", KEEPING, ids=lambda op: op.name)
def test_a_kernel_that_makes_it_again_is_right(op: Op, dtype: str) -> None:
    for seed in range(20):
        for arrays, params in islice(op.samples(np.random.default_rng(seed)), 5 if seed < 2 else 2):
            assert share(op, KERNELS[op.name], arrays, params, dtype) <= 1


def test_its_own_checks_say_so_as_well() -> None:
    numpy = backends.get("numpy")
    with numpy.using({op: KERNELS[op.name] for op in KEEPING}):
        for name, op in [("layer_norm", "layer_norm_grad"), ("add_layer_norm", "add_layer_norm_grad")]:
            assert run_check("follows_formula", OPS[op], numpy, "float32").message == ""
            failed = run_check("gradient_rounding", OPS[name], numpy, "float32").message
            # the last sample has another eps, which a gradient is not told
            assert "params {'eps': 0.1" in failed and "its gradient calls" in failed


@pytest.mark.parametrize("op", KEEPING, ids=lambda op: op.name)
def test_what_was_kept_is_what_the_samples_hold(op: Op) -> None:
    """For NumPy's arrays, for lifted ones, and where nothing is yet in their place."""
    assert op.kept is not None
    for arrays, params in islice(op.samples(np.random.default_rng(0)), 3):
        absent = [None if i in op.kept(numpy_module, *arrays, **params) else a for i, a in enumerate(arrays)]
        for i, made in op.kept(numpy_module, *absent, **params).items():
            np.testing.assert_allclose(made, arrays[i], rtol=1e-12, atol=1e-14)


def test_what_no_forward_kept_has_no_error() -> None:
    """Statistics of other rows are taken as they are: a kernel that makes its own from x is wrong then."""
    op = OPS["layer_norm_grad"]
    arrays, params = next(op.samples(np.random.default_rng(0)))
    g, x, w, mean, rstd = (np.asarray(a, np.float32) for a in arrays)
    others = (g, x, w, mean + np.float32(1e-3), rstd)
    assert share(op, layer_norm_grad, arrays, params) <= 1 < share(op, layer_norm_grad, others, params)

    def numpy(*arrays: Any) -> Any:
        return op.formula(numpy_module, *arrays)

    assert share(op, numpy, others, params) <= 1
    kept, other = (bound(op, *a)[1] for a in ((g, x, w, mean, rstd), others))
    assert np.all(kept.error > other.error)


def test_where_the_kept_may_be_rounded_nothing_is_exact() -> None:
    op, ones = OPS["layer_norm_grad"], np.ones((2, 4))
    x = np.array([[1.0, -1, 1, -1], [3, -3, 3, -3]])
    mean = x.mean(axis=-1)
    assert not exact(op, ones, x, ones[0], mean, np.array([1.0, 1 / 3]))[1].any()  # dw = sum g (x - mean) rstd
    assert exact(op, ones, x, ones[0], mean + 1, np.array([0.5, 2.0]))[1].all()  # which no forward keeps
