"""`minibert quantize`: a model whose linear layers are in int8, for inference."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import typer

from minibert.backends import MOST_THREADS
from minibert.cli import app
from minibert.cli.compiling import show_compiling
from minibert.cli.options import BACKENDS, OWN_HELP, console, notes, plain_table
from minibert.cli.running import fastest_or
from minibert.data import SHIPPED_TEXT, read_documents
from minibert.data.lines import text_lines
from minibert.model.checkpoint import WEIGHTS
from minibert.model.sentence_config import encoder_folder
from minibert.tasks.quantize import Quantization, load
from minibert.tasks.quantize import quantize as quantize_model
from minibert.train.checkpoint import megabytes, refuse_to_overwrite

TEXTS = 64  # of the text that ships, one in so many sentences


@app.command()
def quantize(
    folder: Path = typer.Argument(metavar="FOLDER", help="A model in floats: of any task, or of sentences."),
    output: Path = typer.Option(..., help="Folder for the model in int8, in the form of compressed-tensors."),
    text: Path = typer.Option(
        None, show_default="the text that ships", help="Lines of text to measure by how far outputs move."
    ),
    texts: int = typer.Option(TEXTS, min=1, help="How many of its lines, or sentences, the first."),
    sensitivity: bool = typer.Option(False, "--sensitivity", help="Show how far outputs move by each layer alone."),
    budget: float = typer.Option(
        None, min=0.0, help="Mean of 1 - cosine that is allowed: layers that move most stay in floats until it is kept."
    ),
    keep: str = typer.Option(None, metavar="NAME,NAME", help="Layers that stay in floats, by a part of their name."),
    backend: str = typer.Option(None, *BACKENDS, show_default="the fastest here", help=f"It measures on. {OWN_HELP}"),
    threads: int = typer.Option(
        None, min=1, max=MOST_THREADS, show_default="all cores", help="Threads of kernels and BLAS."
    ),
) -> None:
    """Write a model whose encoder multiplies in int8: weights by output channel, activations by row as they come.

    Smaller and faster where it is used (`predict`, `embed`, `evaluate`, `fill-mask`), and not to be trained.
    """
    refuse_to_overwrite(output)
    place = fastest_or(backend, threads)
    loaded = load(folder, place)
    lines = list(islice(some_texts(text), texts))
    with notes.status("measuring") as status, show_compiling(status.update):
        found = quantize_model(
            loaded, lines, budget=budget, keep=[word for word in (keep or "").split(",") if word],
            sensitivity=sensitivity, progress=status.update,
        )  # fmt: skip
    loaded.save(output)
    if found.alone:
        show_sensitivity(found)
    say(f"backend {place.name}: {place.describe()}")
    kept = f", {len(found.floats)} in floats ({', '.join(found.floats)})" if found.floats else ""
    say(f"{len(found.int8)} products of the encoder in int8{kept}")
    moved = f"mean {found.mean:.2e}, largest {found.largest:.2e}"
    say(f"1 - cosine of the mean hidden states of {len(lines)} texts: {moved}")
    if budget is not None and found.mean > budget:
        say(f"above the budget of {budget:.2e}: everything that may be is in floats")
    sizes = [(encoder_folder(each) / WEIGHTS).stat().st_size for each in (output, folder)]
    say(f"the model is in {output}: {WEIGHTS} has {megabytes(sizes[0])}, had {megabytes(sizes[1])}")


def some_texts(path: Path | None) -> Iterator[str]:
    if path is not None:
        return (line for line in text_lines(path) if line.strip())
    return (sentence for document in read_documents(SHIPPED_TEXT) for sentence in document)


def show_sensitivity(found: Quantization) -> None:
    table = plain_table("layer", "1 - cosine, alone in int8", "in")
    for group, distance in sorted(found.alone.items(), key=lambda item: -item[1]):
        table.add_row(group, f"{distance:.2e}", "int8" if group in found.int8 else "floats")
    console.print(table, highlight=False)


def say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
