"""What each means to be fast is worth: `python -m bench.ablation --config minilm [--json FILE]`.

A training step on real text is timed as it is, and again with one thing taken away at a time: the kernels of one
family (the formula runs in their place: NumPy, and its BLAS on all threads), the head on predicted rows alone, packing;
and, in processes of their own, settings of the process (threads, vectors, memory). All take turns. The figure is how
many times as long the step takes without it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from bench.step import OurTraining
from bench.timing import harness
from bench.timing.batches import Batch, random_weights, text_batches
from bench.timing.harness import Contestant
from minibert import backends
from minibert.cli import legend
from minibert.cli.options import console, notes, plain_table, refuse_unwritable
from minibert.data.batching import PackedBatch
from minibert.errors import UserError
from minibert.kernels import OPS, Op
from minibert.kernels.cpu.vectors import VECTOR_BYTES
from minibert.lab.measure import quiet
from minibert.model.config import BertConfig
from minibert.model.packing import IGNORE

AS_IT_IS = "as it is"
WARM_UP, STEPS = 2, 5  # of a process of its own
CHILD_SECONDS = 600.0
# What a process is told instead, by the environment or by a function of this module.
SETTINGS: dict[str, tuple[dict[str, str], str]] = {
    "memory that is kept for the next step": ({}, "give_memory_back"),
    "more than one thread": ({"MINIBERT_NUM_THREADS": "1"}, ""),
}
if VECTOR_BYTES == 64:
    SETTINGS["vectors of 512 bits"] = ({"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma"}, "")


def give_memory_back() -> None:
    """As glibc does unless it is told otherwise."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)  # glibc's alone
    for option, value in ((-4, 65536), (-3, 128 * 1024), (-1, 128 * 1024)):  # M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_...
        mallopt(option, value)


class Step:
    """One training step on real text, on numba."""

    def __init__(self, config: BertConfig, batch: int, length: int, seed: int) -> None:
        self.config = config
        self.side = OurTraining(config, random_weights(config, seed), backends.get("numba"))
        (self.batch,) = text_batches(config, batch, length, 1, seed, "filled")
        self.packed = self.side.prepare(self.batch)

    def __call__(self) -> None:
        self.side.step(self.packed)

    def families(self) -> dict[str, list[Op]]:
        """The ops with kernels that a step calls, by family."""
        called: set[Op] = set()

        def note(op: Op, arrays: Any, params: Any, call: Callable[[], Any]) -> Any:
            called.add(op)
            return call()

        with self.side.backend.watched_by(note):
            self()
        found: dict[str, list[Op]] = {}
        for op in OPS.values():
            if op in called and self.side.backend.by(op) == "kernel":
                found.setdefault(op.family.rpartition(".")[2], []).append(op)
        return found

    def without(self, ops: Sequence[Op]) -> Callable[[], None]:
        return lambda: self._within(self.side.backend.using(dict.fromkeys(ops)))

    def _within(self, block: AbstractContextManager[Any]) -> None:
        with block:
            self()

    def on(self, batch: Batch) -> Callable[[], None]:
        prepared = self.side.prepare(batch)

        def call() -> None:
            self.side.step(prepared)

        return call

    def padded(self) -> Batch:
        """Every sequence as long as the longest: padding is computed as tokens are."""
        ids = self.batch.padded["input_ids"]
        count, longest = ids.shape
        labels = np.where(self.batch.real, self.batch.padded["labels"], IGNORE)
        positions = np.tile(np.arange(longest, dtype=np.int32), count)
        ends = np.arange(count + 1, dtype=np.int32) * longest
        flat = ids.reshape(-1).astype(np.int32)
        return Batch(self.config, PackedBatch(flat, positions, np.zeros_like(flat), ends, labels.reshape(-1)))

    def predicting_all(self) -> Batch:
        """A loss on every position."""
        flat = self.batch.packed
        positions = np.concatenate([np.arange(n, dtype=np.int32) for n in self.batch.lengths])
        ids = np.asarray(flat.input_ids, np.int32)
        return Batch(
            self.config, PackedBatch(ids, positions, np.zeros_like(ids), flat.cu_seqlens, ids.astype(np.int64))
        )


def contestants(step: Step) -> Iterator[Contestant]:
    """The step as it is, and with one thing taken away."""
    yield Contestant(AS_IT_IS, step, 0)
    yield Contestant("the head on predicted rows alone", step.on(step.predicting_all()), 0)
    if step.batch.lengths.min() < step.batch.lengths.max():
        yield Contestant("packing", step.on(step.padded()), 0)
    for family, ops in step.families().items():
        yield Contestant(f"kernels of {family}: {', '.join(op.name for op in ops)}", step.without(ops), 0)


# ------------------------------------------------------------------------------------------- processes of their own


def in_a_process(setting: str, spec: Mapping[str, Any]) -> float:
    """Seconds of a step in a process that has this setting; raises UserError with what it said where it fails."""
    environment, call = SETTINGS.get(setting, ({}, ""))
    command = [sys.executable, "-m", "bench.ablation", "--child", json.dumps({**spec, "call": call})]
    folder = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=CHILD_SECONDS,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{setting}: {(done.stderr.strip().splitlines() or ['it ended without a word'])[-1]}")
    return float(done.stdout.strip().splitlines()[-1])


def child(spec: Mapping[str, Any]) -> float:
    step = Step(BertConfig.from_dict(spec["config"]), spec["batch"], spec["length"], spec["seed"])
    if spec["call"]:
        globals()[spec["call"]]()
    times = []
    gc.disable()
    for _ in range(WARM_UP + STEPS):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return median(times[WARM_UP:])


# -------------------------------------------------------------------------------------------------------- the command


def bench(
    config: Annotated[str, typer.Option(help="tiny, mini, minilm, small, medium or base.")] = "minilm",
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 8,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a sequence at the most.")] = 128,
    rounds: Annotated[int, typer.Option(min=3)] = 5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the facts to this file.")] = None,
    spec: Annotated[str | None, typer.Option("--child", hidden=True)] = None,
) -> int:
    """Time a training step with one thing taken away at a time."""
    if spec is not None:
        print(child(json.loads(spec)))
        return 0
    refuse_unwritable(json=json_file)
    shape = harness.named_config(config, length)
    backend = backends.get("numba")
    about = harness.fingerprint([backend], backend.num_threads())
    given = {"batch": batch, "length": length, "seed": seed}
    with notes.status("making the model") as status:
        step = Step(shape, batch, length, seed)
        here = list(contestants(step))
        harness.interleaved(here, rounds, status.update)
        rows = [_row(one.name, one.seconds, here[0].seconds) for one in here]
        del step, here
        gc.collect()
        away = [name for name, (told, _) in SETTINGS.items() if any(os.environ.get(k) == v for k, v in told.items())]
        seconds: dict[str, list[float]] = {name: [] for name in (AS_IT_IS, *SETTINGS) if name not in away}
        for number in range(rounds):
            for name, taken in seconds.items():
                status.update(f"{name}: process {number + 1} of {rounds}")
                taken.append(in_a_process(name, {"config": shape.to_dict(), **given}))
        rows += [_row(name, taken, seconds[AS_IT_IS], " (a process of its own)") for name, taken in seconds.items()]
    if json_file is not None:
        settings = {"config": config, **given, "already away": away}
        document = {"bench": "ablation", **about, "settings": settings, "rows": rows}
        json_file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    show(rows, config, given)
    for name in away:
        console.print(f"{name}: the environment has taken that away already", highlight=False)
    return 0


def _row(name: str, without: list[float], with_it: list[float], where: str = "") -> dict[str, Any]:
    times = quiet.ratio(without, with_it) or quiet.Spread(*[math.nan] * 3)
    return {
        "without": f"{name}{where}", "ms": median(without) * 1e3, "times": times.median, "p20": times.p20,
        "p80": times.p80,
    }  # fmt: skip


def show(rows: Sequence[Mapping[str, Any]], config: str, given: Mapping[str, Any]) -> None:
    """The table, what is worth most first."""
    first, *others = rows
    table = plain_table(title=f"{config}, {given['batch']} sequences of up to {given['length']} tokens of real text")
    for name in ("without", "ms", "times as long", "p20 to p80"):
        table.add_column(name, justify="left" if name == "without" else "right", overflow="fold")
    table.add_row(first["without"], f"{first['ms']:.1f}", "", "", end_section=True)
    for row in sorted(others, key=lambda r: -r["times"]):
        table.add_row(
            row["without"], f"{row['ms']:.1f}", f"{row['times']:.2f}", f"{row['p20']:.2f} to {row['p80']:.2f}"
        )
    legend.show(table, {"times as long": "the median of the rounds' ratios"})


if __name__ == "__main__":
    harness.run_main(bench)
