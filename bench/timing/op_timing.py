"""One op at a BERT shape on several backends in turn: how long, how near the limit, and right before and after.

The limit is the roofline's (`lab.measure.roofline`): the op's arithmetic at the rate of multiply-adds in registers, its
memory traffic at the highest bandwidth, or what a call costs by itself, whichever is longest. An impossible time is no
figure: nothing is derived of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bench.timing import harness
from minibert.backends import Backend
from minibert.kernels import Op
from minibert.kernels.array_module import numpy_module
from minibert.kernels.op import Array, BertSize, Sample, holds_floats, outputs
from minibert.kernels.readings import Bound, cost
from minibert.lab.conform.judge import expect, judge_against
from minibert.lab.measure import quiet
from minibert.lab.measure.roofline import IMPOSSIBLE, VIEW, Work, floor, note, total, work_of

if TYPE_CHECKING:
    from minibert.lab.measure.peaks import Peaks

SHORTEST = 3e-3  # seconds that one turn lasts: quick ops are called several times in it
SETTLE = 2e-3  # seconds between turns of our own backends, whose BLAS threads soon stop spinning
PER_OP = 2.0  # seconds for all rounds of an op on all backends, beyond the first three rounds
CACHE_LINE = 64
Place = Any  # a Backend, or what has as much of one: bench.peers.torch_formula


@dataclass(frozen=True)
class Timing:
    """One op on one backend."""

    op: str
    backend: str
    by: str  # kernel, library or formula
    seconds: dict[str, Any]  # median, p20 and p80 of the rounds, and all of them
    rounds: int
    flops: int
    bytes: int
    memory: int  # bytes of all arrays: what a cache would have to hold
    first_ms: float = 0.0  # the first call in this process
    compile_s: float = 0.0  # the part of it that went into compiling; 0 where the code came from disk
    peak_bytes: int | None = None  # that a call takes beside its inputs; None where nobody counts them
    bound_share: float = 0.0  # the larger, of before the timing and after it
    ok: bool = True
    ratio: float | None = None  # NumPy's time over this one, by `quiet.ratio`; None without NumPy
    ratio_p20_p80: tuple[float, float] | None = None
    gflops: float | None = None
    gbps: float | None = None
    predicted_ms: float | None = None  # by the roofline; None where no peaks were measured
    limit: str | None = None  # arithmetic, memory or launch
    limit_share: float | None = None  # predicted over measured: above 1 the note says why
    note: str = ""  # by `roofline.note`

    @property
    def ms(self) -> float:
        return float(self.seconds["median"]) * 1e3

    def against(self, peaks: Peaks | None, launch_s: float) -> Timing:
        """With what the roofline says, and rates; of an impossible time none."""
        rates: dict[str, Any] = {"gflops": self.flops / self.ms * 1e-6, "gbps": self.bytes / self.ms * 1e-6}
        if peaks is None:
            return replace(self, **rates)
        works = {Work(self.flops, self.bytes, self.memory, self.note == VIEW): 1}
        least, said = floor(total(works), peaks, launch_s), note(works, self.ms * 1e-3, peaks, launch_s)
        predicted: dict[str, Any] = {"predicted_ms": least.seconds * 1e3, "limit": least.limit, "note": said}
        if said == IMPOSSIBLE:
            return replace(self, **predicted, ratio=None, ratio_p20_p80=None)
        return replace(self, **rates, **predicted, limit_share=least.seconds * 1e3 / self.ms)


class Judged(NamedTuple):
    """The largest share of the hard bound that the outputs used up; why they are wrong, or empty."""

    bound_share: float
    problem: str


class Inputs:
    """The arrays of a sample, in memory of their own anew for each round.

    On the CPU all places read the very same arrays, each on a cache line's begin: where an array begins within one
    makes tens of per cent. New memory at each round makes the rounds differ by what two runs would differ by.
    """

    def __init__(self, sample: Sample, dtype: str) -> None:
        arrays = map(np.asarray, sample.arrays)
        self.host = [a.astype(dtype) if holds_floats(a) else a for a in arrays]
        self.params: Mapping[str, Any] = sample.params
        self.shared = [aligned(a) for a in self.host]
        self.at: list[tuple[Place, list[Array]]] = []

    def on(self, place: Place) -> list[Array]:
        """The arrays there; the list's elements change with each `renew`."""
        held = [place.asarray(a) for a in self.shared]
        self.at.append((place, held))
        return held

    def renew(self) -> None:
        self.shared = [aligned(a) for a in self.host]
        for place, held in self.at:
            held[:] = [place.asarray(a) for a in self.shared]


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins on a cache line; one whose elements are not in order keeps the order that they have."""
    if not array.flags.c_contiguous:
        return array.copy(order="K")
    memory = np.empty(array.nbytes + CACHE_LINE, np.uint8)
    begin = -memory.ctypes.data % CACHE_LINE
    copy = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def judged(op: Op, place: Place, inputs: Inputs, expected: Sequence[Bound]) -> Judged:
    """Run the op once and hold it to its bound."""
    arrays = [place.asarray(aligned(a)) for a in inputs.host]
    results = tuple(place.numpy(r) for r in outputs(place.run(op, *arrays, **inputs.params)))
    judgement = judge_against(list(expected), results)
    problem = "" if judgement.ok else f"{op.name} on {place.name}: {judgement.problem or judgement.worst}"
    return Judged(judgement.bound_share, problem)


def timings(
    op: Op, places: Sequence[Backend], opponents: Sequence[Place], size: BertSize, dtype: str, rounds: int,
    progress: Callable[[str], None],
) -> tuple[list[Timing], list[str], dict[str, str]]:  # fmt: skip
    """Time one op everywhere. What is wrong, in words, beside it, and why an opponent was left out."""
    inputs = Inputs(op.bench(np.random.default_rng(0), size), dtype)
    unseen = Inputs(op.bench(np.random.default_rng(1), size), dtype)
    expected = expect(op, inputs.host, inputs.params, dtype)
    before = {place.name: judged(op, place, inputs, expected) for place in places}
    taking: list[Place] = [*places]
    skipped: dict[str, str] = {}
    for one in opponents:
        try:
            before[one.name] = judged(op, one, inputs, expected)
        except Exception as error:  # a library refuses in ways of its own
            skipped[one.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        taking.append(one)
    contestants = [contestant(op, place, inputs) for place in taking]
    settle = SETTLE if len(taking) == len(places) else harness.SETTLE
    harness.interleaved(contestants, rounds, progress, inputs.renew, settle, PER_OP)
    expected = expect(op, unseen.host, unseen.params, dtype)
    after = {place.name: judged(op, place, unseen, expected) for place in taking}
    problems = [found[place.name].problem for place in taking for found in (before, after)]
    rows = [
        timing(op, place, one, inputs, max(before[place.name].bound_share, after[place.name].bound_share),
               not (before[place.name].problem or after[place.name].problem))
        for place, one in zip(taking, contestants, strict=True)
    ]  # fmt: skip
    return with_ratio(rows), [text for text in problems if text], skipped


def contestant(op: Op, place: Place, inputs: Inputs) -> harness.Contestant:
    """One place as the harness times it."""
    arrays, params = inputs.on(place), inputs.params

    def call() -> None:
        place.run(op, *arrays, **params)
        place.synchronize()

    return harness.Contestant(place.name, call, cost(op, *inputs.host, **params).flops, shortest=SHORTEST)


def timing(op: Op, place: Place, one: harness.Contestant, inputs: Inputs, bound_share: float, ok: bool) -> Timing:
    return replace(
        of_one(op, place, inputs, one.figures()),
        first_ms=one.first_s * 1e3, compile_s=one.compile_s or 0.0, peak_bytes=peak_bytes(place, one),
        bound_share=bound_share, ok=ok,
    )  # fmt: skip


def of_one(op: Op, place: Place, inputs: Inputs, seconds: dict[str, Any]) -> Timing:
    """The op's work beside the seconds that it took."""
    results = () if op.writes else outputs(op.formula(numpy_module, *inputs.host, **inputs.params))
    work = work_of(op, inputs.host, inputs.params, results)
    return Timing(
        op.name, place.name, place.by(op), seconds, len(seconds["all"]), work.flops, work.bytes, work.memory,
        note=VIEW if work.view else "",
    )  # fmt: skip


def peak_bytes(place: Place, one: harness.Contestant) -> int | None:
    if not isinstance(place, Backend):
        return None
    with place.peak_memory() as peak:
        one.call()
        return peak()


def with_ratio(rows: list[Timing]) -> list[Timing]:
    """Each with NumPy's time over its own, where NumPy is there."""
    reference = next((t.seconds["all"] for t in rows if t.backend == "numpy"), None)
    found = [None if reference is None else quiet.ratio(reference, t.seconds["all"]) for t in rows]
    return [
        t if r is None else replace(t, ratio=r.median, ratio_p20_p80=(r.p20, r.p80))
        for t, r in zip(rows, found, strict=True)
    ]


def peaks_of(place: Place, cpu: Peaks) -> Peaks | None:
    """The CPU's for what computes in its memory; elsewhere none were measured (on a GPU: make gpu-check)."""
    held = place.asarray(np.zeros(1, np.float32))
    return cpu if isinstance(held, np.ndarray) or place.name == "torch" else None
