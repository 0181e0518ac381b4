"""Every op at its BERT shape on every backend: `python -m bench.ops [OP ...] [--backends numpy,numba] [--json FILE]`.

Backends take turns within each round, so that a machine that slows down slows all of them; the figure is the median
over rounds. The first call (which may compile) is kept apart. GFLOP/s and GB/s divide the work that the formula cannot
avoid (`minibert.kernels.readings.cost`) by that time; shares are of peaks measured in the same run. After the timing
each op runs once more on fresh inputs and is judged by its hard bound; the exit code is 1 if one fails.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table

from minibert.backends import Backend, BackendUnavailable
from minibert.check import find_op
from minibert.cli import UsageMistake
from minibert.cli.options import chosen_backends, console, machine, plain_table, refuse_unwritable
from minibert.errors import UserError
from minibert.judge import expect, judge_against
from minibert.kernels import OPS, Op
from minibert.kernels.array_module import numpy_module
from minibert.kernels.op import BertSize, Sample, outputs
from minibert.kernels.readings import cost

if TYPE_CHECKING:
    from minibert.peaks import Peaks

SHORTEST = 0.5e-3  # seconds that one measurement lasts: quick ops are called several times in it
PER_OP = 2.0  # seconds for all rounds of an op on all backends, beyond the first three rounds
FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """One op on one backend."""

    op: str
    backend: str
    by: str  # kernel, library or formula
    ms: float  # median of the rounds
    ms_min: float
    rounds: int
    first_ms: float  # the first call in this process
    compile_s: float  # the part of it that went into compiling; 0 where the code came from disk
    ratio: float | None  # the reference's median over this one; None without the reference backend
    flops: int
    bytes: int
    memory: int  # bytes of all arrays: what a cache would have to hold
    gflops: float
    gbps: float
    bound_share: float  # after the timing, on fresh inputs
    ok: bool
    flops_share: float = 0.0  # of the measured peaks
    bytes_share: float = 0.0
    note: str = ""  # "view", "cache", "impossible" or empty

    def against(self, peaks: Peaks) -> Timing:
        """With its shares of the peaks. Above 1 is right where the data fit the cache, else the figure is wrong."""
        flops_share, bytes_share = self.gflops / peaks.gflops, self.gbps / peaks.gbps
        note = "cache" if bytes_share > 1 else self.note
        if flops_share > 1 or (bytes_share > 1 and self.memory > peaks.cache_bytes):
            note = "impossible"
        return replace(self, flops_share=flops_share, bytes_share=bytes_share, note=note)


class Runner:
    """One op on one backend, with its inputs there."""

    def __init__(self, op: Op, backend: Backend, arrays: list[np.ndarray], params: Mapping[str, Any]) -> None:
        self.op, self.backend, self.params = op, backend, params
        # On the CPU the same memory for all: where an array begins within a cache line makes tens of per cent.
        self.arrays = [backend.asarray(a) for a in arrays]
        compiled = compile_seconds()
        self.first = self.seconds(1)
        self.compile = compile_seconds() - compiled
        self.calls = max(1, min(1000, round(SHORTEST / self.seconds(1))))
        self.times: list[float] = []

    def seconds(self, calls: int) -> float:
        """Of one call, as the mean of so many."""
        began = time.perf_counter()
        for _ in range(calls):
            self.backend.run(self.op, *self.arrays, **self.params)
        self.backend.synchronize()
        return (time.perf_counter() - began) / calls

    def measure(self) -> None:
        self.times.append(self.seconds(self.calls))


def rounded(sample: Sample, dtype: str) -> list[np.ndarray]:
    """The arrays of a sample as a backend is given them: floats in `dtype`, copies of the rest."""
    arrays = map(np.asarray, sample.arrays)
    return [a.astype(dtype) if a.dtype.kind == "f" else a.copy() for a in arrays]


def compile_seconds() -> float:
    """Seconds that this process has spent compiling Numba kernels."""
    from minibert.kernels import cpu_threads

    return cpu_threads.compile_seconds()


def time_op(
    op: Op, places: list[Backend], arrays: list[np.ndarray], params: Mapping[str, Any], rounds: int
) -> list[Runner]:
    """Time `op` on every backend in turn, round by round."""
    runners = [Runner(op, place, arrays, params) for place in places]
    began = time.perf_counter()
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and time.perf_counter() - began > PER_OP:
            break
        for runner in runners:
            runner.measure()
    return runners


def verdicts(op: Op, places: list[Backend], size: BertSize, dtype: str, seed: int) -> list[tuple[float, bool, str]]:
    """On inputs that the timing has not seen: the largest share of the hard bound, whether it is kept, else why not."""
    sample = op.bench(np.random.default_rng(seed), size)
    expected = expect(op, rounded(sample, dtype), sample.params, dtype)
    found = []
    for place in places:
        arrays = [place.asarray(a) for a in rounded(sample, dtype)]
        results = tuple(place.numpy(r) for r in outputs(place.run(op, *arrays, **sample.params)))
        judgement = judge_against(expected, results)
        problem = "" if judgement.ok else f"{op.name} on {place.name}: {judgement.problem or judgement.worst}"
        found.append((judgement.bound_share, judgement.ok, problem))
    return found


def timings(op: Op, places: list[Backend], size: BertSize, dtype: str, rounds: int) -> tuple[list[Timing], list[str]]:
    """Time and judge one op; what went wrong, in words, beside it."""
    sample = op.bench(np.random.default_rng(0), size)
    arrays = rounded(sample, dtype)
    work = cost(op, *arrays, **sample.params)
    runners = time_op(op, places, arrays, sample.params, rounds)
    results = () if op.writes else outputs(op.formula(numpy_module, *arrays, **sample.params))
    memory = min(work.bytes, sum(a.nbytes for a in (*arrays, *results)))
    view = len(results) == 1 and any(np.may_share_memory(results[0], a) for a in arrays)
    if view:
        work = work._replace(bytes=0)  # nothing moves
    reference = next((median(r.times) for r in runners if r.backend.name == "numpy"), None)
    found, problems = [], []
    for runner, (share, ok, problem) in zip(runners, verdicts(op, places, size, dtype, seed=1), strict=True):
        seconds = median(runner.times)
        found.append(
            Timing(
                op.name, runner.backend.name, runner.backend.by(op), seconds * 1e3, min(runner.times) * 1e3,
                len(runner.times), runner.first * 1e3, runner.compile,
                None if reference is None else reference / seconds, work.flops, work.bytes, memory,
                work.flops / seconds * 1e-9, work.bytes / seconds * 1e-9, share, ok, note="view" if view else "",
            )
        )  # fmt: skip
        if problem:
            problems.append(problem)
    return found, problems


def table(size: BertSize, dtype: str) -> Table:
    shown = plain_table(title=f"{dtype}, {', '.join(f'{k} {v}' for k, v in size._asdict().items())}")
    shown.add_column("op", no_wrap=True)
    shown.add_column("backend", no_wrap=True)
    shown.add_column("by")
    for name in ("ms", "x numpy", "GFLOP/s", "% peak", "GB/s", "% peak", "compile s", "of bound"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("")
    return shown


def row(t: Timing) -> list[str]:
    mark = "[red]impossible[/red]" if t.note == "impossible" else t.note
    return [
        t.op, t.backend, t.by, f"{t.ms:.4f}", "" if t.ratio is None else f"{t.ratio:.2f}",
        f"{t.gflops:.1f}", f"{t.flops_share:.0%}", f"{t.gbps:.1f}", f"{t.bytes_share:.0%}",
        f"{t.compile_s:.2f}" if t.compile_s else "", f"{t.bound_share:.1%}",
        mark if t.ok else "[red]WRONG[/red]",
    ]  # fmt: skip


def bench(
    ops: Annotated[list[str] | None, typer.Argument(metavar="[OP]...", help="Which ops; default: all.")] = None,
    names: Annotated[str, typer.Option("--backends", help="a,b; default: all that run here.")] = "",
    batch: Annotated[int, typer.Option(min=1)] = 8,
    length: Annotated[int, typer.Option(min=1)] = 128,
    hidden: Annotated[int, typer.Option(min=1)] = 384,
    heads: Annotated[int, typer.Option(min=1)] = 12,
    intermediate: Annotated[int, typer.Option(min=1)] = 1536,
    vocabulary: Annotated[int, typer.Option(min=1)] = 30522,
    predicted: Annotated[int, typer.Option(min=1, help="Masked positions in the batch.")] = 154,
    dtype: Annotated[str, typer.Option(help="float32 or float64")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    rounds: Annotated[int, typer.Option(min=FEWEST_ROUNDS, help="Fewer where an op takes long.")] = 21,
    cold: Annotated[bool, typer.Option(help="Compile every kernel anew, and show how long it takes.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the same facts here.")] = None,
) -> int:
    """Time every op at its BERT shape on every backend."""
    if dtype not in Backend.dtypes:
        raise UserError(f"--dtype: expected float32 or float64, got {dtype!r}")
    if hidden % heads or predicted > batch * length:
        raise UserError("expected --hidden to be a multiple of --heads, and --predicted at most --batch times --length")
    size = BertSize(batch, length, hidden, heads, intermediate, vocabulary, predicted)
    chosen = [find_op(name) for name in ops or OPS]
    refuse_unwritable(json_file)
    with tempfile.TemporaryDirectory() as folder:
        if cold:
            os.environ["MINIBERT_CACHE_DIR"] = folder  # read when the kernels are first imported, below
        return _bench(chosen, names, size, dtype, threads, rounds, json_file)


def _bench(
    chosen: list[Op], names: str, size: BertSize, dtype: str, threads: int | None, rounds: int, json_file: Path | None
) -> int:
    places = chosen_backends(names or None, threads)
    played = [place.name for place in places if place.emulated]
    if played:
        raise UserError(
            f"--backends: {', '.join(played)} plays another machine, and its times are no machine's: leave it out"
        )
    from minibert.peaks import better, measure_peaks  # compiles a kernel, so only now that its cache is settled

    about = machine()
    if hasattr(os, "getloadavg"):
        about["load"] = os.getloadavg()[0]  # of the minute before: others' work, if it is not near 0
    about |= {f"backend {place.name}": place.describe() for place in places}
    for name, what in about.items():
        console.print(f"{name}: {what}", highlight=False)
    peaks = measure_peaks(dtype)
    found: list[Timing] = []
    problems: list[str] = []
    with console.status("") as status:
        for number, op in enumerate(chosen, 1):
            status.update(f"{op.name} ({number} of {len(chosen)})")
            rows, wrong = timings(op, places, size, dtype, rounds)
            found += rows
            problems += wrong
    peaks = better(peaks, measure_peaks(dtype))
    found = [timing.against(peaks) for timing in found]
    console.print(
        f"measured peaks, the better of before and after: {peaks.gflops:.0f} GFLOP/s (product {peaks.product}), "
        f"{peaks.triad_gbps:.1f} GB/s (triad), {peaks.fill_gbps:.1f} GB/s (fill); shares are of the higher\n"
        f'"cache": above it, with arrays that fit the last-level cache ({peaks.cache_bytes / 2**20:.0f} MiB); '
        '"impossible": above a peak without that excuse',
        highlight=False,
    )
    shown = table(size, dtype)
    for i, timing in enumerate(found, 1):
        shown.add_row(*row(timing), end_section=i % len(places) == 0)
    console.print(shown)
    console.print(f"compiled for {sum(t.compile_s for t in found):.1f} s in all", highlight=False)
    for problem in problems:
        console.print(f"[red]wrong[/red]: {problem}", highlight=False)
    if json_file is not None:
        facts = {
            "machine": about, "size": size._asdict(), "dtype": dtype, "peaks": peaks._asdict(),
            "ops": [asdict(t) for t in found], "ok": not problems,
        }  # fmt: skip
        json_file.write_text(json.dumps(facts, indent=1) + "\n")
    return 1 if problems else 0


def main() -> None:
    """A user's mistake is one line on stderr and exit code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(bench)
    try:
        status = app(standalone_mode=False)
    except (UserError, BackendUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except UsageMistake as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
