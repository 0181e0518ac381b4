"""A demand's case: one op on one backend in one dtype, its inputs with what the formula says of them, and a tally."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from minibert.backends import Backend
from minibert.kernels import Array, Op
from minibert.kernels.drawing import Drawn
from minibert.kernels.op import BertSize, Sample, outputs
from minibert.kernels.readings import Bound
from minibert.lab.conform.judge import Judgement, expect, judge_against, misshapen, stored_as

# A step with as many rows as that of MiniLM, which is timed, and narrower; what plays a machine gets fewer.
SHAPE, EMULATED_SHAPE = BertSize(8, 128, 64, 2, 256, 1000, 154), BertSize(4, 32, 64, 2, 256, 500, 19)
STEP = -1  # an input's number, where it is no sample but the op's part in such a step


class Broken(Exception):
    """A demand is not met; the message says where and by how much."""


class Input(NamedTuple):
    """A sample as a backend sees it: floats rounded to the dtype; and what the formula says of it."""

    number: int  # of the sample, or STEP, or of what was drawn
    arrays: tuple[np.ndarray, ...]
    params: dict[str, Any]
    expected: list[Bound]
    drawn: Drawn | None = None  # where it is no sample

    @property
    def is_random(self) -> bool:
        """Whether roundings average out on it, so that a poor evaluation is told from a sensible one."""
        return self.number == STEP if self.drawn is None else self.drawn.regime == "normal"

    def __str__(self) -> str:
        """What it is, for a person: "sample 3", "3 rows, 513 columns, values about -10000"; its shapes and params."""
        what = "part in a step" if self.number == STEP else f"sample {self.number}"
        return f"{self.drawn or what} {shapes_and_params(self.arrays, self.params)}"


@dataclass(frozen=True)
class Case:
    """One op on one backend in one dtype, with the seed of its inputs."""

    op: Op
    backend: Backend
    dtype: str
    seed: int
    share: tuple[int, int] = field(default=(0, 1), compare=False, kw_only=True)  # of what is drawn: which, of how many
    at: list[Input] = field(default_factory=list, compare=False, repr=False, kw_only=True)  # what it ran on last

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
        self.at[:] = [one]
        results = outputs(self.backend.run(self.op, *arrays, **one.params))
        problem = misshapen(one.expected, results)
        if problem:
            raise Broken(f"{one}: {problem}")
        return results

    def download(self, results: Iterable[Array]) -> tuple[np.ndarray, ...]:
        return tuple(self.backend.numpy(r) for r in results)


@lru_cache(maxsize=6)
def _inputs(op: Op, dtype: str, seed: int, products: str) -> tuple[Input, ...]:
    """The samples of one op, with their bounds: kept for the next checks of the same op."""
    samples = enumerate(op.samples(np.random.default_rng(seed)))
    return tuple(_input(op, number, sample, dtype, products) for number, sample in samples)


@lru_cache(maxsize=2)
def _part_in_step(op: Op, dtype: str, seed: int, products: str, size: BertSize) -> Input:
    return _input(op, STEP, op.bench(np.random.default_rng(seed), size), dtype, products)


def _input(op: Op, number: int, sample: Sample, dtype: str, products: str) -> Input:
    arrays, params = rounded(op, sample, dtype)
    return Input(number, arrays, params, expect(op, arrays, params, dtype, products))


def rounded(op: Op, sample: Sample, dtype: str) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    """The arrays of a sample as a backend sees them, and its parameters."""
    given = tuple(np.asarray(a) for a in sample.arrays)
    kinds = stored_as(op, given, dtype)
    return tuple(np.asarray(a, kind) for a, kind in zip(given, kinds, strict=True)), dict(sample.params)


class Tally:
    """The worst of many judgements; the first that fails is raised."""

    def __init__(self) -> None:
        self.inputs = 0
        self.worst: dict[str, float | None] = {"ulp_max": None, "err_over_us": None, "bound_share": None}
        self.likely_share: float | None = None  # on numbers as random as data are
        self.poor = ""  # where it was first above 1
        self.left_out = ""  # of what was planned, and why

    def note(self, **measured: float) -> None:
        for name, value in measured.items():
            self.worst[name] = max(self.worst[name] or 0.0, value)

    def judge(self, case: Case, one: Input, results: Iterable[Array], what: str = "") -> None:
        judgement = judge_against(one.expected, case.download(results))
        if one.drawn is not None:  # then it is known where the bound says nothing
            judgement = judgement._replace(unbounded=0)
        self.add(judgement, f"{one}{what}")
        if one.is_random:
            self.likely_share = max(self.likely_share or 0.0, judgement.likely_share)
            if judgement.poor and not self.poor:
                self.poor = f"{one}{what}: {judgement.poorest}"

    def add(self, judgement: Judgement, where: str) -> None:
        if not judgement.problem:  # with one nothing was measured
            self.note(**{name: getattr(judgement, name) for name in self.worst})
        if not judgement.ok:
            raise Broken(f"{where}: {judgement.problem or judgement.worst}")
        if judgement.unbounded:
            raise Broken(f"{where}: the bound is infinite on {judgement.unbounded} elements, so it would pass anything")


def shapes_and_params(arrays: Iterable[Array], params: Mapping[str, Any]) -> str:
    return f"(shapes {', '.join(str(tuple(a.shape)) for a in arrays)}; params {dict(params)})"


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def demand_same_bits(one: Input, first: Sequence[np.ndarray], second: Sequence[np.ndarray], otherwise: str) -> None:
    for expected, a, b in zip(one.expected, first, second, strict=True):
        if not same_bits(a, b):
            raise Broken(f"{one}: output {expected.name}: {otherwise}")
