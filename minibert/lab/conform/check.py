"""Put to every op on every backend what it owes. Under pytest, and by `minibert check`, with the same words."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    many_calls,
    order_of_work,
    part_in_step,
    strided_inputs,
)  # fmt: skip
from minibert.lab.conform.drawn import any_size, any_values, propagates, thoroughly
from minibert.lab.conform.empty import empty_inputs, empty_samples
from minibert.lab.conform.guarded import guarded, not_tried, refuse_harm, trial
from minibert.lab.conform.judge import expect, judge_against
from minibert.lab.conform.raised import what_raised


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
    likely_share: float | None = None  # of the error that a sensible evaluation stays under, on numbers as data are
    poor: str = ""  # where that is more than 1: right by the bound, with more error than there has to be
    left_out: str = ""  # of the inputs, and why

    def with_share(self, other: CheckResult) -> CheckResult:
        """Of the same check, put to another share of its inputs."""
        first = min(self, other, key=lambda result: (result.ok, result.inputs))  # the one that failed, and earlier
        measured: dict[str, Any] = {
            name: max((v for v in (getattr(self, name), getattr(other, name)) if v is not None), default=None)
            for name in ("ulp_max", "err_over_us", "bound_share", "likely_share")
        }
        left_out = dict.fromkeys(", ".join(filter(None, (self.left_out, other.left_out))).split(", "))
        return replace(
            first, inputs=self.inputs + other.inputs, poor=self.poor or other.poor, left_out=", ".join(left_out),
            **measured,
        )  # fmt: skip


CHECKS: dict[str, Callable[[Case, Tally], None]] = {
    check.__name__: check
    for check in (  # in this order: what is quick, and then what takes its time
        guarded, follows_formula, part_in_step, any_values, propagates, strided_inputs, inputs_left_alone, empty_inputs,
        deterministic, fresh_output, order_of_work, many_calls, any_size, gradient, gradient_rounding,
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
    is_numpys = case.backend.by(case.op) == "formula" and case.backend.xp is numpy_module
    if name == "empty_inputs":
        return not is_numpys and bool(empty_samples(case.op, case.dtype, case.seed, case.backend.product_mode))
    if name in ("any_size", "any_values", "propagates"):  # NumPy's evaluation of the formula is what they go by
        has_axes = case.op.draw is not None and (name != "any_size" or bool(axes_of(case.op.draw)))
        return has_axes and not is_numpys
    if name == "many_calls":  # what is not ours has them; ours are quick to have them in a process of their own
        from_outside = getattr(case.backend.kernel(case.op), "spec", None) is not None
        return from_outside and bool(not_tried(case))
    if name == "guarded":
        return not not_tried(case)
    if name == "order_of_work":
        return case.backend.by(case.op) == "kernel"
    return True


def run_check(
    name: str, op: Op, backend: Backend, dtype: str, seed: int = 0, allow_poor: bool = False,
    share: tuple[int, int] = (0, 1),
) -> CheckResult:  # fmt: skip
    """Put one demand; a failure, or an exception from a kernel, becomes the message of the result.

    `allow_poor`: a kernel whose error is under the bound, and above what a sensible evaluation has, does not fail.
    """
    return put(CHECKS[name], Case(op, backend, dtype, seed, share=share), allow_poor)


def put(demand: Callable[[Case, Tally], None], case: Case, allow_poor: bool = False) -> CheckResult:
    """The same of any demand."""
    tally, message, verdict = Tally(), "", "fails"
    try:
        with np.errstate(all="ignore"):  # exp(-1e4) may underflow; what the results are is judged
            refuse_harm(demand.__name__, case)
            demand(case, tally)
    except Exception as error:
        where = f"{case.at[0]}: " if case.at else ""
        message = str(error) if isinstance(error, Broken) else where + what_raised(error)
    if tally.poor and not message and not allow_poor:
        message, verdict = tally.poor, "is poor by"
    op, place, name = case.op, case.backend, demand.__name__
    if message:
        command = f"minibert check {op.name} --backend {shlex.quote(_backends.spec_of(place))} --dtype {case.dtype}"
        message = f"{op.name} on {place.name} in {case.dtype} {verdict} {name} (seed {case.seed}): {message}"
        message += f"; again by: {command} --seed {case.seed}"
    return CheckResult(
        op.name, place.name, case.dtype, name, place.by(op), tally.inputs, **tally.worst, ok=not message,
        message=message, likely_share=tally.likely_share, poor=tally.poor, left_out=tally.left_out,
    )  # fmt: skip


def gradient_verdict(results: Iterable[CheckResult]) -> str:
    """Of the results of one op: "exact", "wrong", or "" where it has no gradient or none could be computed."""
    found = next((r for r in results if r.check == "gradient"), None)
    if found is None or (not found.ok and found.bound_share is None):
        return ""
    return "exact" if found.ok else "wrong"


def planned(backend: Backend, op: Op, dtypes: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
    """The (check, dtype) pairs to run: all in each dtype, and formula and gradient in float64 always.

    By default float32, and on the reference backend float64 as well; of a kernel that is not written for one of these
    (`refused`) in the other.
    """
    asked = dtypes or (("float32", "float64") if backend.name == "numpy" else ("float32",))
    always = ("float64",) if "float64" in backend.dtypes else ()
    refusals = refused(backend, op, dtypes)
    if "float32" in refusals:
        asked = always
    for dtype in dict.fromkeys((*asked, *always)):
        for name in () if dtype in refusals else CHECKS:
            if (dtype in asked or name in ("gradient", "follows_formula")) and applies(
                name, Case(op, backend, dtype, 0)
            ):
                yield name, dtype


def refused(backend: Backend, op: Op, dtypes: Sequence[str] | None = None) -> dict[str, str]:
    """The dtypes, of those nobody asked for, that a kernel from outside is not written for, each with why.

    It raises on such arrays, returns others, or has the accuracy of float32 in float64. One that takes neither float32
    nor float64 is not excused.
    """
    if getattr(backend.kernel(op), "spec", None) is None:
        return {}
    usual = [dtype for dtype in ("float32", "float64") if dtype in backend.dtypes]
    if trial(Case(op, backend, (*(dtypes or ()), *usual)[0], 0)).harmful:
        return {}
    why = {dtype: _refusal(Case(op, backend, dtype, 0)) for dtype in usual}
    if all(why.values()):
        return {}
    return {dtype: reason for dtype, reason in why.items() if reason and dtype not in (dtypes or ())}


def _refusal(case: Case) -> str:
    """Why a kernel is not for this dtype, by the first sample; empty if it is, and if it cannot be called here."""
    if trial(case).harmful:
        return ""
    one = case.inputs()[0]
    try:
        with np.errstate(all="ignore"):
            results = case.download(case.run(case.upload(one.arrays), one))
    except Exception as error:
        return f"on arrays of {case.dtype} it raised {str(error).partition(' (arrays of shapes')[0]}"
    for expected, result in zip(one.expected, results, strict=True):
        if result.dtype.name != expected.dtype:
            return f"of arrays of {case.dtype} it makes {result.dtype}"
    if case.dtype == "float64" and not judge_against(one.expected, results).ok:
        narrower = expect(case.op, one.arrays, one.params, "float32")
        if judge_against([b._replace(dtype="float64") for b in narrower], results).ok:
            return "in float64 it has the accuracy of float32"
    return ""


def check(
    ops: Sequence[str | Op] | None = None,
    backends: Sequence[str | Backend] | None = None,
    dtypes: Sequence[str] | None = None,
    seed: int = 0,
    allow_poor: bool = False,
    thorough_seconds: float = 0,
    only: Collection[str] = tuple(CHECKS),
    share: tuple[int, int] = (0, 1),
) -> Iterator[CheckResult]:
    """Put every demand (or `only` some) to `ops` (default: all) on `backends` (default: all that run here), a result at
    a time; `any_size` with a `share` of what it draws: which, of how many.

    Then each op has its share of `thorough_seconds`, in which inputs of any size and values are drawn at random.

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
                harmful = trial(Case(op, backend, dtype, seed)).harmful
                if name in only and (not harmful or name == next(iter(CHECKS))):
                    yield run_check(name, op, backend, dtype, seed, allow_poor, share)
                if harmful:
                    break
    drawn = [(op, place) for op in chosen for place in places if applies("any_values", Case(op, place, "float32", 0))]
    for op, place in drawn if thorough_seconds else ():
        dtype = next((dtype for _, dtype in planned(place, op, dtypes)), "float32")
        yield put(thoroughly(thorough_seconds / len(drawn)), Case(op, place, dtype, seed), allow_poor)


def find_op(op: str | Op) -> Op:
    """The op of that name; UserError if there is none."""
    if isinstance(op, Op):
        return op
    if op not in OPS:
        near = difflib.get_close_matches(op, OPS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(OPS))}"
        raise UserError(f"no op is called {op!r}: {hint}")
    return OPS[op]
