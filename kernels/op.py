"""What an op is: its formula, its gradient and the inputs on which every backend must follow it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from minibert.kernels.drawing import drawn_samples

Array = Any  # numpy.ndarray on the CPU, cupy.ndarray on a GPU, or one of the readings
Run = Callable[..., Any]  # run(op, *arrays, **params): a backend, handed to a gradient


class Sample(NamedTuple):
    """One input of an op: float arrays in float64 (each backend casts them), integer and bool arrays as they are."""

    arrays: tuple[np.ndarray, ...]
    params: Mapping[str, Any] = {}


class BertSize(NamedTuple):
    """The axes of one training step, for the shapes that `bench` times."""

    batch: int = 8  # B sequences
    length: int = 128  # T positions in each
    hidden: int = 384  # C channels
    heads: int = 12  # H
    intermediate: int = 1536  # I
    vocabulary: int = 30522  # V
    predicted: int = 154  # M masked positions

    @property
    def tokens(self) -> int:  # N
        return self.batch * self.length


def _none(rng: np.random.Generator) -> Iterator[Sample]:
    """Of an op that writes no samples: `draw` gives them."""
    yield from ()


@dataclass(frozen=True, eq=False)
class Op:
    """One operation, defined once; it registers itself in `OPS`.

    `formula(xp, *arrays, **params)` is the math over an array module `xp`. It returns the output, or
    `(output, *residuals)` where something is kept for the gradient. Messages call arrays what it calls them.
    `vjp(run, g, outs, *arrays, **params)` gives one gradient per array (None where there is none), in ops.
    `again(run, kept, *arrays, **params)` is the output once more, in ops, from what was kept for the gradient: where
    that is cheap. Then nothing holds the output from forward to backward.
    `kept(xp, *arrays, **params)` gives, by number, the inputs that a forward op made and kept, as its formula makes
    them of the others: they carry its error, and a kernel may make them again instead of reading them.
    `draw(draw, *sizes of axes)` says what its arrays hold: inputs of any size are drawn from it (`kernels.drawing`).
    `sizes` are some to draw besides, where one large axis is not enough.
    `samples(rng)` yields those on which every check is made (by default a few that are drawn), `bench(rng, size)` the
    input it is timed on.
    `writes` names the arrays that it updates in place; the formula then returns their new values in that order.
    `bytes` overrides the memory traffic that sizes of inputs and outputs suggest, where an op reads less.
    `whole_outputs` says which outputs are whole numbers, and in which dtype arrays hold them: those of the formula are
    floats all the same.
    `wide_inputs` and `wide_outputs` name the arrays that stay float32 where the others are stored in 16 bits:
    statistics, losses, what an optimiser sums up.
    """

    name: str
    formula: Callable[..., Any]
    samples: Callable[[np.random.Generator], Iterator[Sample]] = field(default=_none, kw_only=True)
    bench: Callable[[np.random.Generator, BertSize], Sample] = field(kw_only=True)
    draw: Callable[..., Sample] | None = None
    sizes: tuple[Mapping[str, int], ...] = ()
    vjp: Callable[..., tuple[Any, ...]] | None = None
    again: Callable[..., Array] | None = None
    kept: Callable[..., dict[int, Array]] | None = None
    writes: tuple[int, ...] = ()
    bytes: Callable[..., int] | None = None
    whole_outputs: Mapping[int, str] = field(default_factory=dict)
    wide_inputs: tuple[int, ...] = ()
    wide_outputs: tuple[int, ...] = ()
    family: str = field(init=False)

    def __post_init__(self) -> None:
        if self.name in OPS:
            raise ValueError(f"op {self.name!r} is defined twice")
        object.__setattr__(self, "family", self.formula.__module__)
        if self.samples is _none:
            if self.draw is None:
                raise ValueError(f"op {self.name!r} says neither `draw` nor `samples`: there is nothing to check it on")
            object.__setattr__(self, "samples", partial(drawn_samples, self.draw))
        OPS[self.name] = self

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles name the op, which is defined once."""
        return _op_called, (self.name,)


OPS: dict[str, Op] = {}


def _op_called(name: str) -> Op:
    return OPS[name]


def library(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a kernel that does nothing but call a library: tables say "library" of it."""
    kernel.by = "library"  # type: ignore[attr-defined]
    return kernel


def takes_bfloat16(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a kernel for a CPU that reads and writes arrays of bfloat16 itself: others are given copies in float32."""
    kernel.takes_bfloat16 = True  # type: ignore[attr-defined]
    return kernel


def holds_floats(array: Array) -> bool:
    """Whether the elements are floats; ml_dtypes' bfloat16 is one, although NumPy files it under V."""
    return array.dtype.kind in "fV"


def is_bfloat16(array: Array) -> bool:
    """Whether the elements are bfloat16, which NumPy files under V with its size."""
    return bool(array.dtype.itemsize == 2 and array.dtype.kind == "V")


def outputs(result: Any) -> tuple[Any, ...]:
    """What an op returned, as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def input_name(op: Op, number: int) -> str:
    """What the formula calls the array with that number, from 0; one of `*arrays` is `arrays 2`."""
    _, *parameters = inspect.signature(op.formula).parameters.values()  # the first is the array module
    for k, parameter in enumerate(parameters[: number + 1]):
        if parameter.kind is parameter.VAR_POSITIONAL:
            return f"{parameter.name} {number - k}"
    return parameters[number].name


def output_name(op: Op, number: int) -> str:
    """What the formula calls the output with that number, from 0: `rstd` where it ends in `return y, mean, rstd`.

    What an op writes in place is called as it is among the inputs. An expression has no name: the first output is then
    `y`, another `output 2`.
    """
    if op.writes:
        return input_name(op, op.writes[number])
    names = _returned_names(op.formula)
    return (names[number] if number < len(names) else "") or (f"output {number}" if number else "y")


@lru_cache
def _returned_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Of a function's last `return`; "" where an expression stands; of a function without source none."""
    try:
        (defined,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # made by exec, or a lambda amid an expression
        return ()
    last = defined.body[-1] if isinstance(defined, ast.FunctionDef) else None
    if not isinstance(last, ast.Return):
        return ()
    returned = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
    return tuple(one.id if isinstance(one, ast.Name) else "" for one in returned)
