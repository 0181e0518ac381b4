"""One training step of a BERT on every backend, compared op by op: how far apart, and how fast each.

Every backend gets the same weights, the same batch and the same random masks. Whoever stands in the door of
`Backend.run` sees every op: one watcher keeps the time, another, on the reference backend, hands each op's inputs to
every backend and judges what comes out (`lockstep.assess`), so that the error of an op is its own and not inherited.

What only a report shows is measured when `Extras` are asked for: the machine's peaks, memory over time, energy.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minibert.backends.base import Backend, Kernel
from minibert.data.batching import PackedBatch
from minibert.errors import UserError
from minibert.kernels.op import Array, Op, outputs
from minibert.kernels.readings import Cost, cost
from minibert.lab.conform.judge import Judgement
from minibert.lab.lockstep.assess import Assessment, assess
from minibert.lab.measure.energy import Meter, Reading
from minibert.model.tensor import no_grad
from minibert.train.optim import AdamW, parameter_groups

if TYPE_CHECKING:
    from minibert.lab.measure.peaks import Peaks

JUDGED_PER_SIGNATURE = 2  # calls of one op on equal shapes that are judged: later layers repeat the first
STAGES = ("preprocess", "forward", "backward", "optimiser", "inference")
TRAINING = ("forward", "backward", "optimiser")

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
    ulps: Counter[str] = field(default_factory=Counter)  # elements of the judged calls by error (`assess`)

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
    extras: Extras | None = None,
) -> Comparison:
    """Run `steps` training steps of one batch on every backend in turn; the first backend is the reference.

    `kernels` replace those of every backend but the reference (of the only one, where there is one). The first step
    judges every op and compiles what is not compiled yet; it is not timed. After the last, ops are judged once more, on
    inputs that none of them has seen. With `extras` it also measures what they say.
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
            _run_all(runs, trainers, make_batch, steps, progress, extras)
        except Exception as error:
            if not any(record.failures for run in runs for record in run.ops.values()):
                if isinstance(error, FloatingPointError):
                    raise UserError(f"{error}: are the weights finite?") from error
                raise
            # an op that was judged wrong has made training break down: that is the verdict
            return Comparison(runs, batch, len(batch.cu_seqlens) - 1, timed=False, extras=extras)
    return Comparison(runs, batch, len(batch.cu_seqlens) - 1, extras=extras)


def _run_all(
    runs: list[Run], trainers: list[_Trainer], make_batch: MakeBatch, steps: int, progress: Callable[[str], None],
    extras: Extras | None,
) -> None:  # fmt: skip
    for run, trainer in zip(runs, trainers, strict=True):
        progress(f"{run.backend.name}: step 1 of {steps}" + (", judging every op" if run is runs[0] else ""))
        with ExitStack() as stack:
            stack.enter_context(run.backend.watched_by(_counter(run)))
            if run is runs[0]:
                stack.enter_context(run.backend.watched_by(_judging(runs)))
            trainer.step()
        trainer.infer()
    if extras is not None:
        progress("the machine's peaks")
        with extras.taking("peaks"):
            _measure_peaks(runs, extras)
    for number in range(2, steps + 1):
        for run, trainer in zip(runs, trainers, strict=True):  # in turn, so that a slow minute slows all alike
            progress(f"{run.backend.name}: step {number} of {steps}")
            _timed(run, trainer, make_batch, extras.meter if extras else None)
    for run, trainer in zip(runs, trainers, strict=True):
        progress(f"{run.backend.name}: memory")
        run.weights = trainer.model.state_dict()
        _measure_memory(run, trainer, make_batch)
    progress("judging every op once more")
    with runs[0].backend.watched_by(_judging(runs)):
        trainers[0].forward()
        trainers[0].backward()
        trainers[0].optimise()
    if extras is not None:  # last, so that what is judged does not depend on it
        progress("memory over time")
        with extras.taking("memory over time"):
            for run, trainer in zip(runs, trainers, strict=True):
                _follow_memory(run, trainer)


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
        self.loss = self.model(**self.inputs, labels=self.batch.labels, return_dict=True).loss

    def backward(self) -> None:
        self.loss.backward()

    def optimise(self) -> None:
        self.optimiser.step()
        self.optimiser.zero_grad()

    def infer(self) -> None:
        self.model.eval()
        with no_grad():
            self.model.bert(**self.inputs, return_dict=True).last_hidden_state  # noqa: B018  computed when asked for
        self.model.train()

    def step(self) -> None:
        self.forward()
        self.backward()
        self.run.losses.append(self.loss.item())
        self.optimise()

    def stages(self, make_batch: MakeBatch) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield from zip(STAGES, (make_batch, self.forward, self.backward, self.optimise, self.infer), strict=True)


def _measure_peaks(runs: list[Run], extras: Extras) -> None:
    """What the CPU can do, where a backend runs on it, and what a call costs on each backend."""
    from minibert.lab.measure.peaks import launch_seconds, measure_peaks  # it compiles kernels

    if any(run.on_cpu for run in runs):
        extras.peaks = measure_peaks(extras.dtype)
    for run in runs:
        if not run.backend.emulated:
            run.launch_seconds = launch_seconds(run.backend)


def _timed(run: Run, trainer: _Trainer, make_batch: MakeBatch, meter: Meter | None) -> None:
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

    readings: dict[str, tuple[Reading, Reading]] = {}
    for stage, work in trainer.stages(make_batch):
        with ExitStack() as stack:
            if stage in TRAINING:
                stack.enter_context(run.backend.watched_by(clock))
            before = meter.read() if meter else Reading()
            began = time.perf_counter()
            work()
            synchronize()
            run.times[stage].append(time.perf_counter() - began)
            readings[stage] = before, meter.read() if meter else before
        if stage == "backward":
            run.losses.append(trainer.loss.item())
    readings["step"] = readings[TRAINING[0]][0], readings[TRAINING[-1]][1]
    if meter and not run.backend.emulated:
        for name, (before, after) in readings.items():
            run.joules.setdefault(name, []).append(meter.joules(before, after, run.on_cpu))
    for op, seconds in spent.items():
        run.ops[op].seconds.append(seconds)


def _measure_memory(run: Run, trainer: _Trainer, make_batch: MakeBatch) -> None:
    for stage, work in trainer.stages(make_batch):
        with run.backend.peak_memory() as peak:
            work()
            run.peaks[stage] = peak()


def _follow_memory(run: Run, trainer: _Trainer) -> None:
    """One training step; the memory that is live at the end of each call of an op."""
    with run.backend.live_memory() as live_bytes:
        began = time.perf_counter()
        for stage, work in zip(TRAINING, (trainer.forward, trainer.backward, trainer.optimise), strict=True):

            def look(op: Op, arrays: Any, params: Any, call: Callable[[], Any], stage: str = stage) -> Any:
                result = call()
                run.memory.append(Moment(time.perf_counter() - began, live_bytes(), stage, op.name))
                return result

            with run.backend.watched_by(look):
                work()


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
            _judge(runs, op, inputs, params)
        return call()

    return look


def _judge(runs: list[Run], op: Op, inputs: tuple[np.ndarray, ...], params: Mapping[str, Any]) -> None:
    """Run one call on every backend, on copies, and judge what each gave."""
    by_products: dict[str, list[tuple[OpRecord, tuple[np.ndarray, ...]]]] = {}
    for run in runs:
        record = run.record(op)
        try:
            with run.backend.unwatched():  # judging the reference must not judge itself
                given = tuple(run.backend.asarray(np.array(a)) for a in inputs)
                got = tuple(np.array(run.backend.numpy(r)) for r in outputs(run.backend.run(op, *given, **params)))
        except Exception as error:  # whatever a kernel under trial does is part of the verdict
            raised = str(error) if isinstance(error, UserError) else f"raised {type(error).__name__}: {error}"
            record.judgements.append(Judgement(np.inf, np.inf, np.inf, False, None, raised, 0))
            continue
        by_products.setdefault(run.backend.product_mode, []).append((record, got))
    for products, same in by_products.items():  # their bound is the same, and computed once
        judged: list[Assessment] = assess(op, inputs, params, [got for _, got in same], products)
        for (record, _), assessment in zip(same, judged, strict=True):
            record.judgements.append(assessment.judgement)
            record.ulps.update(assessment.ulps)


def rate(amount: float, seconds: float) -> float:
    """Billions a second; 0 where nothing was done or no time was seen to pass."""
    return amount / seconds / 1e9 if seconds > 0 else 0.0
