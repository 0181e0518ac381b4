"""What `minibert compare` shows: the same rows as rich tables and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from minibert.cli.legend import legend
from minibert.cli.options import COMPARE_TITLE, plain_table
from minibert.lab.compare.records import STAGES, Comparison, OpRecord, Run, rate
from minibert.lab.measure.quiet import Spread, load_words, warning


class Rows(NamedTuple):
    """A titled table of strings; rich's markup in cells."""

    title: str
    header: list[str]
    rows: list[list[str]]


def _speed(found: Comparison, runs: list[Run]) -> Rows:
    """Op by op: calls, and for each backend what ran it, its time, its share of the step and its rates."""
    reference = found.runs[0]
    header = ["op", "calls"]
    for run in runs:
        if run.backend.emulated:
            header += [f"{run.backend.name} by", "not GPU speed: ms"]
            continue
        ratio = [] if run is reference else [f"x {reference.backend.name}", "p20", "p80"]
        header += [f"{run.backend.name} by", "ms", *ratio, "share", "GFLOP/s", "GB/s"]
    rows = []
    for op in sorted(reference.ops, key=lambda op: -reference.ops[op].median_seconds):
        row = [op.name, str(reference.ops[op].calls)]
        for run in runs:
            record = run.ops[op]
            seconds = record.median_seconds
            if run.backend.emulated:
                row += [run.backend.by(op), f"{seconds * 1e3:.0f}"]
                continue
            ratio = [] if run is reference else _speed_cells(found.speed(run, op))
            row += [
                run.backend.by(op), f"{seconds * 1e3:.3f}", *ratio, f"{seconds / run.step_seconds:.1%}",
                f"{rate(record.cost.flops, seconds):.1f}", f"{rate(record.cost.bytes, seconds):.1f}",
            ]  # fmt: skip
        rows.append(row)
    total = ["step", str(sum(r.calls for r in reference.ops.values()))]
    for run in runs:
        if run.backend.emulated:
            total += ["", f"{run.step_seconds * 1e3:.0f}"]
            continue
        ratio = [] if run is reference else _speed_cells(found.speed(run))
        work = [r.cost for r in run.ops.values()]
        total += [
            "", f"{run.step_seconds * 1e3:.3f}", *ratio, "100.0%",
            f"{rate(sum(c.flops for c in work), run.step_seconds):.1f}",
            f"{rate(sum(c.bytes for c in work), run.step_seconds):.1f}",
        ]  # fmt: skip
    return Rows("Speed: one training step, medians", header, [*rows, total])


def _speed_cells(speed: Spread | None) -> list[str]:
    return ["-"] * 3 if speed is None else [f"{part:.2f}" for part in speed]


def _errors(found: Comparison, runs: list[Run], ulp: bool = False) -> Rows:
    """Op by op: each backend on the reference's inputs, against the formula in float64."""
    header = ["op", "judged"]
    for run in runs:
        name = run.backend.name
        header += [*([f"{name} max ulp", "err/uS"] if ulp else [f"{name} err/uS"]), "of bound", ""]
    rows = []
    for op, record in found.runs[0].ops.items():
        row = [op.name, f"{len(record.judgements)}"]
        for run in runs:
            row += _error_cells(run.ops[op], ulp)
        rows.append(row)
    return Rows("Error: local (same inputs), against the formula in float64", header, rows)


def _error_cells(record: OpRecord, with_ulp: bool) -> list[str]:
    if not record.judgements:
        return [*([""] if with_ulp else []), "", "", "not judged"]
    ulp, over_us, share = (record.worst(m) or 0.0 for m in ("ulp_max", "err_over_us", "bound_share"))
    return [
        *([f"{ulp:.3g}"] if with_ulp else []),
        f"{over_us:.3g}",
        f"{share:.2%}",
        "[red]FAIL[/red]" if record.failures else "[green]ok[/green]",
    ]


def _stages(found: Comparison, runs: list[Run]) -> Rows:
    header, runs = ["stage"], [run for run in runs if not run.backend.emulated]
    for run in runs:
        header += [f"{run.backend.name} ms/sample", "us/token", "peak MB"]
    tokens = len(found.batch.input_ids)
    rows = []
    for name in STAGES:
        row = [name]
        for run in runs:
            stage = run.stages[name]
            per_sample, per_token = stage.seconds * 1e3 / found.samples, stage.seconds * 1e6 / tokens
            row += [f"{per_sample:.3f}", f"{per_token:.2f}", f"{stage.peak_bytes / 1e6:.1f}"]
        rows.append(row)
    return Rows("Stages", header, rows)


def _losses(found: Comparison, runs: list[Run]) -> Rows:
    names = [run.backend.name for run in runs]
    rows = [[str(i + 1), *(repr(run.losses[i]) for run in runs)] for i in range(len(found.runs[0].losses))]
    rows.append(["loss apart (relative)", *(f"{found.loss_distance(run):.2g}" for run in runs)])
    rows.append(["weights apart (relative)", *(f"{found.weight_distance(run):.2g}" for run in runs)])
    return Rows("Loss after each step", ["step", *names], rows)


SECTIONS = (_speed, _errors, _stages, _losses)


def _sections(found: Comparison, ulp: bool) -> Iterator[Callable[[Comparison, list[Run]], Rows]]:
    """What makes each table; `ulp`: with errors in units in the last place."""
    for section in SECTIONS if found.timed else (_errors,):
        yield partial(_errors, ulp=ulp) if section is _errors else section


def tables(found: Comparison, console: Console, ulp: bool = False) -> Iterator[Table]:
    """Backends side by side where the terminal is wide enough, else a table for each."""
    for section in _sections(found, ulp):
        together = _table(section(found, found.runs))
        if Measurement.get(console, console.options.update(width=1000), together).maximum <= console.width:
            yield together
        else:
            yield from (_table(rows) for run in found.runs if len((rows := section(found, [run])).header) > 1)


def _table(rows: Rows) -> Table:
    table = plain_table(title=rows.title, header_style="bold")
    for i, name in enumerate(rows.header):
        table.add_column(name, justify="left" if i == 0 or name.endswith(" by") else "right", no_wrap=i == 0)
    for row in rows.rows:
        table.add_row(*row)
    return table


def verdict(found: Comparison) -> str:
    """One line: whether every op stayed within its bound, how far the losses stand apart, and how fast each was."""
    reference, *others = found.runs
    if found.failures:
        judgement = found.failures[0][2]
        bad = sorted({f"{record.op.name} on {run.backend.name}" for run, record, _ in found.failures})
        unknown = f"the bound is infinite on {judgement.unbounded} elements, so nothing is known of them"
        what = judgement.problem or (judgement.worst if not judgement.ok else unknown)
        return f"[red]FAIL[/red] {', '.join(bad)}: {what}{'' if found.timed else '; training broke down'}"
    judged = sum(len(r.judgements) for run in found.runs for r in run.ops.values())
    names = ", ".join(run.backend.name for run in found.runs)
    passed = f"[green]PASS[/green] {len(reference.ops)} ops on {names}: {judged} judged calls within their bound"
    if not others:
        return passed
    speeds = [
        f"{run.backend.name} {speed.median:.2f}x {reference.backend.name} (p20 {speed.p20:.2f}, p80 {speed.p80:.2f})"
        for run in others
        if (speed := found.speed(run)) is not None
    ]
    apart = max(found.loss_distance(run) for run in others)
    passed += f"; losses within {apart:.1g} of each other"
    if not speeds:
        return passed
    return f"{passed}; speed of a step: {', '.join(speeds)}; {load_words(found.disturbance)}"


def markdown(found: Comparison, config: Mapping[str, Any], machine: Mapping[str, Any], ulp: bool = False) -> str:
    """The tables and the verdict as a Markdown page."""
    lines = [COMPARE_TITLE, "", f"{config['name']}: {config['summary']}", ""]
    lines += [f"- {key}: {value}" for key, value in machine.items()]
    lines += [f"- {run.backend.name}: {run.backend.describe()}" for run in found.runs]
    for rows in (section(found, found.runs) for section in _sections(found, ulp)):
        lines += ["", f"## {rows.title}", "", _line(rows.header), _line(["---"] * len(rows.header))]
        lines += [_line(row) for row in rows.rows]
        lines += ["", legend(rows.header)] if legend(rows.header) else []
    lines += ["", _plain(verdict(found))]
    if said := warning(found.disturbance):
        lines += ["", said]
    return "\n".join([*lines, ""])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(_plain(cell) for cell in cells)} |"


def _plain(text: str) -> str:
    return re.sub(r"\[/?(green|red|bold)?\]", "", text)
