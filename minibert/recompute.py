"""Recomputation: backward computes a part of the model again instead of keeping what it made.

Chen, Xu, Zhang, Guestrin, "Training deep nets with sublinear memory cost" (2016). Dropout is counter-based, so the same
masks come back, and every gradient has the same bits as without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minibert.kernels.op import Array, Run
from minibert.tensor import Tensor, set_grad_enabled


class _Recomputation:
    """Stands where a tensor remembers the op that made it; its gradient goes through `function` anew."""

    name = "recomputation"
    again = None  # what it makes is what is kept

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.function, self.backend = function, inputs[0].backend
        self.wanted = [i.requires_grad for i in inputs]

    def vjp(self, run: Run, g: Array, outs: tuple[Array, ...], *arrays: Array) -> tuple[Array | None, ...]:
        inputs = [Tensor(a, self.backend, wanted) for a, wanted in zip(arrays, self.wanted, strict=True)]
        with set_grad_enabled(True):
            self.function(*inputs).backward(g)  # the parameters within receive their gradients here
        return tuple(i.grad for i in inputs)


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`, of which only inputs and output are kept; `function` must give the same each time."""
    out = function(*(Tensor(i.data, i.backend, i.requires_grad) for i in inputs))
    if not out.requires_grad:
        return out
    made = Tensor(out.data, out.backend, requires_grad=True)
    op: Any = _Recomputation(function, inputs)
    made.made_by = (op, inputs, (), {})
    return made
