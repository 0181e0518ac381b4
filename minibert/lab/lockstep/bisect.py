"""The first step of a run in which a side leaves its bound: step, then op, then element.

To judge every call of every step takes seconds a step. So the run is gone through once at its own speed: A trains, and
B repeats each of its steps from A's state, so that what B gives is of that step alone. How far it stands from A's is
kept, and now and then A's state (a checkpoint). The step that stands out most, against the first, is gone through again
from the checkpoint before it, bit by bit as it was, and judged call by call (`lab.lockstep.diff`). If a call left its
bound there, bisection between it and the last step known to be clean finds the first: each step it looks at is judged
in the same way.

Bisection takes for granted that a fault hangs on what a call is given. Where it does not (a step gives something else
when B repeats it, or the call that went wrong is right on kernels that were just loaded), the run is gone through once
more on such kernels, which are then called as often as in a run, and the steps that stood out are judged on the way.
Where none is wrong any more, a kernel gives other results each time.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minibert.data.batching import PackedBatch
from minibert.errors import UserError
from minibert.kernels.array_module import numpy_module
from minibert.kernels.op import holds_floats, outputs
from minibert.kernels.readings import PRECISIONS
from minibert.lab.lockstep.diff import Difference, Evidence, diff_step
from minibert.lab.lockstep.reproduce import run_call
from minibert.lab.lockstep.trace import MakeModel, Seen, Side, Training, raised
from minibert.model.checkpoint import read_arrays, write_arrays

JUDGED = 2  # steps that stand out most in each measure are judged before a run is called clean
NOISE = {"gradients": 1e-7, "updates": 10.0, "loss": 1e-7}  # what is nearer than this stands nowhere apart
STANDS_OUT = 10  # times as far as the first step
LEAST_SHARE = 1e-4  # a parameter whose gradient is less than that of the whole gradient is compared with the whole


@dataclass(frozen=True)
class StepDistance:
    """How far B's step stands from A's, from one state."""

    step: int  # from 1
    gradients: float  # of the parameter that stands furthest: norm of the difference over the norm
    updates: float  # of an element that the optimiser wrote, from its formula on B's own gradients: in roundings
    loss: float  # relative
    broken: str = ""  # what ended B's step

    def against(self, first: StepDistance) -> float:
        """How many times as far as a step that is known to be clean, in the measure that says most."""
        return max(self.measure(name, first) for name in NOISE)

    def measure(self, name: str, first: StepDistance) -> float:
        """How many times as far, in one measure: each has a noise of its own."""
        return math.inf if self.broken else getattr(self, name) / max(getattr(first, name), NOISE[name])


@dataclass
class Bisection:
    """What `bisect` found."""

    steps: int
    distances: list[StepDistance] = field(default_factory=list)
    judged: dict[int, Difference] = field(default_factory=dict)  # by step
    unsteady: int | None = None  # a step of which B gave something else when it was run again

    @property
    def ok(self) -> bool:
        return self.first is None and self.unsteady is None

    @property
    def first(self) -> int | None:
        """The first step that was found wrong."""
        return min((step for step, found in self.judged.items() if not found.ok), default=None)

    def suspects(self) -> list[StepDistance]:
        """Of each measure the steps that stand out most: what one shows is not to be lost in the noise of another."""
        first, *rest = self.distances
        most = {d.step: d for name in NOISE for d in sorted(rest, key=lambda d: -d.measure(name, first))[:JUDGED]}
        return sorted(most.values(), key=lambda d: -d.against(first))

    @property
    def found(self) -> Difference:
        """Of the first step that was found wrong, or, where none was, of the last that was judged."""
        return self.judged[self.first or max(self.judged)]


def bisect(
    a: Side,
    b: Side,
    make_model: MakeModel,
    batch_of: Callable[[int], PackedBatch],
    steps: int,
    learning_rate: float = 1e-4,
    progress: Callable[[str], None] = lambda text: None,
) -> Bisection:
    """Find the first of `steps` training steps in which A or B leaves its bound.

    `batch_of(0)` is the batch of the first step. Raises UserError where A breaks down, or gives other bits when a step
    is run again: then there is nothing to hold on to.
    """
    run = _Run(a, b, make_model, batch_of, learning_rate, progress, Bisection(steps))
    with tempfile.TemporaryDirectory(prefix="minibert-bisect-") as folder:
        run.folder = Path(folder)
        run.keep(0)
        run.search()
        if not run.found.ok and run.hangs_on_earlier_calls():
            run.search_by_calls()
    return run.found


class _Run:
    """Both sides over the same steps, and the checkpoints of A."""

    def __init__(
        self, a: Side, b: Side, make_model: MakeModel, batch_of: Callable[[int], PackedBatch], learning_rate: float,
        progress: Callable[[str], None], found: Bisection,
    ) -> None:  # fmt: skip
        self.a = Training(a, make_model, batch_of, learning_rate)
        self.b = Training(b, make_model, batch_of, learning_rate)
        self.progress, self.found = progress, found
        self.folder = Path()
        self.every = max(1, math.isqrt(found.steps))  # steps from one checkpoint to the next
        self.kept: list[int] = []  # steps taken at each
        self.losses: dict[int, float] = {}  # of A

    def search(self) -> None:
        """The first step that is wrong on kernels as they are by the time it is judged."""
        if not self.judge(1).ok:
            return
        self.load_anew()  # from here on B's calls are those of a run
        self.go_through()
        first = self.found.distances[0]
        for distance in self.found.suspects():
            if self.found.first is not None and self.found.first < distance.step:
                continue
            if not self.judge(distance.step).ok:
                self.narrow(distance.step)
            elif distance.against(first) > STANDS_OUT and not self.is_steady(distance):
                self.found.unsteady = distance.step
                break

    def hangs_on_earlier_calls(self) -> bool:
        """Whether what was found is not there on kernels that were just loaded, or was not when B came by first."""
        step, evidence = self.found.first, self.found.found.evidence
        if step is None or evidence is None or evidence.on == "A":
            return step is None
        if self.found.distances and not self.is_steady(self.found.distances[step - 1]):
            return True
        return _is_right(self.b.side, evidence)

    def search_by_calls(self) -> None:
        """The run from its start on kernels just loaded: each step that stood out is judged, until one is wrong."""
        distances = self.found.distances
        standing_out = [d.step for d in distances if d.against(distances[0]) > STANDS_OUT]
        # when the first step is judged, B runs each call twice: what goes wrong there does so in the first two of a run
        looked_at = {*standing_out, *(d.step for d in self.found.suspects())} if distances else {1, 2}
        self.load_anew()
        self.replay(0)
        for number in range(1, min(max(looked_at), self.found.steps) + 1):
            before = self.a.state()
            if number in looked_at:
                self.b.restore(before)
                self.progress(f"judging step {number}")
                found = diff_step(self.a, self.b, local=False)
                if not found.ok:
                    self.blame(number, found)
                    return
            else:
                self.progress(f"step {number} again")
                self._step_of_a(number)
                if self._repeated(number, before).broken:
                    return

    def blame(self, step: int, found: Difference) -> None:
        """Step and calls are those of a run: what was said of it before was said of kernels called more often."""
        self.found.judged = {n: d for n, d in self.found.judged.items() if d.ok and n < step} | {step: found}
        self.found.unsteady = None
        row, evidence = found.culprit, found.evidence
        if row is None or evidence is None or evidence.on == "A":
            return
        in_step = max(sum(r.op == row.op for r in one.rows) for one in self.found.judged.values())
        before = sum(r.op == row.op for r in found.rows if r.call < row.call)
        by_then = evidence._replace(calls=(step - 1) * in_step + before + 1)
        if _is_right(self.b.side, evidence) and not _is_right(self.b.side, by_then):
            found.evidence = by_then

    def load_anew(self) -> None:
        self.b.side = self.b.side.anew()

    def keep(self, taken: int) -> None:
        write_arrays(self.folder / f"{taken}.safetensors", self.a.state())
        self.kept.append(taken)

    def go_through(self) -> None:
        """All steps: A's run, and how far B's stand from it."""
        self.replay(0)
        for number in range(1, self.found.steps + 1):
            self.progress(f"step {number} of {self.found.steps}")
            before = self.a.state()
            self.losses[number] = self._step_of_a(number)
            self.found.distances.append(self._repeated(number, before))
            if number % self.every == 0:
                self.keep(number)

    def _step_of_a(self, number: int) -> float:
        try:
            return self.a.step()
        except FloatingPointError as error:
            raise UserError(
                f"step {number} on side A: {error}; take fewer --steps, or make A the side you trust"
            ) from None

    def _repeated(self, number: int, before: Mapping[str, np.ndarray]) -> StepDistance:
        """B's step from A's state."""
        self.b.restore(before)
        updates = [0.0]
        try:
            loss = self.b.step(lambda seen: updates.append(_from_formula(seen)), phases=("optimiser",))
        except MemoryError:
            raise
        except Exception as error:  # whatever a wrong kernel leads to
            return StepDistance(number, 0.0, 0.0, 0.0, raised(error))
        expected = self.losses[number]
        apart = abs(loss - expected) / abs(expected) if expected else abs(loss)
        return StepDistance(number, _furthest(_gradients(self.a), _gradients(self.b)), max(updates), apart)

    def replay(self, taken: int) -> None:
        """Put A where it stood after so many steps, through the checkpoint before."""
        start = max(step for step in self.kept if step <= taken)
        arrays, _ = read_arrays(self.folder / f"{start}.safetensors")
        self.a.restore(arrays)
        for number in range(start + 1, taken + 1):
            self.progress(f"step {number} again")
            self.hold(number, self._step_of_a(number))

    def hold(self, number: int, loss: float | None) -> None:
        """A's step must be the same each time: there is nothing else to hold on to."""
        if loss != self.losses.get(number, loss):
            raise UserError(
                f"side A ({self.a.side.name}) gave a loss of {self.losses[number]!r} in step {number}, and {loss!r} "
                "when it was run again: a kernel of its own gives other bits each time; `minibert check` says which"
            )

    def judge(self, step: int) -> Difference:
        """Every call of one step, on both sides, from A's state before it."""
        if step not in self.found.judged:
            self.replay(step - 1)
            self.b.restore(self.a.state())
            self.progress(f"judging step {step}")
            found = diff_step(self.a, self.b, lambda text: self.progress(f"judging step {step}: {text}"))
            if found.ok:
                self.hold(step, found.losses[0])
            self.found.judged[step] = found
        return self.found.judged[step]

    def is_steady(self, distance: StepDistance) -> bool:
        """Whether B gives the same again in a step that stood out."""
        self.replay(distance.step - 1)
        before = self.a.state()
        self._step_of_a(distance.step)
        return self._repeated(distance.step, before) == distance

    def narrow(self, bad: int) -> None:
        """Bisect between the last clean step before `bad`, and `bad`."""
        clean = max(step for step, found in self.found.judged.items() if found.ok and step < bad)
        while bad - clean > 1:
            middle = (clean + bad) // 2
            if self.judge(middle).ok:
                clean = middle
            else:
                bad = middle


def _is_right(side: Side, evidence: Evidence) -> bool:
    """Whether the last of the calls goes well on kernels that were just loaded."""
    return run_call(side.anew(), evidence.op, evidence.params, evidence.inputs, evidence.calls).judgement.ok


def _gradients(training: Training) -> dict[str, np.ndarray]:
    """Of the last step, by parameter."""
    with training.side.working() as backend:
        return {
            name: np.array(backend.numpy(p.grad), np.float64)
            for name, p in training.model.named_parameters() if p.grad is not None
        }  # fmt: skip


def _furthest(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """The parameter that stands furthest, relative to its norm, or to a share of the norm of all."""
    norms = {name: float(np.linalg.norm(x)) for name, x in a.items()}
    least = LEAST_SHARE * math.hypot(*norms.values())
    apart = {name: float(np.linalg.norm(b[name] - x)) for name, x in a.items()}
    shares = [d / max(norms[name], least) for name, d in apart.items() if d != 0]
    return max((math.inf if math.isnan(share) else share for share in shares), default=0.0)


def _from_formula(seen: Seen) -> float:
    """The element of a call that stands furthest from the formula on the same inputs, in roundings of its dtype.

    AdamW divides by the size of a gradient: where that is all but zero, the update is rounding divided by rounding, and
    two sides that are both right make something else of it. So an update is measured on the gradient that it was made
    from, whatever error that has; the gradients are compared by themselves. A rounding is that of the larger of what
    was there before and what is expected: the terms of an update are of that size, its sum may be smaller.
    """
    op = seen.op
    with np.errstate(all="ignore"):
        wide = [x.astype(np.float64) if holds_floats(x) else x for x in map(np.asarray, seen.inputs)]
        expected = outputs(op.formula(numpy_module, *wide, **seen.params))
        if seen.problem or [np.shape(x) for x in expected] != [x.shape for x in seen.outputs]:
            return math.inf
        furthest = 0.0
        for k, (x, got) in enumerate(zip(expected, seen.outputs, strict=True)):
            size = np.maximum(np.abs(x), np.abs(wide[op.writes[k]])) if op.writes else np.abs(x)
            precision = PRECISIONS[got.dtype.name]
            unit = precision.roundoff * np.maximum(size, precision.tiny)
            furthest = max(
                furthest, float(np.nan_to_num(np.abs(got.astype(np.float64) - x) / unit, nan=np.inf).max(initial=0.0))
            )
    return furthest
