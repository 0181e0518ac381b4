"""Put to every op on every backend what it owes. Under pytest, and by `minibert check`, with the same words."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minibert import backends as _backends
from minibert.backends import Backend
from minibert.errors import UserError
from minibert.kernels import OPS, Op
from minibert.kernels.array_module import numpy_module
from minibert.kernels.drawing import axes_of
from minibert.lab.conform.case import Broken, Case, Tally
from minibert.lab.conform.demands import (
    deterministic,
    follows_formula,
    fresh_output,
    gradient,
    gradient_rounding,
    inputs_left_alone,
    order_of_work,
    part_in_step,
    strided_inputs,
)  # fmt: skip
from minibert.lab.conform.drawn import any_size, any_values, propagates
from minibert.lab.conform.raised import raised_at


@dataclass(frozen=True)
class CheckResult:
    """One check of one op on one backend: the worst over its inputs (None where nothing is measured)."""

    op: str
    backend: str
    dtype: str
    check: str
    by: str  # kernel, library or formula
    inputs: int  # how many were tried
    ulp_max: float | None
    err_over_us: float | None
    bound_share: float | None
    ok: bool
    message: str  # empty if ok; else what was expected, what came, and the command that shows it again


CHECKS: dict[str, Callable[[Case, Tally], None]] = {
    check.__name__: check
    for check in (
        follows_formula, part_in_step, any_size, any_values, propagates, strided_inputs, inputs_left_alone,
        deterministic, fresh_output, order_of_work, gradient, gradient_rounding,
    )
}  # fmt: skip


def applies(name: str, case: Case) -> bool:
    """Whether a check says anything about this case."""
    if name == "gradient":
        return case.op.vjp is not None and case.dtype == "float64"
    if name == "gradient_rounding":
        return case.op.vjp is not None and case.dtype != "float64"
    if name == "part_in_step":  # a formula in float64 is the formula
        return case.dtype != "float64" or case.backend.by(case.op) != "formula"
    if name in ("any_size", "any_values", "propagates"):  # NumPy's evaluation of the formula is what they go by
        is_numpys = case.backend.by(case.op) == "formula" and case.backend.xp is numpy_module
        has_axes = case.op.draw is not None and (name != "any_size" or bool(axes_of(case.op.draw)))
        return has_axes and not is_numpys
    if name == "order_of_work":
        return case.backend.by(case.op) == "kernel"
    return True


def run_check(name: str, op: Op, backend: Backend, dtype: str, seed: int = 0) -> CheckResult:
    """Put one demand; a failure, or an exception from a kernel, becomes the message of the result."""
    case, tally, message = Case(op, backend, dtype, seed), Tally(), ""
    try:
        with np.errstate(all="ignore"):  # exp(-1e4) may underflow; what the results are is judged
            CHECKS[name](case, tally)
    except Exception as error:
        what = str(error)
        if not isinstance(error, Broken | UserError):
            what = f"raised {type(error).__name__}: {error}{raised_at(error)}"
        place = shlex.quote(_backends.spec_of(backend))
        command = f"minibert check {op.name} --backend {place} --dtype {dtype} --seed {seed}"
        message = f"{op.name} on {backend.name} in {dtype} fails {name} (seed {seed}): {what}; again by: {command}"
    return CheckResult(
        op.name, backend.name, dtype, name, backend.by(op), tally.inputs, **tally.worst, ok=not message, message=message
    )


def gradient_verdict(results: Iterable[CheckResult]) -> str:
    """Of the results of one op: "exact", "wrong", or "" where it has no gradient or none could be computed."""
    found = next((r for r in results if r.check == "gradient"), None)
    if found is None or (not found.ok and found.bound_share is None):
        return ""
    return "exact" if found.ok else "wrong"


def planned(backend: Backend, op: Op, dtypes: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
    """The (check, dtype) pairs to run: all in each dtype, and formula and gradient in float64 always.

    By default float32, and on the reference backend float64 as well.
    """
    asked = dtypes or (("float32", "float64") if backend.name == "numpy" else ("float32",))
    always = ("float64",) if "float64" in backend.dtypes else ()
    for dtype in dict.fromkeys((*asked, *always)):
        for name in CHECKS:
            if (dtype in asked or name in ("gradient", "follows_formula")) and applies(
                name, Case(op, backend, dtype, 0)
            ):
                yield name, dtype


def check(
    ops: Sequence[str | Op] | None = None,
    backends: Sequence[str | Backend] | None = None,
    dtypes: Sequence[str] | None = None,
    seed: int = 0,
) -> Iterator[CheckResult]:
    """Put every demand to `ops` (default: all) on `backends` (default: all that run here), a result at a time.

    Raises UserError for an op or dtype that is not known, UserError for an unknown backend and BackendUnavailable for
    one that cannot run.
    """
    chosen = [find_op(op) for op in (OPS if ops is None else ops)]
    if backends is None:
        places = _backends.usual()
    else:
        places = [_backends.get(b) if isinstance(b, str) else b for b in backends]
    for dtype in dtypes or ():
        for backend in places:
            backend.require_dtype(dtype, "dtypes")
    for op in chosen:
        for backend in places:
            for name, dtype in planned(backend, op, dtypes):
                yield run_check(name, op, backend, dtype, seed)


def find_op(op: str | Op) -> Op:
    """The op of that name; UserError if there is none."""
    if isinstance(op, Op):
        return op
    if op not in OPS:
        near = difflib.get_close_matches(op, OPS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(OPS))}"
        raise UserError(f"no op is called {op!r}: {hint}")
    return OPS[op]
