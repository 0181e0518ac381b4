"""What a comparison found: of each op, of each backend, of all; and of the machine, where a report asks for it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minibert.backends.base import Backend
from minibert.data.batching import PackedBatch
from minibert.kernels.op import Op
from minibert.kernels.readings import Cost
from minibert.lab.conform.judge import Judgement
from minibert.lab.measure.energy import Meter
from minibert.lab.measure.quiet import Spread, ratio
from minibert.lab.measure.roofline import Work, total

if TYPE_CHECKING:
    from minibert.lab.measure.peaks import Peaks

STAGES = ("preprocess", "forward", "backward", "optimiser", "inference")
TRAINING = ("forward", "backward", "optimiser")


@dataclass
class OpRecord:
    """One op on one backend: what one step spends on it, and the worst of its judged calls."""

    op: Op
    works: Counter[Work] = field(default_factory=Counter)  # of the calls of one step
    seconds: list[float] = field(default_factory=list)  # of each step
    judgements: list[Judgement] = field(default_factory=list)
    ulps: Counter[str] = field(default_factory=Counter)  # elements of the judged calls by error (`assess`)

    @property
    def calls(self) -> int:
        """In one step."""
        return self.works.total()

    @property
    def cost(self) -> Cost:
        """Of one step."""
        return total(self.works)

    @property
    def median_seconds(self) -> float:
        return median(self.seconds) if self.seconds else 0.0

    def worst(self, measure: str) -> float | None:
        return max((getattr(j, measure) for j in self.judgements), default=None)

    @property
    def failures(self) -> list[Judgement]:
        """Calls that left their bound, or of which an infinite bound says nothing."""
        return [j for j in self.judgements if not j.ok or j.unbounded]


class Moment(NamedTuple):
    """Memory at the end of one call of an op."""

    seconds: float  # since the step began; following the memory slows it
    live_bytes: int  # above what was there when it began
    stage: str
    op: str


class Stage(NamedTuple):
    """One stage on one backend: the median over steps, and the peak memory above what stood before it."""

    seconds: float
    peak_bytes: int


@dataclass
class Run:
    """One backend's part of the comparison."""

    backend: Backend
    ops: dict[Op, OpRecord] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in STAGES})
    peaks: dict[str, int] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)  # after the last step
    joules: dict[str, list[float | None]] = field(default_factory=dict)  # by stage and of the "step", of each step
    memory: list[Moment] = field(default_factory=list)  # of one training step
    launch_seconds: float | None = None  # what a call of an op costs by itself

    @property
    def stages(self) -> dict[str, Stage]:
        return {name: Stage(median(self.times[name]), self.peaks[name]) for name in STAGES}

    @property
    def step_seconds(self) -> float:
        return sum(median(self.times[name]) for name in TRAINING)

    def seconds(self, of: Op | str = "step") -> list[float]:
        """What an op, a stage or the whole "step" took in each timed step."""
        if isinstance(of, Op):
            return self.ops[of].seconds
        if of == "step":
            return [sum(stages) for stages in zip(*(self.times[name] for name in TRAINING), strict=True)]
        return self.times[of]

    def record(self, op: Op) -> OpRecord:
        return self.ops.setdefault(op, OpRecord(op))

    @cached_property
    def on_cpu(self) -> bool:
        return on_cpu(self.backend)


def on_cpu(backend: Backend) -> bool:
    """Whether what the CPU can do is what limits this backend."""
    return not backend.emulated and isinstance(backend.asarray(np.zeros(1)), np.ndarray)


@dataclass
class Extras:
    """What a report shows beside the comparison: ask for it by handing one to `compare`, which fills it in."""

    dtype: str = "float32"  # of the arrays, for the peaks
    meter: Meter | None = None  # of energy
    peaks: Peaks | None = None  # of the CPU, measured where a backend runs on it
    seconds: dict[str, float] = field(default_factory=dict)  # what measuring each part took

    @contextmanager
    def taking(self, part: str) -> Iterator[None]:
        """Add the time of a block to that of a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began


@dataclass
class Comparison:
    """What `compare` found. The first run is the reference."""

    runs: list[Run]
    batch: PackedBatch
    samples: int
    timed: bool = True  # False where a wrong op made training break down: there is nothing to time
    extras: Extras | None = None
    disturbance: Mapping[str, Any] = field(default_factory=dict)  # by `Load.disturbance`, until the last timed step

    @property
    def failures(self) -> list[tuple[Run, OpRecord, Judgement]]:
        return [(run, r, j) for run in self.runs for r in run.ops.values() for j in r.failures]

    @property
    def ok(self) -> bool:
        return not self.failures

    def speed(self, run: Run, of: Op | str = "step") -> Spread | None:
        """How many times as fast as the reference it is, in an op, a stage or the whole training step.

        None of the reference itself, where nothing was timed, and where one of both plays another machine.
        """
        reference = self.runs[0]
        played = run.backend.emulated or reference.backend.emulated
        return None if run is reference or played or not self.timed else ratio(reference.seconds(of), run.seconds(of))

    def loss_distance(self, run: Run) -> float:
        """The largest relative difference of a loss from the reference's."""
        reference = self.runs[0].losses
        return max(abs(a - b) / (abs(b) or 1.0) for a, b in zip(run.losses, reference, strict=True))

    def weight_distance(self, run: Run) -> float:
        """||w - w_reference|| / ||w_reference|| over all weights, after the last step."""
        reference = self.runs[0].weights
        apart = sum(float(np.sum((run.weights[k].astype(np.float64) - w) ** 2)) for k, w in reference.items())
        return float(np.sqrt(apart / sum(float(np.sum(w.astype(np.float64) ** 2)) for w in reference.values())))


def rate(amount: float, seconds: float) -> float:
    """Billions a second; 0 where nothing was done or no time was seen to pass."""
    return amount / seconds / 1e9 if seconds > 0 else 0.0
