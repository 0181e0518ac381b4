"""Many training steps in lockstep: what each op adds of its own, and what it only passes on.

Both sides train from the same weights on the same batches, each on its own results. Every call of every step is judged
as `lab.lockstep.diff` does. Of each op there remains the worst of its *local* error (B on A's inputs), in shares of the
hard bound, and how far its inputs and outputs stood apart, which is *inherited*: it grows from step to step, while the
local error stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from minibert.data.batching import PackedBatch
from minibert.lab.lockstep.assess import Assessment
from minibert.lab.lockstep.diff import Difference, Row, diff_step
from minibert.lab.lockstep.trace import MakeModel, Side, Training


@dataclass(frozen=True)
class StepDrift:
    """One step on both sides."""

    step: int  # from 1
    loss_a: float
    loss_b: float
    weights_apart: float  # after it: norm of the difference over the norm of A's
    bound_share: float  # the largest of any call on either side


@dataclass
class OpDrift:
    """One op in one phase, over all calls of all steps."""

    op: str
    phase: str
    calls: int = 0
    unjudged: int = 0
    shares: dict[str, float] = field(default_factory=lambda: {"a": 0.0, "b": 0.0, "local": 0.0})  # of the bound
    ulp_max: float = 0.0  # local
    err_over_us: float = 0.0
    worst: tuple[int, str] = (0, "")  # step and place of the largest local share
    inherited: list[float] = field(default_factory=list)  # the largest of each step: inputs apart, relative
    outputs: list[float] = field(default_factory=list)
    growth: list[float] = field(default_factory=list)  # the median of each step

    def add(self, step: int, rows: list[Row]) -> None:
        """The calls of one step."""
        self.calls += len(rows)
        for row in rows:
            self.unjudged += row.local is None
            for name in self.shares:
                result: Assessment | None = getattr(row, name)
                if result is None:
                    continue
                share = result.judgement.bound_share
                if name == "local" and (share > self.shares[name] or not self.worst[0]):
                    self.worst = step, row.place
                self.shares[name] = max(self.shares[name], share)
            if row.local is not None:
                self.ulp_max = max(self.ulp_max, row.local.judgement.ulp_max)
                self.err_over_us = max(self.err_over_us, row.local.judgement.err_over_us)
        for kept, found in (
            (self.inherited, [row.inputs.relative for row in rows if row.inputs is not None]),
            (self.outputs, [row.outputs.relative for row in rows if row.outputs is not None]),
        ):
            kept.append(max(found, default=0.0))
        growths = [row.growth for row in rows if row.growth is not None]
        if growths:
            self.growth.append(median(growths))


@dataclass
class Drift:
    """What `drift` found; `found` is the first step in which a call left its bound, where one did."""

    steps: list[StepDrift] = field(default_factory=list)
    ops: dict[tuple[str, str], OpDrift] = field(default_factory=dict)  # by op and phase, in the order of the step
    found: Difference | None = None

    @property
    def ok(self) -> bool:
        return self.found is None

    @property
    def calls(self) -> int:
        return sum(op.calls for op in self.ops.values())


def drift(
    a: Side,
    b: Side,
    make_model: MakeModel,
    batch_of: Callable[[int], PackedBatch],
    steps: int,
    learning_rate: float = 1e-4,
    progress: Callable[[str], None] = lambda text: None,
) -> Drift:
    """Compare so many training steps of two sides, call by call; ends with the first step in which one is wrong.

    `batch_of(0)` is the batch of the first step. Raises UserError as `minibert.lab.lockstep.diff.diff` does.
    """
    run_a, run_b = (Training(side, make_model, batch_of, learning_rate) for side in (a, b))
    made = Drift()
    for step in range(1, steps + 1):
        found = diff_step(run_a, run_b, lambda text, step=step: progress(f"step {step} of {steps}: {text}"))  # type: ignore[misc]
        by_op: dict[tuple[str, str], list[Row]] = {}
        for row in found.rows:
            by_op.setdefault((row.op, row.phase), []).append(row)
        for key, rows in by_op.items():
            made.ops.setdefault(key, OpDrift(*key)).add(step, rows)
        if not found.ok:
            made.found = found
            return made
        largest = max(x.judgement.bound_share for row in found.rows for x in row.judged)
        loss_a, loss_b = (float("nan") if loss is None else loss for loss in found.losses)
        made.steps.append(StepDrift(step, loss_a, loss_b, _apart(run_a.state(), run_b.state()), largest))
    return made


def _apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Over all weights together."""
    weights = [name for name in a if name.startswith("model.")]
    far = sum(float(np.sum((b[n].astype(np.float64) - a[n]) ** 2)) for n in weights)
    norm = sum(float(np.sum(a[n].astype(np.float64) ** 2)) for n in weights)
    return float(np.sqrt(far / norm))
