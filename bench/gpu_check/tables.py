"""A run of `bench.gpu_check` on the terminal."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from bench.gpu_check.report import Report
from minibert.cli import legend
from minibert.cli.options import console, plain_table

COLUMNS = {
    "floor ms": "the least that the peaks allow", "of floor": "that over the median",
    "of copy": "of a copy's bandwidth", "of peak": "rate over the peak", "memory GB": "at the most",
}  # fmt: skip
COLOURS = {"ok": "green", "skipped": "yellow"}


def show(report: Report) -> None:
    """Parts, peaks, kernels and steps, as far as they came."""
    about = report.figures("machine").get("backend", report.backend)
    console.print(f"{report.device}: {about}", highlight=False, markup=False)
    if report.label:
        console.print(f"[red]{report.label}[/red]: every time below is a CPU's that plays a GPU")
    for table in (parts(report), peaks(report), kernels(report), steps(report)):
        if table is not None:
            legend.show(table, COLUMNS)
    for part in report.parts:
        for what in part.skipped:
            console.print(f"{part.name}: left out: {what}", highlight=False, markup=False)
    verdict = "[green]nothing wrong was found[/green]" if report.document()["ok"] else "[red]something is wrong[/red]"
    console.print(f"{verdict}, in {report.seconds:.0f} s", highlight=False)
    if report.path is not None:
        console.print(f"written: {report.path}", highlight=False, markup=False)


def _table(title: str, names: tuple[str, ...], left: int, label: str = "") -> Table:
    table = plain_table(title=f"{title} ({label})" if label else title)
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < left else "right", no_wrap=True)
    return table


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}" if value >= 0.001 else "<0.1%"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def parts(report: Report) -> Table:
    table = _table("parts", ("part", "status", "s"), 2, report.label)
    table.add_column("reason")
    for part in report.parts:
        status = f"[{COLOURS.get(part.status, 'red')}]{part.status}[/]"
        reason = escape((part.reason.splitlines() or [""])[0][:300])
        table.add_row(part.title, status, f"{part.seconds:.1f}", reason)
    return table


def peaks(report: Report) -> Table | None:
    found = report.figures("peaks")
    if not found.get("bandwidth"):
        return None
    table = _table("measured peaks, the best sample", ("what", "", ""), 1, report.label)
    for name, way in found["bandwidth"].items():
        table.add_row(f"{name}, {found['bytes'] / 2**20:.4g} MiB", _number(way["gbps"]), "GB/s")
    for mode, one in found.get("product", {}).items():
        table.add_row(f"product in {mode}, {one['size']} cubed", _number(one["tflops"]), "TFLOP/s")
    return table


def kernels(report: Report) -> Table | None:
    found = report.figures("kernels")
    if not found.get("rows"):
        return None
    names = ("op", "mode", "size", "ms", "p20", "p80", "floor ms", "of floor", "GB/s", "TFLOP/s", "of copy", "target")
    table = _table(f"kernels; target: {found['target']:.0%} of the copy bandwidth", names, 3, report.label)
    table.add_column("")
    for row in found["rows"]:
        met = row.get("target_met")
        table.add_row(
            row["op"], row["mode"], row["size"], *(_number(row.get(n)) for n in ("ms", "ms_p20", "ms_p80", "floor_ms")),
            _share(row.get("share")), _number(row.get("gbps")), _number(row.get("tflops")), _share(row.get("of_copy")),
            "" if met is None else "met" if met else "[yellow]below[/yellow]", escape(row.get("error") or row["note"]),
        )  # fmt: skip
    return table


def steps(report: Report) -> Table | None:
    groups = report.figures("steps").get("groups")
    if not groups:
        return None
    names = ("batch", "mode", "who", "ms", "p20", "p80", "tokens/s", "memory GB", "of peak")
    table = _table("training steps of BERT", names, 3, report.label)
    table.add_column("")
    for group in groups:
        results: dict[str, Any] = group["results"]
        for number, (who, result) in enumerate(results.items(), 1):
            memory = result.get("peak_memory")
            table.add_row(
                f"B {group['batch']}, T {group['length']}", group["mode"], who,
                *(_number(result.get(name)) for name in ("ms", "ms_p20", "ms_p80")),
                "" if result.get("tokens_per_s") is None else f"{result['tokens_per_s']:.0f}",
                "" if memory is None else f"{memory / 1e9:.3g}", _share(result.get("mfu")),
                escape(result.get("error") or result.get("note", "")),
                end_section=number == len(results),
            )  # fmt: skip
        for pair, ratio in group.get("times_as_fast", {}).items():
            table.add_row("", "", f"  {pair}", f"x {ratio:.2f}")
    return table
