"""How a task's bench shows and writes what it found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from bench.timing import sides
from minibert.cli import legend
from minibert.cli.options import console, plain_table
from minibert.lab.measure import quiet

COLUMNS = {
    "train s": "seconds of all steps", "ms": "median milliseconds of a step",
    "of peak": "rate over that of multiply-adds in registers", "trained": "numbers that are trained",
}  # fmt: skip


def means(found: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each side over the seeds: means; of steps, and of their ratio, the median, p20 and p80 of all."""
    every = list(found.values())
    result: dict[str, dict[str, Any]] = {}
    for who in every[0]["metrics"]:
        result[who] = {"trained": every[0]["trained"][who]}
        for metric in metrics:
            values = [facts["metrics"][who][metric] for facts in every]
            result[who][metric] = None if None in values else fmean(values)
    return {who: {**row, **of_times(every, who)} for who, row in result.items()}


def of_times(every: Sequence[Mapping[str, Any]], who: str) -> dict[str, Any]:
    """The means of what a side took; nothing where nothing was timed."""
    if "seconds" not in every[0]:
        return {}
    first, *_ = every[0]["seconds"]
    seconds = {side: [s for facts in every for s in facts["seconds"][side]["all"]] for side in (who, first)}
    impossible = {side for facts in every for side in facts["impossible"]}
    ratio = quiet.ratio(seconds[who], seconds[first]) if who != first and not {who, first} & impossible else None
    return {
        "training_s": fmean(facts["training_s"][who] for facts in every),
        "seconds": quiet.spread(seconds[who])._asdict(),
        "ratio": ratio and ratio._asdict(),  # how many times as fast as this side the first one is
        "share_of_peak": fmean(facts["share_of_peak"][who] for facts in every),
        "peak_bytes": every[0].get("peak_bytes", {}).get(who),
        "impossible": who in impossible,
    }


def of_seed(facts: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    return means({"": facts}, metrics)


def table(document: Mapping[str, Any]) -> Table:
    """A line for each side of each seed, and for the means."""
    metrics, found = document["metrics"], document["measures"]
    groups = [(name, of_seed(facts, metrics)) for name, facts in found.items()]
    if len(groups) > 1:
        groups.append(("mean", document["means"]))
    first = next(iter(document["means"]))
    timed = document["peaks"] is not None
    shown = plain_table()
    shown.add_column("run", no_wrap=True)
    shown.add_column("side", no_wrap=True)
    of_time = ("train s", "ms", "p20", "p80", f"{first} x", "p20", "p80", "of peak", "peak MB", "")
    for column in (*metrics, "trained", *(of_time if timed else ())):
        shown.add_column(column, justify="right", no_wrap=True)
    for name, group in groups:
        for who, row in group.items():
            cells = ["-" if row[metric] is None else f"{row[metric]:.4f}" for metric in metrics]
            shown.add_row(name, who, *cells, f"{row['trained']:,}", *(time_cells(row) if timed else ()))
    return shown


def time_cells(row: Mapping[str, Any]) -> list[str]:
    """Of a side, under the columns of times."""
    wrong, ratio, memory = row["impossible"], row["ratio"], row["peak_bytes"]
    times = ["-"] * 3 if wrong else [f"{row['seconds'][k] * 1e3:.1f}" for k in ("median", "p20", "p80")]
    ratios = [""] * 3 if ratio is None else [f"{ratio[k]:.2f}" for k in ("median", "p20", "p80")]
    return [
        f"{row['training_s']:.1f}", *times, *ratios, "-" if wrong else f"{row['share_of_peak']:.0%}",
        "" if memory is None else f"{memory * 1e-6:.0f}", "[red]impossible[/red]" if wrong else "",
    ]  # fmt: skip


def say_untuned(document: Mapping[str, Any]) -> None:
    """The figures of the pretrained model, where it had any."""
    untuned = next(iter(document["measures"].values())).get("untuned")
    for metric in document["metrics"] if untuned else ():
        figures = ", ".join(f"{who} {found[metric]:.6f}" for who, found in untuned.items())
        console.print(f"{metric} before fine-tuning: {figures}", highlight=False)


def say_distance(document: Mapping[str, Any]) -> None:
    """How far the metrics are apart, and from what a linear model reaches."""
    for metric in document["metrics"]:
        first, *others = document["means"].items()
        for who, figures in others:
            if None not in (first[1][metric], figures[metric]):
                apart = first[1][metric] - figures[metric]
                console.print(f"{metric} of {first[0]} less that of {who}: {apart:+.4f}", highlight=False)
        floor = document["floor"].get(metric)
        if floor is not None:
            console.print(f"{metric} of a linear model on TF-IDF: {floor:.4f}", highlight=False)


def report(document: dict[str, Any], json_file: Path | None) -> int:
    """Show and write the document; 1 if a figure is impossible or the sides do not compute the same."""
    found = document["measures"]
    refused = {name: facts["refused"] for name, facts in found.items() if facts["refused"]}
    impossible = [who for facts in found.values() for who in facts.get("impossible", ())]
    document |= {"ok": not refused and not impossible, "means": {} if refused else means(found, document["metrics"])}
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    kept = document["data"]
    console.print(
        f"{document['task']}: {kept['train']} examples of {kept['package']} to train on, {kept['test']} to judge by",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for name, why in refused.items():
        console.print(f"[red]refused[/red], {name}: {why}", highlight=False, soft_wrap=True)
    if not refused:
        first = next(iter(document["means"]))
        legend.show(table(document), {**COLUMNS, f"{first} x": f"how many times as fast as the side {first} is"})
        say_untuned(document)
        say_distance(document)
        for facts in found.values():
            for who, why in facts.get("peak_bytes_note", {}).items():
                if why:
                    console.print(f"{who}: peak memory {why}", highlight=False, markup=False, soft_wrap=True)
    for who, what in next(iter(found.values()))["libraries"].items():
        if what != "minibert":
            console.print(f"{who}: {what}", highlight=False, markup=False, soft_wrap=True)
    if document["peaks"] is None:
        console.print("nothing was timed", highlight=False)
        return 0 if document["ok"] else 1
    say_peak(document, "padding included")
    return 0 if document["ok"] else 1


def say_peak(document: Mapping[str, Any], included: str) -> None:
    """What shares of the peak are of, and whether the machine was quiet."""
    console.print(
        f"measured peak, the better of before and after: {document['peaks']['fma_gflops']:.0f} GFLOP/s of "
        f"multiply-adds in registers; a side's share is of the work that it does itself, {included}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    sides.say_quiet(document["disturbance"])
