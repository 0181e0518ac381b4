"""One training step of a BERT on every backend, compared op by op: how far apart, and how fast each.

Every backend gets the same weights, the same batch and the same random masks. Whoever stands in the door of
`Backend.run` sees every op: one watcher keeps the time, another, on the reference backend, hands each op's inputs to
every backend and judges what comes out (`minibert.judge`), so that the error of an op is its own and not inherited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from minibert.backends.base import Backend, Kernel
from minibert.data.batching import PackedBatch
from minibert.errors import UserError
from minibert.judge import Judgement, judge
from minibert.kernels.op import Array, Op, holds_floats, outputs
from minibert.kernels.readings import Cost, cost
from minibert.optim import AdamW, parameter_groups
from minibert.tensor import no_grad

JUDGED_PER_SIGNATURE = 2  # calls of one op on equal shapes that are judged: later layers repeat the first
JUDGED_PIECE = 1 << 20  # elements of a flat in-place op that are judged at a time: bounds take twenty times the memory
STAGES = ("preprocess", "forward", "backward", "optimiser", "inference")

MakeModel = Callable[[Backend], Any]
MakeBatch = Callable[[], PackedBatch]
Signature = tuple[Any, ...]


@dataclass
class OpRecord:
    """One op on one backend: what one step spends on it, and the worst of its judged calls."""

    op: Op
    calls: int = 0  # in one step
    cost: Cost = field(default_factory=lambda: Cost(0, 0))  # of one step
    seconds: list[float] = field(default_factory=list)  # of each step
    judgements: list[Judgement] = field(default_factory=list)

    @property
    def median_seconds(self) -> float:
        return median(self.seconds) if self.seconds else 0.0

    def worst(self, measure: str) -> float | None:
        return max((getattr(j, measure) for j in self.judgements), default=None)

    @property
    def failures(self) -> list[Judgement]:
        """Calls that left their bound, or of which an infinite bound says nothing."""
        return [j for j in self.judgements if not j.ok or j.unbounded]


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

    @property
    def stages(self) -> dict[str, Stage]:
        return {name: Stage(median(self.times[name]), self.peaks[name]) for name in STAGES}

    @property
    def step_seconds(self) -> float:
        return sum(median(self.times[name]) for name in ("forward", "backward", "optimiser"))

    def record(self, op: Op) -> OpRecord:
        return self.ops.setdefault(op, OpRecord(op))


@dataclass
class Comparison:
    """What `compare` found. The first run is the reference."""

    runs: list[Run]
    batch: PackedBatch
    samples: int
    timed: bool = True  # False where a wrong op made training break down: there is nothing to time

    @property
    def failures(self) -> list[tuple[Run, OpRecord, Judgement]]:
        return [(run, r, j) for run in self.runs for r in run.ops.values() for j in r.failures]

    @property
    def ok(self) -> bool:
        return not self.failures

    def loss_distance(self, run: Run) -> float:
        """The largest relative difference of a loss from the reference's."""
        reference = self.runs[0].losses
        return max(abs(a - b) / abs(b) for a, b in zip(run.losses, reference, strict=True))

    def weight_distance(self, run: Run) -> float:
        """||w - w_reference|| / ||w_reference|| over all weights, after the last step."""
        reference = self.runs[0].weights
        apart = sum(float(np.sum((run.weights[k].astype(np.float64) - w) ** 2)) for k, w in reference.items())
        return float(np.sqrt(apart / sum(float(np.sum(w.astype(np.float64) ** 2)) for w in reference.values())))


def compare(
    make_model: MakeModel,
    make_batch: MakeBatch,
    compared: list[Backend],
    steps: int = 6,
    learning_rate: float = 1e-4,
    kernels: Mapping[Op, Kernel] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run `steps` training steps of one batch on every backend in turn; the first backend is the reference.

    `kernels` replace those of every backend but the reference (of the only one, where there is one). The first step
    judges every op and compiles what is not compiled yet; it is not timed. After the last, ops are judged once more, on
    inputs that none of them has seen.
    """
    runs = [Run(backend) for backend in compared]
    batch = make_batch()
    with ExitStack() as stack:
        for run in runs[1:] or runs:
            stack.enter_context(run.backend.using(dict(kernels or {})))
        trainers = []
        for run in runs:
            progress(f"{run.backend.name}: making the model")
            trainers.append(_Trainer(run, make_model(run.backend), batch, learning_rate))
        try:
            _run_all(runs, trainers, make_batch, steps, progress)
        except Exception as error:
            if not any(record.failures for run in runs for record in run.ops.values()):
                if isinstance(error, FloatingPointError):
                    raise UserError(f"{error}: are the weights finite?") from error
                raise
            # an op that was judged wrong has made training break down: that is the verdict
            return Comparison(runs, batch, len(batch.cu_seqlens) - 1, timed=False)
    return Comparison(runs, batch, len(batch.cu_seqlens) - 1)


def _run_all(
    runs: list[Run], trainers: list[_Trainer], make_batch: MakeBatch, steps: int, progress: Callable[[str], None]
) -> None:
    for run, trainer in zip(runs, trainers, strict=True):
        progress(f"{run.backend.name}: step 1 of {steps}" + (", judging every op" if run is runs[0] else ""))
        with ExitStack() as stack:
            stack.enter_context(run.backend.watched_by(_counter(run)))
            if run is runs[0]:
                stack.enter_context(run.backend.watched_by(_judging(runs)))
            trainer.step()
        trainer.infer()
    for number in range(2, steps + 1):
        for run, trainer in zip(runs, trainers, strict=True):  # in turn, so that a slow minute slows all alike
            progress(f"{run.backend.name}: step {number} of {steps}")
            _timed(run, trainer, make_batch)
    for run, trainer in zip(runs, trainers, strict=True):
        progress(f"{run.backend.name}: memory")
        run.weights = trainer.model.state_dict()
        _measure_memory(run, trainer, make_batch)
    progress("judging every op once more")
    with runs[0].backend.watched_by(_judging(runs)):
        trainers[0].forward()
        trainers[0].backward()
        trainers[0].optimise()


class _Trainer:
    """The stages of a training step on one backend."""

    def __init__(self, run: Run, model: Any, batch: PackedBatch, learning_rate: float) -> None:
        self.run, self.model, self.batch = run, model.train(), batch
        self.optimiser = AdamW(parameter_groups(model, 0.01), lr=learning_rate, max_grad_norm=1.0)
        self.inputs = {
            "input_ids": batch.input_ids,
            "token_type_ids": batch.token_type_ids,
            "position_ids": batch.position_ids,
            "cu_seqlens": batch.cu_seqlens,
        }
        self.loss: Any = None

    def forward(self) -> None:
        self.loss = self.model(**self.inputs, labels=self.batch.labels).loss

    def backward(self) -> None:
        self.loss.backward()

    def optimise(self) -> None:
        self.optimiser.step()
        self.optimiser.zero_grad()

    def infer(self) -> None:
        self.model.eval()
        with no_grad():
            self.model.bert(**self.inputs).last_hidden_state  # noqa: B018  computed when asked for
        self.model.train()

    def step(self) -> None:
        self.forward()
        self.run.losses.append(self.loss.item())
        self.backward()
        self.optimise()

    def stages(self, make_batch: MakeBatch) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield from zip(STAGES, (make_batch, self.forward, self.backward, self.optimise, self.infer), strict=True)


def _timed(run: Run, trainer: _Trainer, make_batch: MakeBatch) -> None:
    """One step with the clock in the door and at every stage."""
    synchronize = run.backend.synchronize
    spent: dict[Op, float] = dict.fromkeys(run.ops, 0.0)

    def clock(op: Op, arrays: tuple[Array, ...], params: Mapping[str, Any], call: Callable[[], Any]) -> Any:
        synchronize()
        began = time.perf_counter()
        result = call()
        synchronize()
        spent[op] += time.perf_counter() - began
        return result

    for stage, work in trainer.stages(make_batch):
        with ExitStack() as stack:
            if stage in ("forward", "backward", "optimiser"):
                stack.enter_context(run.backend.watched_by(clock))
            began = time.perf_counter()
            work()
            synchronize()
            run.times[stage].append(time.perf_counter() - began)
        if stage == "forward":
            run.losses.append(trainer.loss.item())
    for op, seconds in spent.items():
        run.ops[op].seconds.append(seconds)


def _measure_memory(run: Run, trainer: _Trainer, make_batch: MakeBatch) -> None:
    for stage, work in trainer.stages(make_batch):
        with run.backend.peak_memory() as peak:
            work()
            run.peaks[stage] = peak()


def _signature(op: Op, arrays: tuple[Array, ...], params: Mapping[str, Any]) -> Signature:
    fixed = sorted((k, str(v)) for k, v in params.items() if k not in ("stream", "step"))
    return (op, *((a.shape, str(a.dtype)) for a in arrays), *fixed)


def _counter(run: Run) -> Any:
    """A watcher that counts the calls of one step and their cost."""
    costs: dict[Signature, Cost] = {}

    def count(op: Op, arrays: tuple[Array, ...], params: Mapping[str, Any], call: Callable[[], Any]) -> Any:
        signature = _signature(op, arrays, params)
        if signature not in costs:
            costs[signature] = cost(op, *map(run.backend.numpy, arrays), **params)
        record = run.record(op)
        record.calls += 1
        record.cost = Cost(record.cost.flops + costs[signature].flops, record.cost.bytes + costs[signature].bytes)
        return call()

    return count


def _judging(runs: list[Run]) -> Any:
    """A watcher for the reference: it gives the inputs of an op to every backend and judges the results."""
    judged: dict[Signature, int] = {}

    def look(op: Op, arrays: tuple[Array, ...], params: Mapping[str, Any], call: Callable[[], Any]) -> Any:
        signature = _signature(op, arrays, params)
        judged[signature] = judged.get(signature, 0) + 1
        if judged[signature] <= JUDGED_PER_SIGNATURE:
            inputs = tuple(np.array(runs[0].backend.numpy(a)) for a in arrays)
            for run in runs:
                run.record(op).judgements += _judge_on(run.backend, op, inputs, params)
        return call()

    return look


def _judge_on(backend: Backend, op: Op, inputs: tuple[np.ndarray, ...], params: Mapping[str, Any]) -> list[Judgement]:
    """Judge one call on one backend, on copies; an op that writes in place is flat, and judged piece by piece."""
    with backend.unwatched():  # judging the reference must not judge itself
        given = tuple(backend.asarray(np.array(a)) for a in inputs)
        try:
            got = tuple(np.array(backend.numpy(r)) for r in outputs(backend.run(op, *given, **params)))
        except Exception as error:  # whatever a kernel under trial does is part of the verdict
            raised = str(error) if isinstance(error, UserError) else f"raised {type(error).__name__}: {error}"
            return [Judgement(np.inf, np.inf, np.inf, False, None, raised, 0)]
    dtype = str(next(a.dtype for a in inputs if holds_floats(a)))
    if not op.writes:
        return [judge(op, inputs, params, got, dtype, backend.product_mode)]
    size = max(a.size for a in inputs)
    pieces = [slice(start, start + JUDGED_PIECE) for start in range(0, size, JUDGED_PIECE)]
    return [
        judge(op, [a[p] if a.size == size and a.ndim else a for a in inputs], params, tuple(r[p] for r in got), dtype)
        for p in pieces
    ]


def facts(found: Comparison, config: Mapping[str, Any], machine: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison as plain data, as `--json` writes it. Times are milliseconds, medians over the timed steps.

    What is not finite, or was not measured, is None.
    """
    ops = [
        {
            "op": r.op.name,
            "backend": run.backend.name,
            "by": run.backend.by(r.op),
            "calls": r.calls,
            "judged": len(r.judgements),
            "ms": r.median_seconds * 1e3 if found.timed else None,
            "share": r.median_seconds / run.step_seconds if found.timed else None,
            "gflops": rate(r.cost.flops, r.median_seconds) if found.timed else None,
            "gbps": rate(r.cost.bytes, r.median_seconds) if found.timed else None,
            **{name: _finite(r.worst(name)) for name in ("ulp_max", "err_over_us", "bound_share")},
            "ok": not r.failures,
        }
        for run in found.runs
        for r in run.ops.values()
    ]
    timed = found.runs if found.timed else []
    stages = [
        {
            "stage": name,
            "backend": run.backend.name,
            "ms_per_sample": stage.seconds * 1e3 / found.samples,
            "ms_per_token": stage.seconds * 1e3 / len(found.batch.input_ids),
            "peak_bytes": stage.peak_bytes,
        }
        for run in timed
        for name, stage in run.stages.items()
    ]
    apart = {
        run.backend.name: {"loss": found.loss_distance(run), "weights": found.weight_distance(run)} for run in timed
    }
    return {
        "machine": dict(machine),
        "config": dict(config),
        "backends": [{"name": run.backend.name, "what": run.backend.describe()} for run in found.runs],
        "ops": ops,
        "stages": stages,
        "loss": {run.backend.name: [_finite(loss) for loss in run.losses] for run in found.runs},
        "distance": {name: {k: _finite(v) for k, v in both.items()} for name, both in apart.items()},
        "ok": found.ok,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def rate(amount: float, seconds: float) -> float:
    """Billions a second; 0 where nothing was done or no time was seen to pass."""
    return amount / seconds / 1e9 if seconds > 0 else 0.0
