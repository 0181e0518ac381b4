"""Demands on inputs that are drawn from what an op says of its axes and values (`minibert.kernels.drawing`).

Any size: two axes at once are long, and one at a time goes up a ladder, the others small. Any values: each regime, in
one array and in all. What is asked is what the formula answers: where NumPy's evaluation of it in the same dtype is not
finite, an input is left out. One that fails is made smaller before it is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import combinations, islice, product
from typing import Any

import numpy as np

from minibert.backends.base import NARROW, dtype_of
from minibert.kernels import Op
from minibert.kernels.array_module import NumpyModule, numpy_module
from minibert.kernels.drawing import BETWEEN, REGIMES, Drawing, Drawn, axes_of, ladder, small
from minibert.kernels.op import holds_floats, input_name, output_name, outputs
from minibert.kernels.readings import Bound
from minibert.lab.conform.case import Broken, Case, Input, Tally, rounded
from minibert.lab.conform.demands import no_views_but_the_formulas
from minibert.lab.conform.judge import expect
from minibert.lab.conform.raised import what_raised

BY_SIZE = ("whole numbers", "one element that outweighs", "normal")  # in turn, on the way up
EMULATED_RUNGS = (257, 1025, 2049, 4097, 65537)  # what plays a machine has few above the first
LARGE = 2**14  # from here on an input costs as much as a hundred small ones
SLOW_SECONDS = 5.0  # an input for which a device that is played takes so long is the last of its axis
EXACT = ("whole numbers", "one number in each row")  # arithmetic on which may round nothing
SQUARE = (1, 2, 4, 9, 16, 33, 131)  # sizes of all axes at once; of four and more, and emulated, not the last
PAIRS = ((1155, 131), (131, 1155), (516, 516), (517, 515))  # many a kernel is wrong only where two axes are long
MOST_PAIRS = {2: 4, 3: 3}  # by the number of axes
EMULATED_PAIRS = ((131, 67),)
FEW = 128  # an axis of at most so many is taken at its largest in a pair
EMULATED_CHOICES = 48  # with the place of a long axis: what suits that axis, and one label, for rows without are quick
OTHERS = 7  # numbers of choices from one input of a size to the next: each of two to five choices is another one
LARGEST_DRAWN = 2**19  # elements of an array, where sizes are drawn at random
SHRINKING_SECONDS = 6.0
POISONS = (np.nan, np.inf, -np.inf)


def any_size(case: Case, tally: Tally) -> None:
    """The formula is followed at any size: each axis in turn from 1 to 100000 and more, the others small."""
    slow: dict[str, int] = {}  # by axis
    which, of = case.share
    for drawn in islice(sizes_of(case), which, None, of):
        axis = max(drawn.sizes, key=lambda name: drawn.sizes[name])
        if axis in slow and drawn.sizes[axis] > slow[axis]:
            continue
        start = time.monotonic()
        judge_drawn(case, tally, drawn)
        compiling = drawn.sizes[axis] < EMULATED_RUNGS[0]  # what takes long on so little
        if case.backend.emulated and not compiling and time.monotonic() - start > SLOW_SECONDS:
            slow[axis] = drawn.sizes[axis]
    tally.left_out = ", ".join(f"more than {size} {axis} (slow)" for axis, size in slow.items())


def any_values(case: Case, tally: Tally) -> None:
    """The formula is followed on any values: all negative, equal, far apart, tiny, sorted, tied; ids and labels too."""
    for drawn in values_of(case):
        one = judge_drawn(case, tally, drawn)
        if one is not None:
            arrays = case.upload(one.arrays)
            no_views_but_the_formulas(case, one, arrays, case.run(arrays, one))


def propagates(case: Case, tally: Tally) -> None:
    """NaN or infinity in one element reaches the outputs that the formula says, and no other."""
    axes = axes_of(_draw_of(case.op))
    rng = np.random.default_rng(case.seed)
    # among ties there are zeros, which may neither hide NaN nor bring it in
    for number, regime in product(range(8), ("normal", "ties")):
        drawn = Drawn(case.seed, number, small(axes, number), regime)
        arrays, params = rounded(case.op, _draw_of(case.op)(Drawing(drawn), **drawn.sizes), case.dtype)
        made = {} if case.op.kept is None else case.op.kept(numpy_module, *arrays, **params)
        for i, array in enumerate(arrays):
            if not holds_floats(array) or not array.size or i in made:
                continue
            for poison in POISONS:
                at = np.unravel_index(rng.integers(array.size), array.shape)
                _poisoned(case, tally, drawn, arrays, params, i, at, poison)


def sizes_of(case: Case) -> Iterator[Drawn]:
    """What `any_size` asks for."""
    axes = axes_of(_draw_of(case.op))
    small_only = len(axes) > 3 or case.backend.emulated
    for number, size in enumerate(SQUARE[: -1 if small_only else None]):  # one axis taken for another shows nothing
        yield Drawn(case.seed, number, {axis: min(size, largest) for axis, largest in axes.items()})
    for number, sizes in enumerate(case.op.sizes[: 1 if case.backend.emulated else None]):
        yield Drawn(case.seed, number, sizes)
    yield from _pairs_of(case, axes)
    turns = dict.fromkeys(axes, 0)
    rungs = ((size, axis) for axis, largest in axes.items() for size in ladder(largest))
    for size, axis in sorted(rungs, key=lambda rung: rung[0]):  # what is found is found early
        few = EMULATED_RUNGS[: -1 if case.dtype in NARROW else None]  # sizes go wrong in any dtype alike
        if case.backend.emulated and size > few[0] and size not in few:
            continue
        turn, place = turns[axis], list(axes).index(axis)
        turns[axis] += 1
        number = turn + place
        beside = {**small(axes, number, size), axis: size}
        regime = BY_SIZE[(turn + turn // len(BY_SIZE)) % len(BY_SIZE)]
        if size >= LARGE and case.backend.emulated:
            yield Drawn(case.seed, EMULATED_CHOICES + place, beside, BY_SIZE[0])
        elif size > axes[axis]:  # the largest; and a power of two, so that a mean of whole numbers is exact
            yield Drawn(case.seed, number, beside, BY_SIZE[1])
            even = {other: min(largest, 2) for other, largest in axes.items()}
            # of what is not exact, zeros may be: a softmax of them counts
            exactly = _can_be_exact(case.op, case.dtype, case.backend.product_mode)
            yield Drawn(case.seed, number + OTHERS, {**even, axis: axes[axis]}, BY_SIZE[0] if exactly else "zeros")
        else:
            in_turn = size < LARGE or size in BETWEEN
            yield Drawn(case.seed, number, beside, regime if in_turn else BY_SIZE[size.bit_length() % 2])


def _pairs_of(case: Case, axes: Mapping[str, int]) -> Iterator[Drawn]:
    """Two axes at once long, the others small; of four and more axes, each less long, in one way."""
    reach = {axis: largest if largest <= FEW else largest // 4 for axis, largest in axes.items()}
    pairs = EMULATED_PAIRS if case.backend.emulated else PAIRS[: MOST_PAIRS.get(len(axes), 1)]
    for number, (sizes, (a, b)) in enumerate(product(pairs, combinations(axes, 2))):
        chosen = {**small(axes, number, LARGE), a: min(sizes[0], reach[a]), b: min(sizes[1], reach[b])}
        yield Drawn(case.seed, number, chosen, ("whole numbers", "normal")[number % 2])


def values_of(case: Case) -> Iterator[Drawn]:
    """What `any_values` asks for."""
    axes = axes_of(_draw_of(case.op))
    few, many = (
        {axis: min(largest, usual[k % 4]) for k, (axis, largest) in enumerate(axes.items())}
        for usual in (((6, 9, 11, 5), (6, 131, 9, 5)) if len(axes) < 4 else ((3, 9, 11, 5), (2, 37, 3, 5)))
    )
    drawing = Drawing(Drawn(case.seed, 0, few))
    _draw_of(case.op)(drawing, **few)
    arrays: tuple[int | None, ...] = (*[None] * 4, *range(drawing.count if drawing.count > 1 else 0))
    if case.backend.emulated and case.dtype in NARROW:  # the arithmetic is float32's, which is asked for all
        arrays = (None,)
    number = 0
    for regime in REGIMES:
        for array in arrays:
            yield Drawn(case.seed, number, many if number // 2 % 2 else few, regime, array)
            number += 1


def anything(case: Case, rng: np.random.Generator) -> Drawn:
    """Sizes, regime and choices at random, for `thorough`."""
    axes = axes_of(_draw_of(case.op))
    room, sizes = float(LARGEST_DRAWN), {}
    for axis in rng.permutation(list(axes)):
        sizes[str(axis)] = int(min(axes[axis], room) ** rng.random())
        room = max(1.0, room / sizes[str(axis)])
    array = None if rng.random() < 0.5 else int(rng.integers(len(axes) + 1))
    number = int(rng.integers(2**30))
    return Drawn(case.seed, number, {axis: sizes[axis] for axis in axes}, str(rng.choice(list(REGIMES))), array)


def thoroughly(seconds: float) -> Callable[[Case, Tally], None]:
    """A demand for so many seconds."""

    def thorough(case: Case, tally: Tally) -> None:
        """The formula is followed on whatever is drawn."""
        end, rng = time.monotonic() + seconds, np.random.default_rng((case.seed, 1))
        while time.monotonic() < end:
            judge_drawn(case, tally, anything(case, rng))

    return thorough


def _draw_of(op: Op) -> Callable[..., Any]:
    assert op.draw is not None
    return op.draw


def drawn_input(case: Case, drawn: Drawn) -> Input | None:
    """That input; None where the formula has no finite answer in this dtype.

    Where its bound says nothing, a kernel's answer must be finite too.
    """
    op = case.op
    arrays, params = rounded(op, _draw_of(op)(Drawing(drawn), **drawn.sizes), case.dtype)
    wide = [a.astype(np.float32) if case.dtype in NARROW and holds_floats(a) else a for a in arrays]
    overflows: list[object] = []
    with np.errstate(over="call"), _called(overflows.append):
        plain = outputs(op.formula(numpy_module, *wide, **params))
    if not all(np.isfinite(r).all() for r in plain) or not _can_be_stored(case, wide, params):
        return None
    exactly = drawn.regime in EXACT and _can_be_exact(op, case.dtype, case.backend.product_mode)
    expected = expect(op, arrays, params, case.dtype, case.backend.product_mode, exactly)
    if not all(np.isfinite(b.value).all() for b in expected):
        return None
    if not all(np.isfinite(b.error).all() for b in expected):
        expected = [
            b._replace(error=np.full(b.value.shape, np.inf), likely=np.full(b.value.shape, np.inf)) for b in expected
        ]
    if overflows:  # on the way to a finite answer: more is not asked than NumPy has
        expected = [
            b._replace(error=b.error + np.abs(r - b.value), likely=b.likely + np.abs(r - b.value))
            for b, r in zip(expected, plain, strict=True)
        ]
    return Input(drawn.number, arrays, params, expected, drawn)


@lru_cache(maxsize=64)
def _can_be_exact(op: Op, dtype: str, products: str) -> bool:
    """Whether on small inputs some number, but for 0, is rounded by no order of evaluation: else none is sought."""
    axes, draw = axes_of(_draw_of(op)), _draw_of(op)
    even = {axis: min(largest, 2) for axis, largest in axes.items()}  # then a mean is exact too
    for (number, sizes), regime in product(enumerate([even, small(axes, 0), small(axes, 1)]), EXACT):
        drawn = Drawn(0, number, sizes, regime)
        arrays, params = rounded(op, draw(Drawing(drawn), **drawn.sizes), dtype)
        if any(
            ((b.error == 0) & (b.value != 0)).any() for b in expect(op, arrays, params, dtype, products, exactly=True)
        ):
            return True
    return False


def _can_be_stored(case: Case, wide: Sequence[Any], params: Mapping[str, Any]) -> bool:
    """Whether nothing that a formula stores, on the way or in the end, is too large for the dtype: float16 to 65504."""
    if case.dtype not in NARROW:
        return True
    narrow = dtype_of(case.dtype)

    class Storing(NumpyModule):
        @staticmethod
        def stored(x: Any) -> Any:
            return x.astype(narrow).astype(np.float32)

    with np.errstate(all="ignore"):
        found = outputs(case.op.formula(Storing(), *wide, **params))
        return all(np.isfinite(np.asarray(r).astype(narrow).astype(np.float32)).all() for r in found)


@contextmanager
def _called(overflow: Callable[[str], object]) -> Iterator[None]:
    """A block in which NumPy calls `overflow` where it is told to call."""
    before = np.seterrcall(lambda kind, flag: overflow(kind))
    try:
        yield
    finally:
        np.seterrcall(before)


def judge_drawn(case: Case, tally: Tally, drawn: Drawn) -> Input | None:
    """Judge one, and give it; where it fails, raise what the smallest that still fails is told by."""
    one = drawn_input(case, drawn)
    if one is None:
        return None
    tally.inputs += 1
    try:
        tally.judge(case, one, case.run(case.upload(one.arrays), one))
    except Exception as error:
        smaller = _smallest(case, drawn, error)
        raise smaller or error from error
    return one


def _smallest(case: Case, drawn: Drawn, first: Exception) -> Broken | None:
    """What the smallest input of this kind that still fails is told by, found by halving; None if it cannot be had."""
    end, found = time.monotonic() + SHRINKING_SECONDS, None

    def fails(tried: Drawn) -> Broken | None:
        one = drawn_input(case, tried)
        if one is None:
            return None
        try:
            Tally().judge(case, one, case.run(case.upload(one.arrays), one))
        except Exception as error:
            if isinstance(error, type(first)):  # else it is of another kind than what is told
                return error if isinstance(error, Broken) else Broken(f"{one}: {what_raised(error)}")
        return None

    for axis in drawn.sizes:
        passes, size = 0, drawn.sizes[axis]
        while size - passes > 1 and time.monotonic() < end:
            middle = (passes + size) // 2
            tried = drawn._replace(sizes={**drawn.sizes, axis: middle})
            broken = fails(tried)
            if broken is None:
                passes = middle
            else:
                drawn, size, found = tried, middle, broken
    return found


def _poisoned(
    case: Case, tally: Tally, drawn: Drawn, arrays: tuple[np.ndarray, ...], params: dict[str, Any], i: int,
    at: tuple[Any, ...], poison: float,
) -> None:  # fmt: skip
    given = [a.copy() for a in arrays]
    given[i][at] = poison
    _make_kept(case.op, given, params)
    expected = _unbounded(case, given, params)
    one = Input(drawn.number, tuple(given), params, expected, drawn)
    results = case.download(case.run(case.upload(given), one))
    for b, result, far in zip(expected, results, _reach(case, given, params, i, at), strict=True):
        got = np.asarray(result, np.float64)
        spreads = ~np.isfinite(got) & np.isfinite(b.value) & ~far
        if params.get("rate"):  # dropout may take NaN away, as the formula does, or leave it: a product with 0
            hides = np.zeros(got.shape, bool)
        else:
            hides = ~np.isnan(got) & np.isnan(b.value) if np.isnan(poison) else np.isfinite(got) & np.isinf(b.value)
        wrong = spreads | hides
        if wrong.any():
            first = tuple(int(n[0]) for n in np.nonzero(np.atleast_1d(wrong)))
            where = f"{b.name}[{', '.join(map(str, first))}]" if b.value.ndim else b.name
            value, came = np.atleast_1d(b.value)[first], np.atleast_1d(got)[first]
            place = f"{input_name(case.op, i)}[{', '.join(str(int(n)) for n in at)}]"
            raise Broken(f"{one}: {place} is {poison}: {where}: expected {value:.9g}, got {came:.9g}")
    tally.inputs += 1


def _make_kept(op: Op, given: list[np.ndarray], params: dict[str, Any]) -> None:
    """Put in its place what a forward would have kept of these inputs."""
    if op.kept is not None:
        for k, made in op.kept(numpy_module, *given, **params).items():
            given[k] = np.asarray(made, given[k].dtype)


def _reach(
    case: Case, given: list[np.ndarray], params: dict[str, Any], i: int, at: tuple[Any, ...]
) -> list[np.ndarray]:  # fmt: skip
    """Which elements of each output NaN would reach, were nothing dropped.

    Infinity may turn to NaN in an expression that equals the formula (inf - inf), but goes no further than that.
    """
    farthest = [a.copy() for a in given]
    farthest[i][at] = np.nan
    _make_kept(case.op, farthest, params)
    undropped = {**params, "rate": 0.0} if "rate" in params else params
    return [~np.isfinite(b.value) for b in _unbounded(case, farthest, undropped)]


def _unbounded(case: Case, arrays: Sequence[np.ndarray], params: Mapping[str, Any]) -> list[Bound]:
    """What the formula gives in float64, where it is only asked which results are finite."""
    wide = [a.astype(np.float64) if holds_floats(a) else a for a in arrays]
    values = [np.asarray(value) for value in outputs(case.op.formula(numpy_module, *wide, **params))]
    for number in case.op.whole_outputs:  # there is no integer that is not finite
        values[number] = np.where(np.isfinite(values[number]), values[number], 0.0)
    return [Bound(v, v, v, v, case.dtype, output_name(case.op, number)) for number, v in enumerate(values)]
