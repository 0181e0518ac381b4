"""What every backend owes to every op: a function for each demand; its docstring's first line says which.

It returns what it measured in the tally, or raises `Broken` with what a person needs to see the failure again. Nothing
here knows an op: inputs come from the op's samples, the truth from its formula (`lab.conform.judge`) and from its
derivative on dual numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minibert import backends
from minibert.kernels import Array, Op
from minibert.kernels.op import holds_floats, input_name, outputs
from minibert.kernels.readings import bounded_module, jvp
from minibert.lab.conform.case import Broken, Case, Input, Tally, demand_same_bits, same_bits, shapes_and_params
from minibert.lab.conform.judge import judge
from minibert.lab.conform.layouts import LAYOUTS

# <J v, w> and <v, vjp(w)> are equal in exact arithmetic. The gradient's own rounding is bounded by running error
# analysis of the vjp in float64 (so that a gradient which cancels, as that of layer_norm over two columns, is judged by
# what it cancels from); J v commits about as much by the other road, and the bounds are worst cases: twice is ample.
GRADIENT_BOUNDS = 2.0
CALLS, MANY_ELEMENTS, MANY_SECONDS = 1000, 4000, 10.0
HELD = 18  # results that are kept while more are made
DOT_ROUNDING = 1e-14  # of the sum of absolute terms: pairwise summation of up to 1e6 products in float64


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
    for one in case.inputs():
        for name, lay_out in LAYOUTS.items():
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
            if i not in case.op.writes and not same_bits(before, after):
                raise Broken(f"{one}: input {input_name(case.op, i)} was changed")
        tally.inputs += 1


def deterministic(case: Case, tally: Tally) -> None:
    """Two runs on the same inputs give the same bits."""
    for one in case.inputs():
        first, second = (case.download(case.run(case.upload(one.arrays), one)) for _ in range(2))
        demand_same_bits(one, first, second, "a second run gave other bits")
        tally.inputs += 1


def fresh_output(case: Case, tally: Tally) -> None:
    """A result is written anew, in memory of its own: nothing cached, no buffer shared, no element left unwritten."""
    for one, other in zip(case.inputs(), case.inputs(seed_offset=1), strict=True):
        arrays = case.upload(one.arrays)
        result = case.run(arrays, one)
        no_views_but_the_formulas(case, one, arrays, result)
        kept = [r.copy() for r in case.download(result)]
        for b in other.expected:  # memory that the allocator will hand out next holds no plausible number
            np.full(b.value.shape, np.nan, case.dtype)
        second = case.run(case.upload(other.arrays), other)
        tally.judge(case, other, second, ", run after another input of its shapes")
        demand_same_bits(one, kept, case.download(result), "a later run changed the result of an earlier one")
        for array, changed in zip(arrays, other.arrays, strict=True):  # as an optimiser does with weights
            array[...] = case.backend.asarray(changed.copy())
        tally.judge(case, other, case.run(arrays, other), ", written into the arrays of an earlier run")
        tally.inputs += 1
    _no_buffers_in_turn(case)


def _no_buffers_in_turn(case: Case) -> None:
    """A kernel that hands out a few buffers one after the other changes a result that somebody still has."""
    one = case.inputs()[0]
    held = []
    for k in range(HELD):
        turned = [np.roll(a, k) if holds_floats(a) else a for a in one.arrays]
        result = case.run(case.upload(turned), one)
        held.append((result, [r.copy() for r in case.download(result)]))
    for result, kept in held:
        demand_same_bits(one, kept, case.download(result), f"one of {HELD} later runs changed an earlier result")


def many_calls(case: Case, tally: Tally) -> None:
    """The same bits at 1000 calls on one input, where no other process makes them (`guarded`)."""
    one = max(case.inputs(), key=lambda one: (sum(a.size for a in one.arrays) <= MANY_ELEMENTS, one.arrays[0].size))
    arrays = case.upload(one.arrays)
    first, end = case.download(case.run(arrays, one)), time.monotonic() + MANY_SECONDS
    for call in range(2, CALLS + 1):
        if case.op.writes:
            arrays = case.upload(one.arrays)
        demand_same_bits(one, first, case.download(case.run(arrays, one)), f"call {call} on it gave other bits")
        tally.inputs += 1
        if time.monotonic() > end:
            break


def no_views_but_the_formulas(case: Case, one: Input, arrays: Sequence[Array], result: Sequence[Array]) -> None:
    """A result may lie in an input's memory only where NumPy's result of the formula is a view of it."""
    reference = backends.get("numpy").xp
    plain = None
    for k, r in enumerate(result):
        for i, a in enumerate(arrays):
            if i in case.op.writes or not (isinstance(r, np.ndarray) and isinstance(a, np.ndarray)):
                continue
            if np.may_share_memory(r, a):
                plain = plain or outputs(case.op.formula(reference, *one.arrays, **one.params))
                if not np.may_share_memory(plain[k], one.arrays[i]):
                    lies = f"output {one.expected[k].name} lies in the memory of input {input_name(case.op, i)}"
                    raise Broken(f"{one}: {lies}; the formula makes a new array")


def order_of_work(case: Case, tally: Tally) -> None:
    """A kernel gives the same bits however its work is divided and ordered: threads of a CPU, blocks of a GPU."""

    for one in case.inputs():
        first: tuple[str, tuple[np.ndarray, ...]] | None = None
        for order, ordered in case.backend.orders():
            with ordered:
                results = case.download(case.run(case.upload(one.arrays), one))
            if first is None:
                first = order, results
            demand_same_bits(one, first[1], results, f"{order} gave other bits than {first[0]}")
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
    where = str(one)
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
        tally.add(judgement, f"{where}: its gradient calls {op.name}, {shapes_and_params(before, params)}")
        return result

    for one in case.inputs():
        where = str(one)
        arrays = case.upload(one.arrays)
        outs = case.run(arrays, one)
        w = np.random.default_rng((case.seed, one.number)).standard_normal(outs[0].shape).astype(outs[0].dtype)
        with case.backend.watched_by(watch):
            case.op.vjp(case.backend.run, case.backend.asarray(w), outs, *arrays, **one.params)
        tally.inputs += 1
