"""Faults that only some size, some values or some call show are found on drawn inputs, and told by the smallest."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.kernels import OPS
from minibert.kernels.array_module import numpy_module
from minibert.kernels.op import outputs
from minibert.lab.conform.case import Case
from minibert.lab.conform.check import CheckResult, put, refused, run_check
from minibert.lab.conform.drawn import thoroughly

NUMPY = backends.get("numpy")


def honest(name: str, *arrays: np.ndarray, **params: Any) -> Any:
    return OPS[name].formula(numpy_module, *arrays, **params)


def checked(name: str, kernel: Callable[..., Any], check: str, **given: Any) -> CheckResult:
    with NUMPY.using({OPS[name]: kernel}):
        return run_check(check, OPS[name], NUMPY, "float32", **given)


def first_rows(count: int) -> Callable[..., np.ndarray]:
    def softmax(x: np.ndarray) -> np.ndarray:
        y = np.zeros_like(x)
        y[:count] = honest("softmax", x[:count])
        return y

    return softmax


def first_columns(count: int) -> Callable[..., np.ndarray]:
    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e[..., :count].sum(axis=-1, keepdims=True)

    return softmax


def lost(x: np.ndarray) -> np.ndarray:
    """One element of 100000: under any bound that a sum of so many has."""
    kept = x.copy()
    if x.size > 100_000:
        kept[777] = 0
    return np.asarray((kept * kept).sum(), np.float32)


def starts_at_zero(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - np.maximum(x.max(axis=-1, keepdims=True), 0))
    return e / e.sum(axis=-1, keepdims=True)


def minus_log(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _, dlogits = honest("cross_entropy", logits, labels)
    p = honest("softmax", logits)
    kept = labels != -100
    losses = -np.log(p[np.arange(len(labels)), labels * kept])
    return np.asarray((losses * kept).sum() / max(1, kept.sum()), np.float32), dlogits


def mean_of_none(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    loss, dlogits = honest("cross_entropy", logits, labels)
    return np.float32(loss) / np.float32(labels[labels != -100].size > 0), dlogits


@pytest.mark.parametrize(
    ("op", "kernel", "check", "smallest"),
    [
        ("softmax", first_rows(512), "any_size", "513 rows, "),
        ("softmax", first_rows(65535), "any_size", "65536 rows, "),
        ("softmax", first_columns(2048), "any_size", " 2049 columns"),
        ("square_norm", lost, "any_size", "100001 count"),
        ("softmax", starts_at_zero, "any_values", "values about -10000"),
        ("cross_entropy", minus_log, "any_values", "loss: expected "),
        ("cross_entropy", mean_of_none, "any_values", "expected 0, got nan"),
        ("relu", lambda x: np.where(x > 0, x, np.float32(0)), "propagates", "is nan: y["),
        ("layer_norm", lambda x, w, b, eps=1e-12: honest("layer_norm", np.nan_to_num(x), w, b, eps=eps), "propagates",
         "x["),
        ("softmax", lambda x: honest("softmax", x) + 0 * x.sum(), "propagates", "got nan"),
    ],
)  # fmt: skip
def test_found_and_told_by_the_smallest(op: str, kernel: Callable[..., Any], check: str, smallest: str) -> None:
    result = checked(op, kernel, check)
    assert not result.ok
    assert smallest in result.message


def test_the_row_whose_value_it_got_is_told() -> None:
    def softmax(x: np.ndarray) -> np.ndarray:
        y = honest("softmax", x)
        if y.ndim == 2 and len(y) > 512:
            y[512:] = y[511]
        return y

    result = checked("softmax", softmax, "part_in_step")
    assert "that is the value of y[511, " in result.message


def a_thousandth_too_large(x: np.ndarray) -> np.ndarray:
    """Within the worst case of so many terms, and far from what sums need to lose."""
    return np.asarray((x * x).sum() * np.float32(1.001), np.float32)


def test_poor_is_no_more_than_that_and_can_be_allowed() -> None:
    result = checked("square_norm", a_thousandth_too_large, "part_in_step")
    assert not result.ok and " is poor by part_in_step" in result.message
    assert "u S, where sensible orders of evaluation stay under" in result.message
    allowed = checked("square_norm", a_thousandth_too_large, "part_in_step", allow_poor=True)
    assert allowed.ok and allowed.poor and allowed.likely_share is not None and allowed.likely_share > 1


class Given:
    """As a kernel that --kernel names."""

    spec = "mine.py:kernel=gelu"

    def __init__(self, kernel: Callable[..., Any]) -> None:
        self.kernel = kernel

    def __call__(self, *arrays: Any, **params: Any) -> Any:
        return self.kernel(*arrays, **params)


def only(dtype: str) -> Callable[..., Any]:
    def gelu(x: np.ndarray, approximate: str = "none") -> np.ndarray:
        if x.dtype != dtype:
            raise TypeError(f"no matching definition for {x.dtype}")
        return honest("gelu", x, approximate=approximate)

    return gelu


@pytest.mark.parametrize(
    ("kernel", "dtypes", "expected"),
    [
        (only("float32"), None, {"float64": "on arrays of float64 it raised no matching definition for float64"}),
        (only("float64"), None, {"float32": "on arrays of float32 it raised no matching definition for float32"}),
        (lambda x, approximate: np.float32(honest("gelu", x, approximate=approximate)), None,
         {"float64": "of arrays of float64 it makes float32"}),
        (lambda x, approximate: honest("gelu", x.astype("f4"), approximate=approximate).astype(x.dtype), None,
         {"float64": "in float64 it has the accuracy of float32"}),
        (only("float32"), ["float64"], {}),
        (only("float16"), None, {}),
        (lambda x, approximate: honest("gelu", x, approximate=approximate) * x.dtype.type(1.01), None, {}),
    ],
)  # fmt: skip
def test_a_kernel_is_checked_in_the_dtype_that_it_is_written_for(
    kernel: Callable[..., Any], dtypes: list[str] | None, expected: dict[str, str]
) -> None:
    with NUMPY.using({OPS["gelu"]: Given(kernel)}):
        assert refused(NUMPY, OPS["gelu"], dtypes) == expected


def test_what_lies_between_the_sizes_is_found_by_going_on() -> None:
    def softmax(x: np.ndarray) -> np.ndarray:
        y = honest("softmax", x)
        return np.zeros_like(y) if y.ndim == 2 and 40 < len(y) < 130 and 40 < y.shape[1] < 130 else y

    assert checked("softmax", softmax, "any_size").ok
    with NUMPY.using({OPS["softmax"]: softmax}):
        result = put(thoroughly(20.0), Case(OPS["softmax"], NUMPY, "float32", 0))
    assert not result.ok
    assert "41 rows, 41 columns" in result.message


def test_every_output_of_every_op_is_judged_by_the_bit_or_as_random_numbers() -> None:
    """So that the demands on any size say something of each op that has a kernel."""
    numba = pytest.importorskip("minibert.backends.numba_backend").backend
    for op in OPS.values():
        if numba.by(op) != "formula":
            arrays, params = next(iter(op.samples(np.random.default_rng(0))))
            assert op.draw is not None and outputs(op.formula(numpy_module, *arrays, **params))


def test_shares_of_what_is_drawn_are_the_whole() -> None:
    place = backends.get("numba")
    whole = run_check("any_size", OPS["gelu"], place, "float32")
    shares = [run_check("any_size", OPS["gelu"], place, "float32", share=(k, 4)) for k in range(4)]
    assert all(0 < share.inputs < whole.inputs for share in shares)
    assert reduce(CheckResult.with_share, shares) == whole


def test_a_share_that_fails_is_told() -> None:
    place = backends.get("numpy")
    with place.using({OPS["relu"]: first_rows_of_relu}):
        shares = [run_check("any_size", OPS["relu"], place, "float32", share=(k, 4)) for k in range(4)]
    found = reduce(CheckResult.with_share, shares)
    assert not found.ok and found.message in [share.message for share in shares if not share.ok]
    assert found.inputs == sum(share.inputs for share in shares)


def first_rows_of_relu(x: np.ndarray) -> np.ndarray:
    """Rows after the 100000th are left as they are."""
    return np.concatenate([np.maximum(x[:100_000], 0), x[100_000:]])
