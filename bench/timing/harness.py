"""How a benchmark takes turns, keeps compiling apart and tells what it ran on, for `bench.step` and `bench.infer`.

Contestants run A B A B, so that a machine that slows down slows all of them; figures are medians over the rounds.
`python -m bench.timing.harness MODULE:FUNCTION JSON` is the child that measures memory.
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

import minibert
from minibert import backends
from minibert.backends import Backend
from minibert.cli import MISTAKES, UsageMistake, in_one_line
from minibert.cli.options import chosen_backends, machine
from minibert.errors import UserError
from minibert.kernels.op import Array, Op
from minibert.lab.measure import quiet
from minibert.model.config import NAMED, BertConfig

if TYPE_CHECKING:
    from rich.console import Console

    from minibert.lab.measure.peaks import Peaks

WARM_UP = 2  # calls after the first
FEWEST_ROUNDS = 3
IDLE_STEPS = 50
SETTLE = 0.02  # seconds between turns: idle threads of the one before may spin for some milliseconds
CHILD_SECONDS = 900.0
LIBRARIES = ("numpy", "numba", "torch", "transformers", "peft", "onnxruntime")


@dataclass
class Contestant:
    """One side of a comparison: a call, how many steps it makes, and what it took."""

    name: str
    call: Callable[[], Any]
    flops: int  # of one step: of the work that this side does
    steps: int = 1  # in a call
    shortest: float = 0.0  # seconds that a turn lasts: a quick call is repeated in it
    repeats: int = 1
    first_s: float = 0.0  # the first call, which may compile
    compile_s: float | None = None  # the part of it that Numba compiled in; None where nobody counts it
    seconds: list[float] = field(default_factory=list)  # of one step, in each round

    def warm_up(self) -> None:
        compiled, began = numba_compile_seconds(), time.perf_counter()
        self.call()
        self.first_s = time.perf_counter() - began
        if not self.name.startswith(("torch", "onnx")):
            self.compile_s = numba_compile_seconds() - compiled
        for _ in range(WARM_UP):
            began = time.perf_counter()
            self.call()
        self.repeats = max(1, math.ceil(self.shortest / (time.perf_counter() - began)))

    def measure(self) -> None:
        if self.repeats > 1:
            self.call()  # a quick call finds the caches full of what the others left there
        began = time.perf_counter()
        for _ in range(self.repeats):
            self.call()
        self.seconds.append((time.perf_counter() - began) / (self.steps * self.repeats))

    def figures(self) -> dict[str, Any]:
        return {**quiet.spread(self.seconds)._asdict(), "all": self.seconds}


def interleaved(
    contestants: Sequence[Contestant], rounds: int, progress: Callable[[str], None],
    between: Callable[[], Any] = gc.collect, settle: float = SETTLE, most_seconds: float = math.inf,
) -> None:  # fmt: skip
    """Warm every contestant up, then time them in turn, round by round; nothing is collected while one runs.

    `between` is called after each round; after FEWEST_ROUNDS of them no other begins beyond `most_seconds`.
    """
    for one in contestants:
        progress(f"{one.name}: warm-up")
        one.warm_up()
    gc.collect()
    enabled, began = gc.isenabled(), time.perf_counter()
    gc.disable()
    try:
        for number in range(rounds):
            if number >= FEWEST_ROUNDS and time.perf_counter() - began > most_seconds:
                break
            for one in contestants:
                progress(f"{one.name}: round {number + 1} of {rounds}")
                time.sleep(settle)
                one.measure()
            between()
    finally:
        if enabled:
            gc.enable()


def compared(contestants: Sequence[Contestant], ours: Sequence[str]) -> dict[str, Any]:
    """Seconds of all, and how many times as fast as each other's each of ours is (`lab.measure.quiet.ratio`)."""
    seconds = {one.name: one.figures() for one in contestants}
    ratio: dict[str, dict[str, float | None]] = {name: {} for name in ours}
    noise: dict[str, dict[str, list[float] | None]] = {name: {} for name in ours}
    for name in ours:
        for one in contestants:
            if one.name not in ours:
                found = quiet.ratio(one.seconds, seconds[name]["all"])
                ratio[name][one.name] = found and found.median
                noise[name][one.name] = found and [found.p20, found.p80]
    return {
        "ratio": ratio, "ratio_p20_p80": noise, "seconds": seconds,
        "first_call_s": {one.name: one.first_s for one in contestants},
        "compile_s": {one.name: one.compile_s for one in contestants},
        "flops": {one.name: one.flops for one in contestants},
    }  # fmt: skip


def shares(facts: dict[str, Any], peaks: Peaks) -> None:
    """Add each side's share of the peak; above it the figure is wrong, and no ratio is made of it.

    The peak is that of multiply-adds of float32 in registers: of sides that compute in fewer bits there is no share.
    Beside it stands the share of NumPy's best product.
    """
    facts["share_of_peak"], facts["share_of_product"], facts["impossible"] = {}, {}, []
    for name, taken in facts.get("seconds", {}).items():
        if name in facts.get("fewer_bits", ()):
            continue
        rate = facts["flops"][name] / taken["median"] * 1e-9
        share = rate / peaks.limit_gflops
        facts["share_of_peak"][name], facts["share_of_product"][name] = share, rate / peaks.gflops
        if share > 1:
            facts["impossible"].append(name)
    for name, others in facts.get("ratio", {}).items():
        for other in others:
            if {name, other} & set(facts["impossible"]):
                others[other] = None
                facts["ratio_p20_p80"][name][other] = None


def apart(found: Mapping[str, Sequence[float]], most: float, more: Mapping[str, float] | None = None) -> str:
    """Why the sides do not do the same work, by figures that should agree (relative); empty where they do.

    `more` is allowed to the sides that it names.
    """
    reference, *_ = found
    for name, values in found.items():
        for a, b in zip(found[reference], values, strict=True):
            if not abs(a - b) <= (more or {}).get(name, most) * abs(a):
                return f"{name} gives {b:.7g} where {reference} gives {a:.7g}: they do not do the same work"
    return ""


def overhead(backend: Backend, call: Callable[[], Any], on_nothing: Callable[[], Any]) -> dict[str, Any]:
    """Op calls in one step, and what the step costs beside its work: tape, door, wrappers, handing rows to threads.

    `on_nothing` is the same step at the smallest sizes, so that nothing else is left of it; even its few rows are
    divided among threads, as those of `call` are.
    """
    count = 0

    def counted(op: Op, arrays: tuple[Array, ...], params: Mapping[str, Any], call: Callable[[], Any]) -> Any:
        nonlocal count
        count += 1
        return call()

    with backend.watched_by(counted):
        call()
    times = []
    with backend.finely_split():
        for _ in range(WARM_UP + IDLE_STEPS):
            began = time.perf_counter()
            on_nothing()
            times.append(time.perf_counter() - began)
    return {"ops": count, "seconds": median(times[WARM_UP:])}


def numba_compile_seconds() -> float:
    """Seconds that this process has spent compiling Numba kernels."""
    cpu_threads = sys.modules.get("minibert.kernels.cpu.jit")  # without a Numba backend it was never imported
    return 0.0 if cpu_threads is None else float(cpu_threads.compile_seconds())


# --------------------------------------------------------------------------------------------------------- what runs


def named_config(name: str, length: int) -> BertConfig:
    """Raises UserError for a name that is not known and for a length that the model has no positions for."""
    if name not in NAMED:
        raise UserError(f"--config: expected {', '.join(NAMED)}, got {name!r}")
    config = NAMED[name]
    if length > config.max_position_embeddings:
        raise UserError(f"--length {length}: the model has {config.max_position_embeddings} positions; give no more")
    return config


def among(option: str, given: str, known: Sequence[str]) -> list[str]:
    """The names in `a,b`, each once. Raises UserError for any that is not known."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    wrong = [name for name in names if name not in known]
    if wrong or len(set(names)) != len(names):
        raise UserError(f"{option}: expected {', '.join(known)}, each once at most, got {given!r}")
    return names


def cpu_backends(names: str, threads: int) -> list[Backend]:
    """Backends of the CPU, on so many threads. Raises UserError for one whose arrays live elsewhere or that plays."""
    places = chosen_backends(names, threads)
    for place in places:
        if place.emulated or not isinstance(place.asarray(np.zeros(1)), np.ndarray):
            raise UserError(
                f"--backend: {place.name} is no backend of the CPU, which this measures; for a GPU: make gpu-check"
            )
    return places


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fingerprint(places: Sequence[Backend], threads: int) -> dict[str, Any]:
    """Machine, versions, threads: what a figure belongs to."""
    about = machine()
    about["load"] = quiet.load_average()
    return {
        "machine": about, "versions": {"minibert": minibert.__version__, **versions_of(LIBRARIES)}, "threads": threads,
        "backends": {place.name: place.describe() for place in places},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def versions_of(libraries: Sequence[str]) -> dict[str, str | None]:
    """Of each that is installed; None of others."""
    found: dict[str, str | None] = {}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = None
    return found


def between_peaks(
    names: Sequence[str], run: Callable[[str, Callable[[str], None]], dict[str, Any]], notes: Console
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Run each measure between two measurements of the machine's peaks, and add the shares of the better ones."""
    from minibert.lab.measure import peaks as machine_peaks  # it compiles kernels

    with notes.status("measuring the peaks") as status:
        peaks = machine_peaks.measure_peaks()
        found = {}
        for name in names:
            found[name] = run(name, lambda text, name=name: status.update(f"{name}: {text}"))  # type: ignore[misc]
        status.update("measuring the peaks")
        peaks = machine_peaks.better(peaks, machine_peaks.measure_peaks())
    for facts in found.values():
        shares(facts, peaks)
    return found, peaks._asdict()


# ------------------------------------------------------------------------------------------------------------ memory


def add_memory(
    facts: dict[str, Any], worker: str, spec: Mapping[str, Any], progress: Callable[[str], None] | None
) -> None:
    """Each side's peak, by `peak_bytes`: weights, what training keeps beside them, and all that a step needs."""
    facts["peak_bytes"], facts["peak_bytes_note"] = {}, {}
    for who in facts.get("seconds", {}):
        found: tuple[int | None, str] = (None, "not measured: not asked for")
        if who == "onnxruntime":
            found = None, "not measured: its process holds the exporter as well"
        elif progress is not None:
            progress(f"{who}: memory, in a process of its own")
            found = peak_bytes(worker, {**spec, "side": who})
        facts["peak_bytes"][who], facts["peak_bytes_note"][who] = found


def peak_bytes(worker: str, spec: Mapping[str, Any]) -> tuple[int | None, str]:
    """Growth of a process of its own from before it made its model to its highest, or None and why not.

    `worker` is MODULE:FUNCTION; called with `spec`, it makes what runs and gives a step to call.
    """
    if not Path("/proc/self/status").is_file():
        return None, "not measured: this system does not say how much memory a process holds"
    folder = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "bench.timing.harness", worker, json.dumps(spec)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=CHILD_SECONDS
        )
    except subprocess.TimeoutExpired:
        return None, f"not measured: it took longer than {CHILD_SECONDS:.0f} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        return None, f"not measured: {last[:200]}"
    grown = json.loads(done.stdout.strip().splitlines()[-1])
    return (grown, "") if grown else (None, "not measured: too small to be seen beside the libraries")


def resident(key: str) -> int:
    """Bytes of this process now (VmRSS) or at the most (VmHWM), as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def memory_child(worker: str, spec: dict[str, Any]) -> int:
    """Two steps; bytes above what the libraries took, loaded and warmed up on a small model."""
    module, _, function = worker.partition(":")
    make = getattr(import_module(module), function)
    backends.set_num_threads(spec["threads"])
    small = {"vocab_size": 8192, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    make({**spec, "config": {**spec["config"], **small, "intermediate_size": 64}})()
    gc.collect()
    before = resident("VmRSS")
    step = make(spec)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten: making it is no part of a step
    for _ in range(2):
        step()
    return max(0, resident("VmHWM") - before)


def run_main(command: Callable[..., int]) -> None:
    """A user's mistake is one line on stderr and exit code 2."""
    import typer

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        status = app(standalone_mode=False)
    except MISTAKES as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except UsageMistake as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    print(json.dumps(memory_child(sys.argv[1], json.loads(sys.argv[2]))))
