"""One training step of a BERT on every backend, compared op by op: how far apart, and how fast each.

Every backend gets the same weights, the same batch and the same random masks. Whoever stands in the door of
`Backend.run` sees every op: one watcher keeps the time, another, on the reference backend, hands each op's inputs to
every backend and judges what comes out (`lockstep.assess`), so that the error of an op is its own and not inherited.

What only a report shows is measured when `Extras` are asked for: the machine's peaks, memory over time, energy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from minibert.backends.base import Backend, Kernel
from minibert.data.batching import PackedBatch
from minibert.errors import UserError
from minibert.kernels.op import Array, Op, outputs
from minibert.lab.compare.records import STAGES, TRAINING, Comparison, Extras, Moment, OpRecord, Run
from minibert.lab.conform.judge import Judgement
from minibert.lab.lockstep.assess import Assessment, assess
from minibert.lab.measure.energy import Meter, Reading
from minibert.lab.measure.quiet import Load
from minibert.lab.measure.roofline import Work, work_of
from minibert.model.tensor import no_grad
from minibert.train.optim import AdamW, parameter_groups

JUDGED_PER_SIGNATURE = 2  # calls of one op on equal shapes that are judged: later layers repeat the first

MakeModel = Callable[[Backend], Any]
MakeBatch = Callable[[], PackedBatch]
Signature = tuple[Any, ...]


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
    batch, load = make_batch(), Load()
    found = Comparison(runs, batch, len(batch.cu_seqlens) - 1, extras=extras)
    with ExitStack() as stack:
        for run in runs[1:] or runs:
            stack.enter_context(run.backend.using(dict(kernels or {})))
        trainers = []
        for run in runs:
            progress(f"{run.backend.name}: making the model")
            trainers.append(_Trainer(run, make_model(run.backend), batch, learning_rate))
        try:
            _run_all(found, trainers, make_batch, steps, progress, load)
        except Exception as error:
            if not any(record.failures for run in runs for record in run.ops.values()):
                if isinstance(error, FloatingPointError):
                    raise UserError(f"{error}: are the weights finite?") from error
                raise
            # an op that was judged wrong has made training break down: that is the verdict
            return replace(found, timed=False)
    return found


def _run_all(
    found: Comparison, trainers: list[_Trainer], make_batch: MakeBatch, steps: int, progress: Callable[[str], None],
    load: Load,
) -> None:  # fmt: skip
    runs, extras = found.runs, found.extras
    for run, trainer in zip(runs, trainers, strict=True):
        progress(f"{run.backend.name}: step 1 of {steps}" + (", judging every op" if run is runs[0] else ""))
        with ExitStack() as stack:
            stack.enter_context(run.backend.watched_by(_counter(run)))
            if run is runs[0]:
                stack.enter_context(run.backend.watched_by(_judging(runs)))
            trainer.step()
        trainer.infer()
    _measure_peaks(runs, extras, progress)
    for number in range(2, steps + 1):
        for run, trainer in zip(runs, trainers, strict=True):  # in turn, so that a slow minute slows all alike
            progress(f"{run.backend.name}: step {number} of {steps}")
            _timed(run, trainer, make_batch, extras.meter if extras else None)
    threads = max(run.backend.num_threads() for run in runs)
    taken = {run.backend.name: run.seconds() for run in runs if not run.backend.emulated}
    found.disturbance = load.disturbance(threads, taken)
    _measure_peaks(runs, extras, progress)
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
        self.loss: Any = None

    def forward(self) -> None:
        self.loss = self.batch.loss(self.model)

    def backward(self) -> None:
        self.loss.backward()

    def optimise(self) -> None:
        self.optimiser.step()
        self.optimiser.zero_grad()

    def infer(self) -> None:
        self.model.eval()
        with no_grad():
            self.batch.infer(self.model)
        self.model.train()

    def step(self) -> None:
        self.forward()
        self.backward()
        self.run.losses.append(self.loss.item())
        self.optimise()

    def stages(self, make_batch: MakeBatch) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield from zip(STAGES, (make_batch, self.forward, self.backward, self.optimise, self.infer), strict=True)


def _measure_peaks(runs: list[Run], extras: Extras | None, progress: Callable[[str], None]) -> None:
    """What the CPU can do, where a backend runs on it, and what a call costs on each backend.

    Before and after the steps that are timed, the better of both: other work on the machine can only lower them.
    """
    if extras is None:
        return
    from minibert.lab.measure.peaks import better, launch_seconds, measure_peaks  # it compiles kernels

    progress("the machine's peaks")
    with extras.taking("peaks"):
        if any(run.on_cpu for run in runs):
            measured = measure_peaks(extras.dtype)
            extras.peaks = measured if extras.peaks is None else better(extras.peaks, measured)
        for run in runs:
            if not run.backend.emulated:
                run.launch_seconds = min(launch_seconds(run.backend), run.launch_seconds or math.inf)


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
    """A watcher that counts the calls of one step and their work."""
    known: dict[Signature, Work] = {}

    def count(op: Op, arrays: tuple[Array, ...], params: Mapping[str, Any], call: Callable[[], Any]) -> Any:
        signature, result = _signature(op, arrays, params), call()
        if signature not in known:
            given, made = ([run.backend.numpy(a) for a in these] for these in (arrays, outputs(result)))
            known[signature] = work_of(op, given, params, made)
        run.record(op).works[known[signature]] += 1
        return result

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
