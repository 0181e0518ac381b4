"""How `bench.step` and `bench.infer` show and write what they found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.timing.batches import Batch
from bench.timing.figures import add_to_csv
from minibert.cli import legend
from minibert.cli.options import console, plain_table
from minibert.lab.measure import quiet

COLUMNS = {
    "of peak": "rate over that of multiply-adds in registers", "of product": "over that of NumPy's best product",
    "first call s": "seconds, compiling among them",
}  # fmt: skip


def described(batches: Sequence[Batch]) -> dict[str, Any]:
    """The batches in figures: padding is the share of the padded batch that no token stands on."""
    cells = sum(b.real.size for b in batches)
    tokens = sum(int(b.lengths.sum()) for b in batches)
    return {
        "batches": len(batches), "sequences": len(batches[0].lengths), "tokens": tokens / len(batches),
        "mean_length": tokens / sum(len(b.lengths) for b in batches), "padding": 1 - tokens / cells,
        "predicted": sum(b.predicted for b in batches) / len(batches),
    }  # fmt: skip


def say_where(about: Mapping[str, Any]) -> None:
    """Machine, versions and threads on the terminal."""
    versions = ", ".join(f"{name} {what}" for name, what in about["versions"].items() if what)
    where = "; ".join(f"{name} {what}" for name, what in about["machine"].items())
    threads = f"{about['threads']} thread{'s'[: about['threads'] > 1]}"
    console.print(f"{where}\n{versions}; {threads}", highlight=False, markup=False, soft_wrap=True)


def say_quiet(disturbance: Mapping[str, Any]) -> None:
    """The load on the terminal, and a warning where the machine was not quiet."""
    console.print(quiet.load_words(disturbance), highlight=False)
    if said := quiet.warning(disturbance):
        console.print(f"[yellow]{said}[/yellow]", highlight=False, soft_wrap=True)


def title(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['what']}\n{facts['sequences']} sequences, {facts['tokens']:.0f} tokens (mean length "
        f"{facts['mean_length']:.0f}, padding {facts['padding']:.0%} of the padded batch)"
    )


def table(facts: Mapping[str, Any], opponents: Sequence[str]) -> Table:
    """One line for each side; of an impossible figure only that it is one."""
    shown = plain_table()
    shown.add_column("side", no_wrap=True)
    compared = [name for o in opponents for name in (f"x {o}", "p20", "p80")]
    columns = ["ms", "p20", "p80", *compared, "of peak", "of product", "peak MB", "first call s"]
    for column in (*columns, *(["loss"] if "last_loss" in facts else []), ""):
        shown.add_column(column, justify="right", no_wrap=True)
    for who, taken in facts["seconds"].items():
        wrong = who in facts["impossible"]
        kinds = ("share_of_peak", "share_of_product")
        memory = facts["peak_bytes"].get(who)
        ratios = [ratio_cells(facts, who, o) for o in opponents]
        shown.add_row(
            who, *("-" if wrong else f"{taken[k] * 1e3:.1f}" for k in ("median", "p20", "p80")),
            *(cell for cells in ratios for cell in cells),
            *("-" if wrong or who not in facts[kind] else f"{facts[kind][who]:.0%}" for kind in kinds),
            "" if memory is None else f"{memory * 1e-6:.0f}", f"{facts['first_call_s'][who]:.2f}",
            *([f"{facts['last_loss'][who]:.4f}"] if "last_loss" in facts else []),
            "[red]impossible[/red]" if wrong else "",
        )  # fmt: skip
    return shown


def ratio_cells(facts: Mapping[str, Any], who: str, other: str) -> tuple[str, str, str]:
    """Median, p20 and p80 of how many times as fast as another side it is."""
    middle, ends = facts["ratio"].get(who, {}).get(other), facts["ratio_p20_p80"].get(who, {}).get(other)
    return ("", "", "") if middle is None else (f"{middle:.2f}", f"{ends[0]:.2f}", f"{ends[1]:.2f}")


def show(facts: Mapping[str, Any], opponents: Sequence[str]) -> None:
    """One measure on the terminal."""
    console.print(title(facts), highlight=False, soft_wrap=True)
    for who, why in facts["skipped"].items():
        console.print(f"{who} left out: {why}", highlight=False, markup=False, soft_wrap=True)
    if facts["refused"]:
        console.print(f"[red]refused[/red]: {facts['refused']}\n", highlight=False, soft_wrap=True)
        return
    legend.show(table(facts, [o for o in opponents if o in facts["seconds"]]), COLUMNS)
    for who, values in facts.get("without_dropout", {}).items():
        found = ", ".join(f"{k.replace('_', ' ')} {v:.6g}" for k, v in values.items())
        console.print(f"{who} without dropout: {found}", highlight=False)
    for who, distance in facts.get("apart", {}).get("before", {}).items():
        after = facts["apart"]["after"][who]
        console.print(
            f"{who}: outputs {distance:.1e} of the largest away before the timing, {after:.1e} after it, on new inputs",
            highlight=False,
        )
    for who, cost in facts["overhead"].items():
        share = cost["seconds"] / facts["seconds"][who]["median"]
        console.print(
            f"{who}: {cost['ops']} op calls; on next to nothing they take {cost['seconds'] * 1e3:.2f} ms: {share:.1%} "
            "of the time is tape, door and dispatch",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    for who, why in facts["peak_bytes_note"].items():
        if why:
            console.print(f"{who}: peak memory {why}", highlight=False, markup=False, soft_wrap=True)
    for who, seconds in facts["compile_s"].items():
        if seconds:
            console.print(f"{who}: {seconds:.1f} s of the first call went into compiling", highlight=False)
    for who, what in facts["libraries"].items():
        if what != "minibert":
            console.print(f"{who}: {what}", highlight=False, markup=False, soft_wrap=True)
    console.print()


def report(document: dict[str, Any], opponents: Sequence[str], json_file: Path | None, csv_file: Path | None) -> int:
    """Write the document and show every measure; 1 if a figure is impossible or the sides did not do the same."""
    found, peaks = document["measures"], document["peaks"]
    document["ok"] = not any(facts["refused"] or facts["impossible"] for facts in found.values())
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    add_to_csv(csv_file, document)
    for facts in found.values():
        show(facts, opponents)
    console.print(
        f"measured peaks, the better of before and after: {peaks['fma_gflops']:.0f} GFLOP/s of multiply-adds in "
        f"registers, {peaks['gflops']:.0f} in NumPy's best product ({peaks['product']}); a side's shares are of "
        "the work that it does itself, padding and whole head included",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    say_quiet(document["disturbance"])
    return 0 if document["ok"] else 1
