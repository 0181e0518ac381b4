"""Every op at its BERT shape on every backend: `python -m bench.ops [OP ...] [--backends numpy,numba] [--json FILE]`.

Backends take turns within each round, so that a machine that slows down slows all of them; the figure is the median
over rounds, with the 20th and 80th percentiles beside it. The first call (which may compile) is kept apart. `predicted`
is the time of the roofline from peaks measured in the same run, `limit` what sets it, `share` predicted over measured.
Each op is judged by its hard bound before the timing and, on fresh inputs, after it; the exit code is 1 if one fails,
or if a time is impossible: less than the machine's limit allows (`bench.timing.op_timing`). `--vs torch` adds the same
formula evaluated by PyTorch.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.status import Status
from rich.table import Table

from bench.peers.torch_formula import TorchFormula
from bench.timing import harness, sides
from bench.timing.figures import add_to_csv, refuse_other_csv
from bench.timing.op_timing import Timing, peaks_of, timings
from minibert.backends import Backend
from minibert.cli import legend
from minibert.cli.options import BACKENDS, OWN_HELP, chosen_backends, console, notes, plain_table, refuse_unwritable
from minibert.errors import UserError
from minibert.kernels import OPS, Op
from minibert.kernels.op import BertSize
from minibert.lab.conform.check import find_op
from minibert.lab.measure import quiet
from minibert.lab.measure.roofline import IMPOSSIBLE, NOTES

if TYPE_CHECKING:
    from minibert.lab.measure.peaks import Peaks

OPPONENTS = ("torch",)
COLUMNS = {
    "predicted": "milliseconds by the roofline", "limit": "what sets them", "share": "predicted over measured",
}  # fmt: skip


def bench(
    ops: Annotated[list[str] | None, typer.Argument(metavar="[OP]...", help="Which ops; default: all.")] = None,
    names: Annotated[str, typer.Option(*BACKENDS, help=f"a,b; default: all that run here. {OWN_HELP}")] = "",
    versus: Annotated[str, typer.Option("--vs", help="torch: the same formulas there; default: nobody.")] = "",
    batch: Annotated[int, typer.Option(min=1)] = 8,
    length: Annotated[int, typer.Option(min=1)] = 128,
    hidden: Annotated[int, typer.Option(min=1)] = 384,
    heads: Annotated[int, typer.Option(min=1)] = 12,
    intermediate: Annotated[int, typer.Option(min=1)] = 1536,
    vocabulary: Annotated[int, typer.Option(min=1)] = 30522,
    predicted: Annotated[int, typer.Option(min=1, help="Masked positions in the batch.")] = 154,
    dtype: Annotated[str, typer.Option(help="float32 or float64")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    rounds: Annotated[int, typer.Option(min=harness.FEWEST_ROUNDS, help="Fewer where an op takes long.")] = 21,
    cold: Annotated[bool, typer.Option(help="Compile every kernel anew, and show how long it takes.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the same facts here.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Add the figures to this long CSV.")] = None,
) -> int:
    """Time every op at its BERT shape on every backend."""
    if dtype not in Backend.dtypes:
        raise UserError(f"--dtype: expected float32 or float64, got {dtype!r}")
    if hidden % heads or predicted > batch * length:
        raise UserError("expected --hidden to be a multiple of --heads, and --predicted at most --batch times --length")
    opponents = harness.among("--vs", versus, OPPONENTS)
    size = BertSize(batch, length, hidden, heads, intermediate, vocabulary, predicted)
    chosen = [find_op(name) for name in ops or OPS]
    refuse_unwritable(json=json_file, csv=csv_file)
    refuse_other_csv(csv_file)
    with tempfile.TemporaryDirectory() as folder:
        if cold:
            os.environ["MINIBERT_CACHE_DIR"] = folder  # read when the kernels are first imported, below
        document = measure(chosen, chosen_places(names, threads), opponents, size, dtype, rounds)
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    add_to_csv(csv_file, document)
    return 0 if document["ok"] else 1


def chosen_places(names: str, threads: int | None) -> list[Backend]:
    """The backends of `a,b`. Raises UserError for one that plays another machine."""
    places = chosen_backends(names or None, threads)
    played = [place.name for place in places if place.emulated]
    if played:
        raise UserError(
            f"--backend: {', '.join(played)} plays another machine, and its times are no machine's: leave it out"
        )
    return places


def measure(
    chosen: Sequence[Op], places: Sequence[Backend], opponents: Sequence[str], size: BertSize, dtype: str, rounds: int
) -> dict[str, Any]:
    """Time, judge and show; the document."""
    from minibert.kernels.cpu.threads import num_threads
    from minibert.lab.measure import (
        peaks as machine_peaks,  # it compiles a kernel, so only now that its cache is settled
    )

    others: list[Any] = [TorchFormula(num_threads()) for _ in opponents]
    about, load = harness.fingerprint(places, num_threads()), quiet.Load()
    sides.say_where(about)
    found: list[Timing] = []
    problems: list[str] = []
    skipped: dict[str, dict[str, str]] = {}
    with notes.status("measuring the peaks") as status:
        peaks = machine_peaks.measure_peaks(dtype)
        launches = launch_costs([*places, *others])
        for number, op in enumerate(chosen, 1):
            progress = partial(tell, status, f"{op.name} ({number} of {len(chosen)})")
            rows, wrong, left_out = timings(op, places, others, size, dtype, rounds, progress)
            found, problems = found + rows, problems + wrong
            skipped |= {op.name: left_out} if left_out else {}
        status.update("measuring the peaks")
        peaks = machine_peaks.better(peaks, machine_peaks.measure_peaks(dtype))
        again = launch_costs([*places, *others])
    launches = {name: min(cost, again[name]) for name, cost in launches.items()}
    limits = {place.name: peaks_of(place, peaks) for place in (*places, *others)}
    found = [timing.against(limits[timing.backend], launches[timing.backend]) for timing in found]
    settings = {"size": size._asdict(), "length": size.length, "dtype": dtype, "rounds": rounds}
    disturbance = load.disturbance(num_threads(), {f"{t.op} on {t.backend}": t.seconds["all"] for t in found})
    show(found, problems, skipped, peaks, launches, settings)
    sides.say_quiet(disturbance)
    return {
        "bench": "ops", **about, "settings": settings, "peaks": peaks._asdict(), "launch_s": launches,
        "disturbance": disturbance,
        "ops": [asdict(t) | {"ms": t.ms} for t in found], "skipped": skipped, "problems": problems,
        "ok": not problems and all(t.note != IMPOSSIBLE for t in found),
    }  # fmt: skip


def tell(status: Status, where: str, what: str) -> None:
    status.update(f"{where} {what}")


def launch_costs(places: Sequence[Any]) -> dict[str, float]:
    """Seconds that a call costs by itself on each."""
    from minibert.lab.measure.peaks import launch_seconds

    return {place.name: launch_seconds(place) for place in places}


# ---------------------------------------------------------------------------------------------------------------- shown


def show(
    found: Sequence[Timing], problems: Sequence[str], skipped: dict[str, dict[str, str]], peaks: Peaks,
    launches: dict[str, float], settings: dict[str, Any],
) -> None:  # fmt: skip
    calls = ", ".join(f"{seconds * 1e6:.1f} us on {name}" for name, seconds in launches.items())
    console.print(
        f"measured limits, the better of before and after: {peaks.limit_gflops:.0f} GFLOP/s (multiply-adds in "
        f"registers; NumPy's best product {peaks.gflops:.0f}), {peaks.gbps:.1f} GB/s (triad {peaks.triad_gbps:.1f}, "
        f"fill {peaks.fill_gbps:.1f}); a call by itself {calls}\n"
        + "; ".join(f'"{word}": {meaning}' for word, meaning in NOTES.items())
        + f"; the cache: {peaks.cache_bytes / 2**20:.0f} MiB",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    legend.show(table(found, settings), COLUMNS)
    console.print(f"compiled for {sum(t.compile_s for t in found):.1f} s in all", highlight=False)
    for op, reasons in skipped.items():
        for who, why in reasons.items():
            console.print(f"{op}: {who} left out: {why}", highlight=False, markup=False, soft_wrap=True)
    for problem in problems:
        console.print(f"[red]wrong[/red]: {problem}", highlight=False, soft_wrap=True)


def table(found: Sequence[Timing], settings: dict[str, Any]) -> Table:
    size = ", ".join(f"{k} {v}" for k, v in settings["size"].items())
    shown = plain_table(title=f"{settings['dtype']}, {size}")
    shown.add_column("op", no_wrap=True)
    shown.add_column("backend", no_wrap=True)
    shown.add_column("by", no_wrap=True)
    times = ("ms", "p20", "p80", "x numpy", "p20", "p80")
    for name in (*times, "predicted", "limit", "share", "GFLOP/s", "GB/s", "of bound"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("", no_wrap=True)
    for number, timing in enumerate(found, 1):
        shown.add_row(*row(timing), end_section=number == len(found) or found[number].op != timing.op)
    return shown


def row(t: Timing) -> list[str]:
    """One line; of an impossible time, or of a wrong result, only that it is one."""
    usable = t.ok and t.note != IMPOSSIBLE
    mark = "[red]WRONG[/red]" if not t.ok else "[red]impossible[/red]" if not usable else t.note

    def figure(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form) if usable else "-"

    return [
        t.op, t.backend, t.by, *(figure(t.seconds[key] * 1e3, ".4f") for key in ("median", "p20", "p80")),
        *(figure(r, ".2f") for r in (t.ratio, *(t.ratio_p20_p80 or (None, None)))),
        "" if t.predicted_ms is None else f"{t.predicted_ms:.4f}", t.limit or "",
        figure(t.limit_share, ".0%"), figure(t.gflops, ".1f"), figure(t.gbps, ".1f"), f"{t.bound_share:.1%}", mark,
    ]  # fmt: skip


if __name__ == "__main__":
    harness.run_main(bench)
