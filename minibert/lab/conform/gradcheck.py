"""The exact gradient check on inputs of one's own: of an op, or of a function that is written in tensors.

<J v, w> = <v, vjp(w)> for random v and w: the left side from the formulas on dual numbers (forward mode), the right
side from the gradient that runs on a backend (reverse mode). No step size and no tolerance: what rounding may do to the
gradient is read from the same formulas (`minibert.kernels.readings`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minibert import backends
from minibert.backends import Backend
from minibert.errors import UserError
from minibert.kernels import Op
from minibert.kernels.op import holds_floats, outputs
from minibert.kernels.readings import bounded_module, dual_module
from minibert.kernels.readings.dual import Dual
from minibert.lab.conform.case import Broken, Case, Input, Tally
from minibert.lab.conform.check import CHECKS, find_op
from minibert.lab.conform.demands import DOT_ROUNDING, GRADIENT_BOUNDS
from minibert.lab.conform.judge import expect, judge, stored_as
from minibert.model.tensor import Tensor

DIRECTIONS = 2  # pairs of v and w


@dataclass(frozen=True)
class OneInput(Case):
    """A case whose only input is given, instead of the op's samples."""

    arrays: tuple[np.ndarray, ...] = ()
    params: tuple[tuple[str, Any], ...] = ()

    def inputs(self, seed_offset: int = 0) -> tuple[Input, ...]:
        kinds = stored_as(self.op, self.arrays, self.dtype)
        rounded = tuple(np.asarray(a, kind) for a, kind in zip(self.arrays, kinds, strict=True))
        params = dict(self.params)
        return (Input(0, rounded, params, expect(self.op, rounded, params, self.dtype, self.backend.product_mode)),)


def gradcheck(
    op_or_function: Op | str | Callable[..., Tensor], *arrays: Any, backend: Backend, seed: int = 0, **params: Any
) -> None:
    """Check the gradient with respect to each float array, on `backend`; raises AssertionError where it is wrong.

    A function takes tensors and returns one. Arrays are taken in float64. On a backend without float64 an op's gradient
    is checked on NumPy, and every op that it calls is held to its bound on the backend.

    Raises UserError for an op without a gradient, and for a function on a backend without float64.
    """
    given = tuple(map(np.asarray, arrays))
    given = tuple(np.asarray(a, np.float64) if holds_floats(a) else a for a in given)
    with np.errstate(all="ignore"):
        try:
            if isinstance(op_or_function, Op | str):
                _check_op(find_op(op_or_function), given, params, backend, seed)
            else:
                _check_function(op_or_function, given, params, backend, seed)
        except Broken as error:
            raise AssertionError(f"on {backend.name}: {error}") from None


def assert_within_bound(
    op: Op | str,
    arrays: Sequence[Any],
    params: Mapping[str, Any],
    got: Any,
    dtype: str = "float32",
    products: str = "float32",
) -> None:
    """Assert that `got` (NumPy: one array, or a tuple with the residuals) is what `op` gives on `arrays` in `dtype`.

    Each element must lie under the bound that the formula implies for any evaluation in that dtype. Float arrays are
    rounded to `dtype` first, as a backend sees them; for an op that writes in place they are those before the call.
    `products`: the backend's `product_mode`.
    """
    op = find_op(op)
    given = tuple(map(np.asarray, arrays))
    rounded = [np.asarray(a, kind) for a, kind in zip(given, stored_as(op, given, dtype), strict=True)]
    with np.errstate(all="ignore"):
        judgement = judge(op, rounded, params, tuple(map(np.asarray, outputs(got))), dtype, products)
    if not judgement.ok:
        shapes = ", ".join(str(a.shape) for a in rounded)
        raise AssertionError(f"{op.name} in {dtype} (shapes {shapes}): {judgement.problem or judgement.worst}")


def _check_op(op: Op, arrays: tuple[np.ndarray, ...], params: dict[str, Any], backend: Backend, seed: int) -> None:
    if op.vjp is None:
        raise UserError(f"gradcheck: op {op.name!r} has no gradient")
    exact = backend if "float64" in backend.dtypes else backends.get("numpy")
    given = tuple(params.items())
    CHECKS["gradient"](OneInput(op, exact, "float64", seed, arrays, given), Tally())
    dtype = next(d for d in backend.dtypes if d != "float64") if exact is not backend else ""
    if dtype:
        CHECKS["gradient_rounding"](OneInput(op, backend, dtype, seed, arrays, given), Tally())


@dataclass(frozen=True)
class Step:
    """One op of a computation: which tensor it made, and from which."""

    made: Tensor
    op: Op
    inputs: tuple[Tensor, ...]
    params: dict[str, Any]


def _check_function(
    function: Callable[..., Tensor], arrays: tuple[np.ndarray, ...], params: dict[str, Any], place: Backend, seed: int
) -> None:
    if "float64" not in place.dtypes:
        raise UserError(f"gradcheck of a function needs float64, which {place.name} lacks: run it with --backend numba")
    leaves = [Tensor(place.asarray(a.copy()), place, requires_grad=holds_floats(a)) for a in arrays]
    out = function(*leaves, **params)
    if not isinstance(out, Tensor):
        raise UserError(f"gradcheck: expected a function that returns a Tensor, got {type(out).__name__}")
    steps = _steps(out)
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(out.shape)
    if out.requires_grad:
        out.backward(place.asarray(w))
    errors = _errors(steps, out, leaves, w)
    for number, leaf in enumerate(leaves):
        if not leaf.requires_grad:
            continue
        grad = np.zeros(leaf.shape) if leaf.grad is None else place.numpy(leaf.grad)
        for _ in range(DIRECTIONS):
            v = rng.standard_normal(leaf.shape)
            left, right = _derivative(steps, out, leaf, v) * w, v * grad
            allowed = GRADIENT_BOUNDS * float((np.abs(v) * errors[leaf]).sum())
            allowed += DOT_ROUNDING * float(np.abs(left).sum() + np.abs(right).sum())
            if not abs(left.sum() - right.sum()) <= allowed:
                raise Broken(
                    f"gradient of input {number}, shape {leaf.shape}: <J v, w> = {left.sum():.15g}, <v, vjp(w)> = "
                    f"{right.sum():.15g}, allowed to be apart by {allowed:.3g}"
                )


def _steps(out: Tensor) -> list[Step]:
    """The ops that led to `out`, in an order in which they can run."""
    found: dict[Tensor, Step | None] = {}
    stack = [(out, False)]
    while stack:
        tensor, inputs_done = stack.pop()
        if tensor.made_by is None or tensor in found:
            continue
        op, inputs, _, params = tensor.made_by
        if inputs_done:
            found[tensor] = Step(tensor, op, inputs, params)
        else:
            stack += [(tensor, True), *((i, False) for i in inputs)]
    return [step for step in found.values() if step is not None]


def _derivative(steps: list[Step], out: Tensor, leaf: Tensor, v: np.ndarray) -> np.ndarray:
    """J v: the computation again, on dual numbers."""
    duals: dict[Tensor, Any] = {leaf: Dual(leaf.numpy(), v)}
    for step in steps:
        arrays = (duals[i] if i in duals else _lifted(i, Dual.lift) for i in step.inputs)
        duals[step.made] = outputs(step.op.formula(dual_module, *arrays, **step.params))[0]
    return Dual.lift(duals[out]).tangent if out in duals else np.zeros(out.shape)


def _errors(steps: list[Step], out: Tensor, leaves: list[Tensor], w: np.ndarray) -> dict[Tensor, np.ndarray]:
    """What rounding to float64 may do to each leaf's gradient: forward and backward, read for their error."""
    module = bounded_module("float64")
    lift = module.reading.lift

    def run(op: Op, *arrays: Any, **params: Any) -> Any:
        return op.formula(module, *arrays, **params)

    results: dict[Tensor, tuple[Any, ...]] = {}

    def read(tensor: Tensor) -> Any:
        return results[tensor][0] if tensor in results else _lifted(tensor, lift)

    for step in steps:
        results[step.made] = tuple(map(lift, outputs(run(step.op, *(read(i) for i in step.inputs), **step.params))))
    grads: dict[Tensor, Any] = {out: lift(w)}
    for step in reversed(steps):
        if step.made not in grads or step.op.vjp is None:
            continue
        arrays = [read(i) for i in step.inputs]
        found = step.op.vjp(run, grads.pop(step.made), results[step.made], *arrays, **step.params)
        for tensor, g in zip(step.inputs, found, strict=True):
            if g is not None and tensor.requires_grad:
                grads[tensor] = grads[tensor] + lift(g) if tensor in grads else lift(g)
    return {leaf: grads[leaf].error if leaf in grads else np.zeros(leaf.shape) for leaf in leaves}


def _lifted(tensor: Tensor, lift: Callable[[Any], Any]) -> Any:
    values = tensor.numpy()
    return lift(values) if holds_floats(values) else values
