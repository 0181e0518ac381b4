"""What messages call the arrays of an op: as its formula does."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.kernels import OPS
from minibert.kernels.op import Op, input_name, output_name, outputs


def named(op: Op) -> tuple[list[str], list[str]]:
    """Inputs and outputs of one call."""
    arrays, params = next(iter(op.samples(np.random.default_rng(0))))
    results = outputs(op.formula(backends.get("numpy").xp, *arrays, **params))
    return [input_name(op, i) for i in range(len(arrays))], [output_name(op, k) for k in range(len(results))]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_array_of_every_op_has_a_name_of_its_own(op: Op) -> None:
    given, got = named(op)
    assert len(set(given)) == len(given) and len(set(got)) == len(got)
    assert not any(name.startswith("output ") for name in got), "the formula's last line returns an expression"
    said = str(sys.modules[op.family].__doc__)
    residuals = [name for name in got[1:] if name not in given]
    assert all(re.search(rf"\b{name}\b", said) for name in residuals), "the family's docstring knows no such array"


@pytest.mark.parametrize(
    ("op", "given", "got"),
    [
        ("add_layer_norm", ["x", "residual", "weight", "bias"], ["y", "z", "mean", "rstd"]),
        ("linear_grad", ["g", "x"], ["dw", "db"]),
        ("softmax_grad", ["g", "y"], ["dx"]),
        ("cross_entropy", ["logits", "labels"], ["loss", "dlogits"]),
        ("concatenate", ["arrays 0", "arrays 1"], ["y"]),
        ("adamw", ["param", "grad", "exp_avg", "exp_avg_sq", "grad_scale"], ["param", "exp_avg", "exp_avg_sq"]),
    ],
)
def test_they_are_those_of_the_formula(op: str, given: list[str], got: list[str]) -> None:
    assert named(OPS[op]) == (given, got)


def of_formula(formula: Any) -> Any:
    return SimpleNamespace(formula=formula, writes=())


def both_of_them(xp: Any, x: Any) -> Any:
    def inner() -> Any:
        other = x
        return other

    rstd = x
    return inner() + 1, rstd, x + 1


def test_what_the_formula_does_not_name_is_numbered() -> None:
    op = of_formula(both_of_them)
    assert [output_name(op, k) for k in range(4)] == ["y", "rstd", "output 2", "output 3"]
    assert output_name(of_formula(lambda xp, x: x), 0) == "y"
    made: dict[str, Any] = {}
    exec("def f(xp, x):\n    z = x\n    return x, z", made)
    assert [output_name(of_formula(made["f"]), k) for k in range(2)] == ["y", "output 1"], "there is no source to read"
