"""Inputs drawn from what an op says of its axes and of what its arrays hold.

An op's `draw` is a function of a `Drawing` and of the sizes of its axes, which are its other parameters; a default is
the largest size of that axis. It says in a line or two what the arrays are:

    draw=lambda draw, rows, classes: Sample((draw.floats(rows, classes), draw.labels(rows, classes)))

Whoever calls it chooses sizes (`ladder`) and a regime of values (`REGIMES`): the same line gives an input of one column
and one of 100 003, rows that are negative throughout, labels that are all ignored. The formula decides what is in the
domain: where it has no finite answer, nothing is asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from minibert.kernels.philox import Stream

LARGEST = 2**17  # size of an axis, unless an op says another
EVERY = 65  # up to here a ladder has what lies around a multiple of 8, then around a power of two; and a few between
BETWEEN = (
    *(28, 46, 51, 60, 72, 80, 88, 96, 97, 104, 112, 120, 192, 211, 331, 384, 768),
    *(1536, 2053, 3072, 5171, 10007, 30011, 100003, 500009),
)
SPIKE = 200.0  # outweighs 2**17 others in a variance, and all of them in a softmax
IGNORED = -100  # the label of a row that is not predicted, as in torch and transformers

Values = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(rng.standard_normal(shape))


def _whole(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(rng.integers(-3, 4, shape), np.float64)


def _alike(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(_whole(rng, (*shape[:-1], 1)[: len(shape)]), shape).copy()


def _equal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(rng.uniform(1e3, 2e3, (*shape[:-1], 1)[: len(shape)]), shape).copy()


def _spike(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = _normal(rng, shape)
    if x.size and x.ndim:
        last = shape[-1] - 1
        x[..., (last, rng.integers(0, last + 1), 0)[rng.choice(3, p=(0.6, 0.3, 0.1))]] = SPIKE
    return x


def _far_apart(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(rng.choice((-SPIKE, 0.0, SPIKE), shape))


def _spread(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return _normal(rng, shape) * 10.0 ** rng.uniform(-6, 4, shape)


# What floats hold. `whole`: sums and products are exact in any order, so that one term lost is seen at any size.
REGIMES: dict[str, Values] = {
    "normal": _normal,
    "whole numbers": _whole,
    "one number in each row": _alike,
    "one element that outweighs": _spike,
    "about -10000": lambda rng, shape: _normal(rng, shape) - 1e4,
    "about 10000": lambda rng, shape: _normal(rng, shape) + 1e4,
    "equal in each row": _equal,
    "negative and far apart": lambda rng, shape: -60 * np.abs(_normal(rng, shape)),  # exp neither vanishes nor is 1
    "far apart": _far_apart,
    "of all sizes": _spread,
    "tiny": lambda rng, shape: _normal(rng, shape) * 1e-38,  # about the smallest normal number of float32, and below it
    "huge": lambda rng, shape: _normal(rng, shape) * 1e15,
    "rising": lambda rng, shape: np.sort(_normal(rng, shape), axis=-1) if shape else _normal(rng, shape),
    "falling": lambda rng, shape: -np.sort(_normal(rng, shape), axis=-1) if shape else _normal(rng, shape),
    "ties": lambda rng, shape: np.asarray(rng.choice((-1.0, 0.0, 1.0), shape)),
    "zeros": lambda rng, shape: np.asarray(rng.choice((-0.0, 0.0), shape)),
}


class Drawn(NamedTuple):
    """How an input was drawn: enough to draw it again, or with other sizes."""

    seed: int
    number: int  # of the choices that `draw` has, such as rates of dropout and kinds of labels
    sizes: Mapping[str, int]
    regime: str = "normal"
    array: int | None = None  # the float array that is of this regime, the others being normal; None: all

    def __str__(self) -> str:
        sizes = ", ".join(f"{size} {axis.replace('_', ' ')}" for axis, size in self.sizes.items())
        return sizes if self.regime == "normal" else f"{sizes}{', ' if sizes else ''}values {self.regime}"


class Drawing:
    """What an op's `draw` draws from: arrays in float64 and of integers, and choices, all by seed and number."""

    def __init__(self, drawn: Drawn) -> None:
        self.drawn = drawn
        self.rng = np.random.default_rng((drawn.seed, drawn.number))
        self.count = 0  # arrays of floats so far
        self._choices = drawn.number  # its digits are the choices

    def floats(self, *shape: int) -> np.ndarray:
        """Floats of the regime, (*shape)."""
        mine = self.drawn.array in (None, self.count)
        self.count += 1
        return REGIMES[self.drawn.regime if mine else "normal"](self.rng, shape)

    def positive(self, *shape: int) -> np.ndarray:
        """Their squares."""
        return self.floats(*shape) ** 2

    def among(self, *choices: Any) -> Any:
        """One of these; by the number of the input, so that all of them have their turn."""
        self._choices, chosen = divmod(self._choices, len(choices))
        return choices[chosen]

    def flags(self, *shape: int) -> np.ndarray:
        """Booleans, some of them true."""
        return np.asarray(self.rng.random(shape) < self.among(0.6, 1.1, 0.0))

    def ids(self, count: int, below: int) -> np.ndarray:
        """(count,) int32 in [0, below): all different as far as they go, any, all the same, the first and the last.

        Among those that are different, or any, are the first and the last too.
        """
        kind = self.among("different", "any", "ends", "same")
        if kind == "any" or not below:
            ids = self.rng.integers(0, max(1, below), count)
        elif kind == "different":
            ids = self.rng.permutation(max(count, below))[:count] % below
        elif kind == "same":
            ids = np.full(count, self.rng.integers(0, below))
        else:
            ids = self.rng.choice((0, below - 1), count)
        if kind in ("different", "any") and count > 1 and below > 1:
            ids[:1] = ids[:1] if 0 in ids else 0
            ids[-1:] = ids[-1:] if below - 1 in ids else below - 1
        return ids.astype(np.int32)

    def labels(self, rows: int, classes: int) -> np.ndarray:
        """(rows,) int64 in [0, classes): a few ignored, none, all, all but one; of the first and the last class."""
        labels = self.rng.integers(0, classes, rows)
        kind = self.among("some", "none", "all", "but one", "ends")
        if kind == "some":
            labels[: max(0, rows - 5) : 4] = IGNORED
            labels[-1:] = classes - 1
        elif kind == "all":
            labels[:] = IGNORED
        elif kind == "but one" and rows:
            labels[np.arange(rows) != self.rng.integers(0, rows)] = IGNORED
        elif kind == "ends":
            labels = self.rng.choice((0, classes - 1), rows)
        return labels

    def offsets(self, batch: int, length: int) -> np.ndarray:
        """cu_seqlens (batch + 1,) int32: one of `length`, the others as long (up to `EVERY`), shorter or short."""
        kind, usual = self.among("all", "any", "one long"), min(length, EVERY)
        lengths = self.rng.integers(0 if kind == "any" else 1, (4 if kind == "one long" else usual) + 1, batch)
        lengths[:] = usual if kind == "all" else np.minimum(lengths, usual)
        if batch:
            lengths[self.rng.integers(0, batch)] = length
        return np.cumsum([0, *lengths]).astype(np.int32)

    def stream(self) -> Stream:
        """Where dropout draws from."""
        return Stream(*(int(n) for n in self.rng.integers(0, 2**32, 4)))


def axes_of(draw: Callable[..., Any]) -> dict[str, int]:
    """The axes that an op's `draw` takes, each with its largest size."""
    _, *axes = inspect.signature(draw).parameters.values()
    return {axis.name: LARGEST if axis.default is axis.empty else axis.default for axis in axes}


def drawn_samples(draw: Callable[..., Any], rng: np.random.Generator) -> Iterator[Any]:
    """The samples of an op that writes none: small and odd, of length one, beyond a block of threads, in packs, offset.

    As many as there are, each of its choices has its turn.
    """
    seed, axes = int(rng.integers(2**32)), axes_of(draw)
    last = len(axes) - 1
    sizes = [
        small(axes, 0),
        dict.fromkeys(axes, 1),
        {axis: min(largest, 1031 if k == last else 37) for k, (axis, largest) in enumerate(axes.items())},
        {axis: min(largest, 128 if k == last else 8) for k, (axis, largest) in enumerate(axes.items())},
        small(axes, 1),
        small(axes, 2),
    ]
    for number, chosen in enumerate(sizes):
        regime = "about 10000" if number == len(sizes) - 1 else "normal"
        yield draw(Drawing(Drawn(seed, number, chosen, regime)), **chosen)


def ladder(largest: int) -> list[int]:
    """Sizes of an axis: 1 to 17, around multiples of 8, around powers of two, and a few between, to the largest."""
    around = [2**p + k for p in (*range(7, 15), 16) for k in ((-1, 0, 1) if p < 12 else (1,))]
    steps = [8 * n + k for n in range(2, EVERY // 8 + 1) for k in (-1, 0, 1)]
    rungs = {*range(1, 18), *steps, *around, *BETWEEN}
    return sorted({size for size in rungs if size <= largest} | {largest + (largest >= 2**12)})


def small(limits: Mapping[str, int], number: int, beside: int = 1) -> dict[str, int]:
    """A small size for each axis: unlike each other, others for the next number, and smaller `beside` a large one.

    Beside many rows there are as many columns as a pack of 4 or 8 takes, and one more; of four axes each costs as much
    as all others.
    """
    if len(limits) > 3:
        sizes: tuple[int, ...] = (3, 5, 2, 7, 4) if beside <= 32 else (2, 3, 1) if beside <= 2**14 else (5, 4)
        if 384 < beside <= 1024:  # it may be a length, whose square is what an input costs
            sizes = (1, 1, 2)
    else:
        sizes = (3, 5, 2, 7, 4) if beside <= EVERY else (3, 8, 2, 9) if beside <= 2**14 else (5, 4)
    return {axis: min(limits[axis], sizes[(k + number) % len(sizes)]) for k, axis in enumerate(limits)}
