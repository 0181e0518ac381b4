"""A tensor remembers the op that made it, so that gradients can be carried back through it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from itertools import count
from math import prod
from typing import Any, NamedTuple

import numpy as np

from minibert.backends.base import Backend
from minibert.errors import UserError
from minibert.kernels.elementwise import add, mul, scale
from minibert.kernels.linear import matmul
from minibert.kernels.op import Array, Op, Run
from minibert.kernels.reduction import reduce_sum
from minibert.kernels.view import concatenate, reshape, slice_axis, transpose
from minibert.model.values import Values

_mode = threading.local()
_clock = count(1)
FREED: Any = ("freed",)  # stands where a tensor's making was remembered, once backward has been through it

ARRAYS = {"data", "grad", "grad_buffer", "master"}  # what a tensor or a parameter has on its backend


def tick(after: int = 0) -> int:
    """The time by which a tensor is made before or after a parameter is written: later than any other, and `after`."""
    global _clock
    now = next(_clock)
    if now <= after:  # a time of another process, which came with what was pickled there
        now, _clock = after + 1, count(after + 2)
    return now


class Spent(NamedTuple):
    """What is left of an array whose values were dropped; to use it as an array is an error."""

    shape: tuple[int, ...]
    ndim: int
    size: int
    dtype: Any


class Tensor(Values):
    """An array on a backend. `grad`, an array or None, is filled by `backward()` where `requires_grad`.

    In arithmetic, a number or a NumPy array beside a tensor is a constant of the tensor's dtype.
    """

    __slots__ = (
        "__weakref__", "backend", "data", "grad", "grad_buffer", "made_at", "made_by", "place", "requires_grad",
    )  # fmt: skip
    written_at = 0  # a parameter has its own

    def __init__(self, data: Array, backend: Backend, requires_grad: bool = False) -> None:
        self.data, self.backend, self.requires_grad = data, backend, requires_grad
        self.grad: Array | None = None
        self.grad_buffer: Array | None = None  # where an optimiser wants the gradient to be
        self.place = current_place()
        self.made_at = tick()
        self.made_by: tuple[Op, tuple[Tensor, ...], tuple[Array, ...], dict[str, Any]] | None = None

    shape = property(lambda self: self.data.shape)
    ndim = property(lambda self: self.data.ndim)
    dtype = property(lambda self: self.data.dtype)

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array."""
        return self.backend.numpy(self.data)

    def detach(self) -> Tensor:
        """The same values, in the same memory, through which no gradient goes."""
        return Tensor(self.data, self.backend)

    def __getstate__(self) -> dict[str, Any]:
        """What copy.deepcopy and pickle keep: the values, and all of a leaf. What was computed loses its graph."""
        slots = [name for one in type(self).__mro__ for name in getattr(one, "__slots__", ()) if name != "__weakref__"]
        state = {name: getattr(self, name) for name in slots}
        for name in ARRAYS & state.keys():  # by way of NumPy, from whatever memory
            if state[name] is not None and not isinstance(state[name], Spent):
                state[name] = self.backend.numpy(state[name])
        return state if self.made_by is None else {**state, "made_by": None, "requires_grad": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():  # as they are: to copy is not to write
            array = name in ARRAYS and isinstance(value, np.ndarray)
            object.__setattr__(self, name, state["backend"].asarray(value) if array else value)
        tick(after=max(self.made_at, self.written_at))

    def forget(self) -> None:
        """Drop the values, once no gradient reads them and nobody asks again: shape and dtype stay."""
        self.data = Spent(self.data.shape, self.data.ndim, self.data.size, self.data.dtype)

    def forget_until_backward(self) -> None:
        """Drop the values, once forward reads them no more, if backward can cheaply make them again; else keep them."""
        if self.made_by is not None and self.made_by is not FREED and self.made_by[0].again is not None:
            self.forget()

    def _values(self, again: dict[Tensor, Array]) -> Array:
        """The values for a gradient that may read them; those that forward dropped are made again, and noted there."""
        if not isinstance(self.data, Spent) or self.made_by is None or self.made_by is FREED:
            return self.data
        op, inputs, kept, params = self.made_by
        if op.again is None:
            return self.data
        if self not in again:
            with at_place(self.place):
                again[self] = op.again(self.backend.run, kept, *(i.data for i in inputs), **params)
        return again[self]

    def __matmul__(self, other: Any) -> Tensor:
        """Of matrices, (..., N, K) by (..., K, M). Raises UserError for vectors and for shapes that do not match."""
        other = self._operand(other)
        if min(self.ndim, other.ndim) < 2 or self.shape[-1] != other.shape[-2]:
            raise UserError(f"@: expected (..., N, K) and (..., K, M), got {self.shape} and {other.shape}")
        return apply(matmul, self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return self._operand(other) @ self

    def _operand(self, other: Any) -> Tensor:
        if isinstance(other, Tensor):
            return other
        values = np.asarray(other)
        if values.dtype.kind not in "biuf":
            raise TypeError(f"expected a tensor, a number or an array beside a tensor, got {type(other).__name__}")
        return Tensor(self.backend.asarray(values, dtype=self.dtype), self.backend)

    def __add__(self, other: Any) -> Tensor:
        return apply(add, self, self._operand(other))

    def __mul__(self, other: Any) -> Tensor:
        if isinstance(other, Tensor) or np.ndim(other):
            return apply(mul, self, self._operand(other))
        return apply(scale, self, factor=float(other))

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Tensor:
        return self * -1.0

    def __sub__(self, other: Any) -> Tensor:
        return self + (-other)

    def __rsub__(self, other: Any) -> Tensor:
        return -self + other

    def __truediv__(self, other: Any) -> Tensor:
        """By a number or an array of numbers. There is no gradient of a divisor."""
        if isinstance(other, Tensor):
            raise UserError("a tensor is divided by numbers alone: / float(x), or / x.numpy() if x needs no gradient")
        if not np.all(other):
            raise UserError("a tensor is divided by numbers other than 0")
        return self * (1.0 / np.asarray(other) if np.ndim(other) else 1.0 / other)

    def __pow__(self, exponent: Any) -> Tensor:
        """To a whole power from 1 to 8, as a product."""
        if not isinstance(exponent, int | float | np.number) or exponent not in range(1, 9):
            raise UserError(f"**: expected a whole number from 1 to 8, got {exponent!r}; take .numpy() for others")
        return reduce(Tensor.__mul__, [self] * int(exponent))

    def reshape(self, *shape: Any) -> Tensor:
        return apply(reshape, self, shape=_axes(shape))

    def transpose(self, *axes: Any) -> Tensor:
        return apply(transpose, self, axes=_axes(axes))

    def slice(self, axis: int, start: int, stop: int) -> Tensor:
        """Elements start .. stop of one axis."""
        return apply(slice_axis, self, axis=axis, start=start, stop=stop)

    def sum(self, axis: int | tuple[int, ...] | None = None) -> Tensor:
        return apply(reduce_sum, self, axis=axis)

    def backward(self, gradient: Array | None = None) -> None:
        """Add d(self)/d(leaf) to `grad` of every leaf that requires it and led here.

        `gradient` weighs the elements of self; it may be left out for a scalar. The graph is freed on the way.
        """
        if not self.requires_grad:
            raise RuntimeError("backward: no gradient leads here; was it computed under no_grad()?")
        if gradient is None:
            if prod(self.shape) != 1:
                raise ValueError(
                    f"backward: expected a scalar or an explicit gradient, got a tensor of shape {self.shape}"
                )
            gradient = self.backend.asarray(np.ones(self.shape), dtype=self.dtype)
        gradient = self.backend.asarray(gradient, dtype=self.dtype)
        if gradient.shape != self.shape:
            raise ValueError(f"backward: expected a gradient of shape {self.shape}, got {gradient.shape}")
        order = _oldest_first(self)
        grads: dict[Tensor, Array] = {}
        again: dict[Tensor, Array] = {}  # what forward dropped, until every gradient that reads it is there
        self._receive(gradient, grads)
        while order:  # popped, so that nothing here keeps a tensor that has been passed
            order.pop()._pass_on(grads, again)

    def _pass_on(self, grads: dict[Tensor, Array], again: dict[Tensor, Array]) -> None:
        """Undo the op that made this: its inputs receive their gradients, and what it kept is freed."""
        again.pop(self, None)
        g = grads.pop(self, None)
        if g is None or self.made_by is None or self.made_by is FREED:
            return
        op, inputs, residuals, params = self.made_by
        if op.vjp is None:
            raise NotImplementedError(f"op {op.name!r} has no vjp: give one where the op is defined")
        arrays, run = [i._values(again) for i in inputs], _Run(self.backend.run, inputs)
        with at_place(self.place):
            gradients = op.vjp(run, g, (self.data, *residuals), *arrays, **params)
        self.made_by = FREED  # and with it what this step kept
        for i, gi in zip(inputs, gradients, strict=True):
            if gi is not None and i.requires_grad and not any(gi is total for total in run.added_to):
                i._receive(gi, grads)

    def _receive(self, g: Array, grads: dict[Tensor, Array]) -> None:
        """Add `g` to the gradient of this: in `grads` for now, or, of what was not computed, in its place at once."""
        with at_place(self.place):  # where what both gradients are of was made
            if self.made_by is None:
                self._accumulate(g)
            elif (parts := joined_leaves(self)) is not None:
                assert concatenate.vjp is not None
                pieces = concatenate.vjp(self.backend.run, g, (self.data,), *(p.data for p in parts), axis=0)
                for part, piece in zip(parts, pieces, strict=True):
                    if part.requires_grad:
                        part._receive(piece, grads)
            else:
                grads[self] = self.backend.run(add, grads[self], g) if self in grads else g

    def _accumulate(self, g: Array) -> None:
        if self.grad is not None:
            g = self.backend.run(add, self.grad, g)
        if self.grad_buffer is not None:
            if g is not self.grad_buffer:
                self.grad_buffer[...] = g
            g = self.grad_buffer
        elif self.grad is None:
            g = g.copy()  # it may be another leaf's as well, or the caller's
        self.grad = g

    def __repr__(self) -> str:
        return f"Tensor(shape={self.shape}, dtype={self.dtype}, backend={self.backend.name})"


class _Run:
    """A backend's `run` for a vjp, which may say of which inputs a call's outputs are the gradients."""

    def __init__(self, run: Run, inputs: tuple[Tensor, ...]) -> None:
        self.run, self.inputs = run, inputs
        self.added_to: list[Array] = []  # gradients so far that were handed out

    def __call__(self, op: Op, *arrays: Array, **params: Any) -> Any:
        return self.run(op, *arrays, **params)

    def wanted(self, *numbers: int) -> bool:
        """Whether a gradient of one of those inputs is asked for: of a frozen parameter, say, none is."""
        return any(self.inputs[number].requires_grad for number in numbers)

    def gradients_of(self, *numbers: int) -> Run:
        """`run` for a call whose outputs are the gradients of those inputs: made where an optimiser wants them."""
        into = tuple(self._buffer(self.inputs[number]) for number in numbers)
        return self.run if all(place is None for place in into) else partial(self.run, into=into)

    def gradient_so_far(self, number: int, by: Op | None = None) -> Array | None:
        """The gradient of that input, where it is final memory: an op adds to it in place, and the vjp returns it.

        None where this backend has no kernel for the op `by`: its formula would make the sum elsewhere first.
        """
        tensor = self.inputs[number]
        leaves = self._leaves(tensor)
        if any(t.grad is None or t.grad is not t.grad_buffer for t in leaves):
            return None
        total = None if by is not None and tensor.backend.kernel(by) is None else self._whole(tensor, leaves)
        if total is not None:
            self.added_to.append(total)
        return total

    def _buffer(self, tensor: Tensor) -> Array | None:
        """Where the whole gradient of an input may be written: nothing is there yet, and no other one will be."""
        leaves = self._leaves(tensor)
        return None if any(t.grad is not None for t in leaves) else self._whole(tensor, leaves)

    def _leaves(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """What an input is made of, end to end; nothing where its gradient is not, once and whole, theirs."""
        leaves = joined_leaves(tensor) or (tensor,)
        whole = all(t.made_by is None and t.requires_grad for t in leaves) and len(set(leaves)) == len(leaves)
        return leaves if whole and self.inputs.count(tensor) == 1 else ()

    @staticmethod
    def _whole(tensor: Tensor, leaves: tuple[Tensor, ...]) -> Array | None:
        """The memory of the gradients of an input's leaves as one array, where it is."""
        buffers = [t.grad_buffer for t in leaves]
        return buffers[0] if len(buffers) == 1 else tensor.backend.adjoining(buffers)


def _axes(given: tuple[Any, ...]) -> tuple[int, ...]:
    """Numbers given one by one, or as one tuple."""
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else given


def demand_unchanged(what: str, read: Iterable[Tensor], made_at: int) -> None:
    """Raise UserError where one of the tensors `read` is a parameter that was written after `made_at`."""
    for t in read:
        if t.written_at > made_at:
            raise UserError(
                f"{what}: the weights have changed since the forward pass, and it would be computed from the new ones; "
                "ask for it before they change, or call the model again"
            )


def joined_leaves(tensor: Tensor) -> tuple[Tensor, ...] | None:
    """The leaves that this is, one after the other; None where it is anything else."""
    if tensor.made_by is None or tensor.made_by is FREED:
        return None
    op, inputs, _, params = tensor.made_by
    if op is not concatenate or params["axis"] != 0 or any(i.made_by is not None for i in inputs):
        return None
    return inputs


def apply(op: Op, *inputs: Tensor, **params: Any) -> Tensor:
    """Run `op` on the inputs' backend, and remember it if a gradient will be asked for."""
    backend = inputs[0].backend
    for t in inputs:
        if t.backend is not backend:
            places = ", ".join(t.backend.name for t in inputs)
            raise ValueError(f"{op.name}: its inputs stand on {places}; move them to one backend first")
    result = backend.run(op, *[t.data for t in inputs], **params)
    data, *residuals = result if isinstance(result, tuple) else (result,)
    out = Tensor(data, backend, grad_enabled() and any(t.requires_grad for t in inputs))
    if out.requires_grad:
        out.made_by = (op, inputs, tuple(residuals), params)
    return out


def current_place() -> str:
    """The module whose ops run now, as `bert.encoder.layer.2.attention`; in backward, the one whose ops it undoes."""
    return getattr(_mode, "place", "")


class at_place:  # no generator, which takes as long as a small op
    """A block whose ops belong to the module of that name."""

    __slots__ = ("before", "place")

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None:
        self.before = current_place()
        _mode.place = self.place

    def __exit__(self, *error: object) -> None:
        _mode.place = self.before


def grad_enabled() -> bool:
    return getattr(_mode, "grad", True)


@contextmanager
def set_grad_enabled(enabled: bool) -> Iterator[None]:
    before = grad_enabled()
    _mode.grad = enabled
    try:
        yield
    finally:
        _mode.grad = before


def no_grad() -> Any:
    """A `with` block in which nothing is remembered for a gradient."""
    return set_grad_enabled(False)


def _oldest_first(root: Tensor) -> list[Tensor]:
    """Every tensor that led to `root`, each before all that it was used for.

    Raises RuntimeError where an earlier backward has freed a part: its gradients would be lost without a word; and
    UserError where a parameter was written since it was read.
    """
    order: list[Tensor] = []
    seen: set[Tensor] = set()
    stack = [(root, False)]
    while stack:  # no recursion: a long computation is deeper than Python's stack
        tensor, done = stack.pop()
        if done:
            order.append(tensor)
        elif tensor not in seen:
            if tensor.made_by is FREED:
                raise RuntimeError(
                    "backward: an earlier backward() went through a part of this and freed it; add the losses and go "
                    "through once, or compute it again"
                )
            seen.add(tensor)
            stack.append((tensor, True))
            if tensor.made_by is not None:
                demand_unchanged("backward", tensor.made_by[1], tensor.made_at)
                stack += [(i, False) for i in tensor.made_by[1] if i.requires_grad]
    return order
