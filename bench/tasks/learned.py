"""How the bench of pretraining shows what was learned: held-out loss by time, in a table and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.tasks.tables import say_peak
from minibert.cli.options import console, plain_table
from minibert.tasks.picture import figure_library, save


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Each side's curve, and the loss of guessing by frequency, into a .png, .svg or .pdf file."""
    figure = figure_library().figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    facts, kept = document["measures"]["pretraining"], document["data"]
    for who, points in facts["curves"].items():
        library = facts["libraries"][who]
        name = f"{library}, {who}" if library == "minibert" else library
        minutes = [point["seconds"] / 60 for point in points]
        steps = f"{points[-1]['steps']:,} steps, {points[-1]['held_out_loss']:.3f}"
        axes.plot(minutes, [point["held_out_loss"] for point in points], marker=".", label=f"{name}\n{steps}")
    unigram = document["unigram_loss"]
    axes.axhline(unigram, color="grey", linestyle="--", label=f"guessing by frequency, {unigram:.3f}")
    axes.set_xlabel(f"minutes of training steps, {document['threads']} thread{'s'[: document['threads'] > 1]}")
    axes.set_ylabel(f"held-out loss of {kept['held_out_predicted']:,} masked tokens")
    processor = document["machine"]["processor"]
    axes.set_title(f"{document['command_options']['config']}, {kept['bytes'] / 1e6:.1f} MB of text\n{processor}")
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    save(figure, path)


def report(document: dict[str, Any], json_file: Path | None, picture: Path | None) -> int:
    """Show, write and draw; 1 if a figure is impossible or the sides do not compute the same."""
    facts = document["measures"]["pretraining"]
    document["ok"] = not (facts["refused"] or facts["impossible"])
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    if facts["refused"]:
        console.print(f"[red]refused[/red]: {facts['refused']}", highlight=False, soft_wrap=True)
        return 1
    if picture is not None:
        draw(document, picture)
    shown = plain_table()
    shown.add_column("side", no_wrap=True)
    for column in ("seconds", "steps", "tokens", "tokens/s", "of peak", "held-out loss", ""):
        shown.add_column(column, justify="right", no_wrap=True)
    for who, (*_, last) in facts["curves"].items():
        wrong = who in facts["impossible"]
        share = "-" if wrong or who in facts["fewer_bits"] else f"{facts['share_of_peak'][who]:.0%}"
        shown.add_row(
            who, f"{last['seconds']:.1f}", f"{last['steps']:,}", f"{last['tokens']:,}",
            "-" if wrong else f"{facts['tokens_per_second'][who]:,.0f}",
            share, f"{last['held_out_loss']:.4f}",
            "[red]impossible[/red]" if wrong else "",
        )  # fmt: skip
    console.print(shown)
    first = next(iter(facts["curves"].values()))[0]["held_out_loss"]
    console.print(
        f"held-out loss before: {first:.4f}; of guessing by frequency: {document['unigram_loss']:.4f}", highlight=False
    )
    for what in facts["libraries"].values():
        if what != "minibert":
            console.print(what, highlight=False, markup=False, soft_wrap=True)
    say_peak(document, "padding and whole head included")
    return 0 if document["ok"] else 1
