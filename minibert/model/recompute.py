"""Recomputation: backward computes a part of the model again instead of keeping what it made; or for the first time.

Chen, Xu, Zhang, Guestrin, "Training deep nets with sublinear memory cost" (2016). Dropout is counter-based, so the same
masks come back, and every gradient through `recomputed` has the same bits as without. In `SumOfParts` gradients are
sums of as many parts, and differ from those of the whole by the rounding of these sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from minibert.backends.base import Backend
from minibert.kernels.elementwise import add
from minibert.kernels.op import Array, Run
from minibert.model.tensor import FREED, Tensor, at_place, demand_unchanged, grad_enabled, set_grad_enabled

Parts = Callable[[Tensor], Iterator[Tensor]]


class _Recomputation:
    """Stands where a tensor remembers the op that made it; its gradient goes through `function` anew."""

    name = "recomputation"
    again = None  # what it makes is what is kept

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.function, self.backend = function, inputs[0].backend
        self.wanted = [i.requires_grad for i in inputs]

    def vjp(self, run: Run, g: Array, outs: tuple[Array, ...], *arrays: Array) -> tuple[Array | None, ...]:
        inputs = [Tensor(a, self.backend, wanted) for a, wanted in zip(arrays, self.wanted, strict=False)]
        with set_grad_enabled(True):
            self.function(*inputs).backward(g)  # the parameters within receive their gradients here
        return (*(i.grad for i in inputs), *[None] * (len(arrays) - len(inputs)))


def recomputed(function: Callable[..., Tensor], *inputs: Tensor, weights: Sequence[Tensor] = ()) -> Tensor:
    """`function(*inputs)`, of which only inputs and output are kept; `function` must give the same each time.

    `weights` are the parameters that it reads: backward raises UserError where one was written since.
    """
    out = function(*(Tensor(i.data, i.backend, i.requires_grad) for i in inputs))
    if not out.requires_grad:
        return out
    made = Tensor(out.data, out.backend, requires_grad=True)
    op: Any = _Recomputation(function, inputs)
    made.made_by = (op, (*inputs, *weights), (), {})
    return made


class _Sum:
    """Stands where a `SumOfParts` remembers the op that made it."""

    name = "sum of parts"
    again = None  # nobody drops a scalar

    def __init__(self, parts: Parts) -> None:
        self.parts = parts


def _constant(values: np.ndarray, backend: Backend) -> Tensor:
    return Tensor(backend.asarray(values), backend)


class SumOfParts(Tensor):
    """The sum of the scalars that `parts(x)` yields: of each, all that led to it is gone when the next is made.

    It is computed when it is read, or else by `backward`, with the gradient of each part at once: in the order
    forward, backward, read nothing is computed twice. Until then x and the `weights` on which the parts depend must
    stay as they are: UserError where a weight was written. Where none of these asks for a gradient it is computed at
    once. It is float32, or float64 if x is.
    """

    __slots__ = ("_dtype", "_value")
    _value: Array | None

    def __init__(self, parts: Parts, x: Tensor, weights: Sequence[Tensor]) -> None:
        self._dtype = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
        super().__init__(None, x.backend, grad_enabled() and any(t.requires_grad for t in (x, *weights)))
        operation: Any = _Sum(parts)
        if self.requires_grad:
            self.made_by = (operation, (x, *weights), (), {})
        else:
            with set_grad_enabled(False):
                self.data = self._total(operation, x)

    shape = property(lambda self: ())
    ndim = property(lambda self: 0)
    dtype = property(lambda self: self._dtype)

    @property
    def data(self) -> Array:
        if self._value is None and self.made_by is FREED:
            raise RuntimeError("a backward() that did not end freed this loss before it was computed: compute it again")
        if self._value is None and self.made_by is not None:
            operation, (x, *weights), _, _ = self.made_by
            demand_unchanged("out.loss", weights, self.made_at)
            with at_place(self.place), set_grad_enabled(False):
                self._value = self._total(operation, Tensor(x.data, x.backend))
        return self._value

    @data.setter
    def data(self, value: Array) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        """Of a copy, computed."""
        return _constant, (self.numpy(), self.backend)

    def _pass_on(self, grads: dict[Tensor, Array], again: dict[Tensor, Array]) -> None:
        g = grads.pop(self, None)
        if g is None or self.made_by is None or self.made_by is FREED:
            return
        operation, (x, *_), _, _ = self.made_by
        self.made_by = FREED
        inner = Tensor(x.data, x.backend, x.requires_grad)
        with at_place(self.place), set_grad_enabled(True):
            self._value = self._total(operation, inner, g)
        if x.requires_grad:
            x._receive(inner.grad, grads)

    def _total(self, operation: Any, x: Tensor, g: Array | None = None) -> Array:
        """The sum; given its gradient `g`, x and the parameters receive theirs on the way."""
        total = None
        for part in operation.parts(x):
            if g is not None:
                part.backward(g)
            total = part.data if total is None else self.backend.run(add, total, part.data)
        return total
