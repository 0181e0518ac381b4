"""Errors stay what they were: the typical error of every op, against that on file.

Being under the hard bound is the verdict; this is the alarm. Of err / (u S) over all elements of all samples the 99.9th
percentile may be four times the one in `expected_errors.json`, and always one unit. After a change that is meant:
MINIBERT_REFRESH=1 python -m pytest tests/kernels/test_regression.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from minibert import backends
from minibert.backends import Backend
from minibert.kernels import OPS
from minibert.kernels.op import Op
from minibert.kernels.readings import PRECISIONS
from minibert.lab.conform.check import Case

FILE = Path(__file__).with_name("expected_errors.json")
REFRESH = os.environ.get("MINIBERT_REFRESH") == "1"
COMMAND = "python -m pytest tests/kernels/test_regression.py"
FACTOR = 4.0  # other processors, other orders of addition
RUN_HERE = ("numpy", "numba")


def typical_error(op: Op, backend: Backend) -> float:
    """The 99.9th percentile of |got - expected| / (u S) in float32."""
    unit, tiny = PRECISIONS["float32"].roundoff, PRECISIONS["float32"].tiny
    case = Case(op, backend, "float32", seed=0)
    errors = []
    for one in case.inputs():
        with np.errstate(all="ignore"):
            results = case.download(case.run(case.upload(one.arrays), one))
        for result, b in zip(results, one.expected, strict=True):
            errors.append((np.abs(result - b.value) / np.maximum(unit * b.terms, tiny)).ravel())
    return float(np.percentile(np.concatenate(errors), 99.9))


@pytest.mark.parametrize("name", RUN_HERE)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_the_typical_error_has_not_grown(op: Op, name: str) -> None:
    error = typical_error(op, backends.get(name))
    recorded = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    if REFRESH:
        recorded.setdefault(op.name, {})[name] = round(error, 3)
        kept = {key: recorded[key] for key in sorted(recorded) if key in OPS}
        FILE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        return
    if name not in recorded.get(op.name, {}):
        pytest.fail(f"{op.name} is not on file. Record it: MINIBERT_REFRESH=1 {COMMAND} -k {op.name}")
    expected = recorded[op.name][name]
    assert error <= max(FACTOR * expected, 1.0), f"{op.name} on {name}: {error:.3g} units, on file {expected:.3g}"


def test_the_alarm_rings_for_a_sum_that_loses_digits() -> None:
    """One after the other in float32, as a naive kernel sums: under the bound, and many times the error on file."""
    square_norm = OPS["square_norm"]
    with backends.get("numpy").using({square_norm: lambda x: np.cumsum(x * x)[-1]}) as numpy:
        error = typical_error(square_norm, numpy)
    assert error > max(FACTOR * json.loads(FILE.read_text(encoding="utf-8"))["square_norm"]["numpy"], 1.0)
