"""What every backend owes to every op. Under pytest, and by `minibert check`, with the same words.

Each function of `CHECKS` puts one demand to one op on one backend; its docstring's first line says which. It returns
what it measured, or raises `Broken` with what a person needs to see the failure again. Nothing here knows an op: inputs
come from the op's samples, the truth from its formula (`lab.conform.judge`) and from its derivative on dual numbers.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from minibert import backends as _backends
from minibert.backends import Backend
from minibert.errors import UserError
from minibert.kernels import OPS, Array, Op
from minibert.kernels.op import BertSize, Sample, holds_floats, input_name, outputs
from minibert.kernels.readings import Bound, bounded_module, jvp
from minibert.lab.conform.judge import Judgement, expect, judge, judge_against, misshapen, stored_as
from minibert.lab.conform.raised import raised_at

# <J v, w> and <v, vjp(w)> are equal in exact arithmetic. The gradient's own rounding is bounded by running error
# analysis of the vjp in float64 (so that a gradient which cancels, as that of layer_norm over two columns, is judged by
# what it cancels from); J v commits about as much by the other road, and the bounds are worst cases: twice is ample.
GRADIENT_BOUNDS = 2.0
DOT_ROUNDING = 1e-14  # of the sum of absolute terms: pairwise summation of up to 1e6 products in float64


# A step with as many rows as that of MiniLM, which is timed, and narrower; what plays a machine gets fewer.
SHAPE, EMULATED_SHAPE = BertSize(8, 128, 64, 2, 256, 1000, 154), BertSize(4, 32, 64, 2, 256, 500, 19)
STEP = -1  # an input's number, where it is no sample but the op's part in such a step


class Broken(Exception):
    """A demand is not met; the message says where and by how much."""


class Input(NamedTuple):
    """A sample as a backend sees it: floats rounded to the dtype; and what the formula says of it."""

    number: int  # of the sample, or STEP
    arrays: tuple[np.ndarray, ...]
    params: dict[str, Any]
    expected: list[Bound]


@dataclass(frozen=True)
class Case:
    """One op on one backend in one dtype, with the seed of its inputs."""

    op: Op
    backend: Backend
    dtype: str
    seed: int

    def inputs(self, seed_offset: int = 0) -> tuple[Input, ...]:
        return _inputs(self.op, self.dtype, self.seed + seed_offset, self.backend.product_mode)

    def part_in_step(self, size: BertSize | None = None) -> Input:
        """What the op gets in a training step of such a size; by default one that is quickly judged."""
        usual = EMULATED_SHAPE if self.backend.emulated else SHAPE
        return _part_in_step(self.op, self.dtype, self.seed, self.backend.product_mode, size or usual)

    def upload(self, arrays: Iterable[np.ndarray]) -> list[Array]:
        return [self.backend.asarray(a.copy()) for a in arrays]

    def run(self, arrays: Iterable[Array], one: Input) -> tuple[Array, ...]:
        """The results on the uploaded arrays of an input. Raises Broken where what reads them would stumble."""
        results = outputs(self.backend.run(self.op, *arrays, **one.params))
        problem = misshapen(one.expected, results)
        if problem:
            raise Broken(f"{_describe(one.number, one.arrays, one.params)}: {problem}")
        return results

    def download(self, results: Iterable[Array]) -> tuple[np.ndarray, ...]:
        return tuple(self.backend.numpy(r) for r in results)


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


@lru_cache(maxsize=6)
def _inputs(op: Op, dtype: str, seed: int, products: str) -> tuple[Input, ...]:
    """The samples of one op, with their bounds: kept for the next checks of the same op."""
    samples = enumerate(op.samples(np.random.default_rng(seed)))
    return tuple(_input(op, number, sample, dtype, products) for number, sample in samples)


@lru_cache(maxsize=2)
def _part_in_step(op: Op, dtype: str, seed: int, products: str, size: BertSize) -> Input:
    return _input(op, STEP, op.bench(np.random.default_rng(seed), size), dtype, products)


def _input(op: Op, number: int, sample: Sample, dtype: str, products: str) -> Input:
    given = tuple(np.asarray(a) for a in sample.arrays)
    kinds = stored_as(op, given, dtype)
    rounded = tuple(np.asarray(a, kind) for a, kind in zip(given, kinds, strict=True))
    params = dict(sample.params)
    return Input(number, rounded, params, expect(op, rounded, params, dtype, products))


class Tally:
    """The worst of many judgements; the first that fails is raised."""

    def __init__(self) -> None:
        self.inputs = 0
        self.worst: dict[str, float | None] = {"ulp_max": None, "err_over_us": None, "bound_share": None}

    def note(self, **measured: float) -> None:
        for name, value in measured.items():
            self.worst[name] = max(self.worst[name] or 0.0, value)

    def judge(self, case: Case, one: Input, results: Iterable[Array], what: str = "") -> None:
        judgement = judge_against(one.expected, case.download(results))
        self.add(judgement, f"{_describe(one.number, one.arrays, one.params)}{what}")

    def add(self, judgement: Judgement, where: str) -> None:
        if not judgement.problem:  # with one nothing was measured
            self.note(**{name: getattr(judgement, name) for name in self.worst})
        if not judgement.ok:
            raise Broken(f"{where}: {judgement.problem or judgement.worst}")
        if judgement.unbounded:
            raise Broken(f"{where}: the bound is infinite on {judgement.unbounded} elements, so it would pass anything")


def _describe(number: int, arrays: Iterable[Array], params: dict[str, Any]) -> str:
    shapes = ", ".join(str(tuple(a.shape)) for a in arrays)
    what = "part in a step" if number == STEP else f"sample {number}"
    return f"{what} (shapes {shapes}; params {params})"


def follows_formula(case: Case, tally: Tally) -> None:
    """Every element of every output lies under the bound that its formula implies; dtype and shape are right."""
    for one in case.inputs():
        tally.judge(case, one, case.run(case.upload(one.arrays), one))
        tally.inputs += 1


def part_in_step(case: Case, tally: Tally) -> None:
    """The same for the op's part in a training step of BERT: for as many rows as where kernels are timed."""
    one = case.part_in_step()
    tally.judge(case, one, case.run(case.upload(one.arrays), one))
    tally.inputs += 1


def strided_inputs(case: Case, tally: Tally) -> None:
    """The same for inputs that are not contiguous: every second element, reversed, and stored column by column."""

    def every_second(a: np.ndarray) -> np.ndarray:
        wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
        wide[..., ::2] = a
        return wide[..., ::2]

    layouts = {
        "every second": every_second,
        "reversed": lambda a: a[::-1].copy()[::-1],
        "by columns": lambda a: a.swapaxes(-1, -2).copy().swapaxes(-1, -2) if a.ndim > 1 else a.copy(),
    }
    for one in case.inputs():
        for name, lay_out in layouts.items():
            # (a backend on a device may make them contiguous on the way there: then this repeats what was asked before)
            arrays = [case.backend.asarray(lay_out(a)) if a.ndim else case.backend.asarray(a) for a in one.arrays]
            tally.judge(case, one, case.run(arrays, one), f", inputs laid out {name}")
            tally.inputs += 1


def inputs_left_alone(case: Case, tally: Tally) -> None:
    """No input changes, except those that the op says it writes, and these hold the result."""
    for one in case.inputs():
        arrays = case.upload(one.arrays)
        case.run(arrays, one)
        if case.op.writes:
            tally.judge(case, one, [arrays[i] for i in case.op.writes], ", read from the arrays it should have written")
        for i, (before, after) in enumerate(zip(one.arrays, case.download(arrays), strict=True)):
            if i not in case.op.writes and not _same_bits(before, after):
                where = _describe(one.number, one.arrays, one.params)
                raise Broken(f"{where}: input {input_name(case.op, i)} was changed")
        tally.inputs += 1


def deterministic(case: Case, tally: Tally) -> None:
    """Two runs on the same inputs give the same bits."""
    for one in case.inputs():
        first, second = (case.download(case.run(case.upload(one.arrays), one)) for _ in range(2))
        _demand_same_bits(one, first, second, "a second run gave other bits")
        tally.inputs += 1


def fresh_output(case: Case, tally: Tally) -> None:
    """A result is written anew, in memory of its own: nothing cached, no buffer shared, no element left unwritten."""
    for one, other in zip(case.inputs(), case.inputs(seed_offset=1), strict=True):
        arrays = case.upload(one.arrays)
        result = case.run(arrays, one)
        _no_views_but_the_formulas(case, one, arrays, result)
        kept = [r.copy() for r in case.download(result)]
        for b in other.expected:  # memory that the allocator will hand out next holds no plausible number
            np.full(b.value.shape, np.nan, case.dtype)
        second = case.run(case.upload(other.arrays), other)
        tally.judge(case, other, second, ", run after another input of its shapes")
        _demand_same_bits(one, kept, case.download(result), "a later run changed the result of an earlier one")
        tally.inputs += 1


def _no_views_but_the_formulas(case: Case, one: Input, arrays: Sequence[Array], result: Sequence[Array]) -> None:
    """A result may lie in an input's memory only where NumPy's result of the formula is a view of it."""
    reference = _backends.get("numpy").xp
    plain = None
    for k, r in enumerate(result):
        for i, a in enumerate(arrays):
            if i in case.op.writes or not (isinstance(r, np.ndarray) and isinstance(a, np.ndarray)):
                continue
            if np.may_share_memory(r, a):
                plain = plain or outputs(case.op.formula(reference, *one.arrays, **one.params))
                if not np.may_share_memory(plain[k], one.arrays[i]):
                    where = _describe(one.number, one.arrays, one.params)
                    lies = f"output {one.expected[k].name} lies in the memory of input {input_name(case.op, i)}"
                    raise Broken(f"{where}: {lies}; the formula makes a new array")


def order_of_work(case: Case, tally: Tally) -> None:
    """A kernel gives the same bits however its work is divided and ordered: threads of a CPU, blocks of a GPU."""

    for one in case.inputs():
        first: tuple[str, tuple[np.ndarray, ...]] | None = None
        for order, ordered in case.backend.orders():
            with ordered:
                results = case.download(case.run(case.upload(one.arrays), one))
            if first is None:
                first = order, results
            _demand_same_bits(one, first[1], results, f"{order} gave other bits than {first[0]}")
        tally.inputs += 1


def gradient(case: Case, tally: Tally) -> None:
    """<J v, w> = <v, vjp(w)> for each input alone: J v from the formula on dual numbers, vjp(w) run on the backend."""
    assert case.op.vjp is not None
    for one in case.inputs():
        rng = np.random.default_rng((case.seed, one.number))
        arrays = case.upload(one.arrays)
        outs = case.run(arrays, one)
        for _ in range(2):  # cotangents: the second finds a gradient that was kept from the first
            w = rng.standard_normal(outs[0].shape)
            grads = case.op.vjp(case.backend.run, case.backend.asarray(w.copy()), outs, *arrays, **one.params)
            tally.note(bound_share=0.0)  # a gradient was computed, right or wrong
            _gradient_of_each(case, tally, one, w, grads, _gradient_errors(case.op, w, one), rng)
        tally.inputs += 1


def _gradient_errors(op: Op, w: np.ndarray, one: Input) -> list[np.ndarray | None]:
    """What rounding to float64 may do to each gradient: the vjp itself, read for its error."""
    module = bounded_module("float64")
    lift = module.reading.lift
    arrays = [lift(a) if holds_floats(a) else a for a in one.arrays]
    outs = tuple(map(lift, outputs(op.formula(module, *arrays, **one.params))))
    assert op.vjp is not None

    def run(op: Op, *arrays: Any, **params: Any) -> Any:
        return op.formula(module, *arrays, **params)

    grads = op.vjp(run, lift(w), outs, *arrays, **one.params)
    return [None if g is None else lift(g).error for g in grads]


def _gradient_of_each(
    case: Case, tally: Tally, one: Input, w: np.ndarray, grads: Sequence[Any], errors: Sequence[Any],
    rng: np.random.Generator,
) -> None:  # fmt: skip
    where = _describe(one.number, one.arrays, one.params)
    if len(grads) != len(one.arrays):
        raise Broken(f"{where}: expected {len(one.arrays)} gradients, one per array, got {len(grads)}")
    for i, (a, grad) in enumerate(zip(one.arrays, grads, strict=True)):
        name = input_name(case.op, i)
        if not holds_floats(a):
            if grad is not None:
                raise Broken(f"{where}: input {name} holds {a.dtype}, so its gradient must be None")
            continue
        if grad is None:
            raise Broken(f"{where}: no gradient of {name}")
        grad = case.backend.numpy(grad)
        if grad.shape != a.shape or grad.dtype != a.dtype:
            raise Broken(f"{where}: gradient of {name}: expected {a.dtype} {a.shape}, got {grad.dtype} {grad.shape}")
        for _ in range(2):  # directions
            v = rng.standard_normal(a.shape)
            tangents = tuple(v if j == i else None for j in range(len(one.arrays)))
            left, right = jvp(case.op, one.arrays, tangents, **one.params) * w, v * grad
            rounding = GRADIENT_BOUNDS * float((np.abs(v) * errors[i]).sum())
            allowed = rounding + DOT_ROUNDING * float(np.abs(left).sum() + np.abs(right).sum())
            if not np.isfinite(allowed):
                raise Broken(f"{where}: gradient of {name}: the bound of its rounding is infinite")
            apart = abs(left.sum() - right.sum())
            if not apart <= allowed:
                raise Broken(
                    f"{where}: gradient of {name}: <J v, w> = {left.sum():.15g}, <v, vjp(w)> = {right.sum():.15g}, "
                    f"apart by {apart:.3g}, allowed {allowed:.3g}"
                )
            tally.note(bound_share=apart / allowed if apart else 0.0)


def gradient_rounding(case: Case, tally: Tally) -> None:
    """Every op that the gradient calls, on the arrays it really gets (views, broadcasts), lies under its bound."""
    assert case.op.vjp is not None

    backend = case.backend

    def watch(op: Op, arrays: tuple[Array, ...], params: Any, call: Callable[[], Any]) -> Any:
        before = [a.copy() for a in case.download(arrays)]
        result = call()
        judgement = judge(op, before, params, case.download(outputs(result)), case.dtype, backend.product_mode)
        tally.add(judgement, f"{where}: its gradient calls {op.name}, {_describe(one.number, before, params)}")
        return result

    for one in case.inputs():
        where = _describe(one.number, one.arrays, one.params)
        arrays = case.upload(one.arrays)
        outs = case.run(arrays, one)
        w = np.random.default_rng((case.seed, one.number)).standard_normal(outs[0].shape).astype(outs[0].dtype)
        with case.backend.watched_by(watch):
            case.op.vjp(case.backend.run, case.backend.asarray(w), outs, *arrays, **one.params)
        tally.inputs += 1


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _demand_same_bits(one: Input, first: Sequence[np.ndarray], second: Sequence[np.ndarray], otherwise: str) -> None:
    for expected, a, b in zip(one.expected, first, second, strict=True):
        if not _same_bits(a, b):
            where = _describe(one.number, one.arrays, one.params)
            raise Broken(f"{where}: output {expected.name}: {otherwise}")


CHECKS: dict[str, Callable[[Case, Tally], None]] = {
    check.__name__: check
    for check in (
        follows_formula, part_in_step, strided_inputs, inputs_left_alone, deterministic, fresh_output, order_of_work,
        gradient, gradient_rounding,
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
            backend.require_dtype(dtype)
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
