"""`minibert predict` and `minibert evaluate`: a fine-tuned model on a file of its own kind."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import typer

from minibert.backends import MOST_THREADS
from minibert.cli import app
from minibert.cli.finetune import judged, prepared
from minibert.cli.labelled import Columns, note_of
from minibert.cli.options import BACKENDS, DTYPE_HELP, OWN_HELP, machine, notes, refuse_unwritable
from minibert.cli.running import fastest_or
from minibert.data.lines import name_of
from minibert.errors import UserError
from minibert.model.checkpoint import write_atomically
from minibert.tasks.examples import TextExamples, stream_texts
from minibert.tasks.pipeline import Pipeline, fine_tuned, pipeline
from minibert.tasks.questions import read_questions
from minibert.tasks.words import WordExamples, stream_words

ROWS_AT_ONCE = 1024  # examples that are read, run and written together
BACKEND_HELP = f"See `minibert backends`. {OWN_HELP}"


def loaded(
    load: Callable[..., Pipeline], folder: Path, base: Path | None, backend: str | None, dtype: str,
    threads: int | None, max_seq_length: int | None,
) -> Pipeline:  # fmt: skip
    """The model in a folder, by `pipeline` or `fine_tuned`; which backend it is on is said."""
    place = fastest_or(backend, threads)
    place.require_dtype(dtype)
    found = load(folder, place, dtype, base=base, max_seq_length=max_seq_length)
    notes.print(f"backend {place.name}: {place.describe()}, {dtype}", markup=False, highlight=False, soft_wrap=True)
    return found


@app.command()
def evaluate(
    folder: Path = typer.Argument(metavar="FOLDER", help="A fine-tuned model with its tokenizer."),
    file: Path = typer.Argument(metavar="FILE", help="Labelled examples, in a format that `finetune` takes."),
    json_file: Path = typer.Option(None, "--json", help="Write the figures to this file too."),
    text_column: str = typer.Option(None, show_default="guessed", help="Column of the text."),
    pair_column: str = typer.Option(None, show_default="guessed", help="Column of a second text."),
    label_column: str = typer.Option(None, show_default="guessed", help="Column of the label."),
    token_column: str = typer.Option(None, show_default="the first", help="Column of the words, to tag."),
    label_separator: str = typer.Option(None, help="Cuts a label into several."),
    group_column: str = typer.Option(None, help="Column by whose values the metrics are given too."),
    max_seq_length: int = typer.Option(None, min=3, show_default="the model's", help="Tokens of a sequence at most."),
    base: Path = typer.Option(None, show_default="as it says", help="Folder of the model that an adapter is of."),
    batch_tokens: int = typer.Option(4096, min=1, help="Tokens of one pass."),
    backend: str = typer.Option(None, *BACKENDS, show_default="the fastest here", help=BACKEND_HELP),
    dtype: str = typer.Option("float32", help=DTYPE_HELP),
    threads: int = typer.Option(None, min=1, max=MOST_THREADS, show_default="all cores", help="Threads."),
) -> None:
    """How good a fine-tuned model is on labelled examples, matched with its labels by name."""
    refuse_unwritable(json=json_file)
    model = loaded(fine_tuned, folder, base, backend, dtype, threads, max_seq_length)
    columns = Columns(text_column, pair_column, label_column, label_separator, token_column)
    part = prepared(model.task, model.kind, file, columns, model.tokenizer, model.max_seq_length)
    if note := note_of(part.examples):
        notes.print(note, markup=False, highlight=False, soft_wrap=True)
    results = judged(model.task, model.model, part, batch_tokens, group_column, prefix="eval")
    if json_file is not None:
        text = json.dumps({**results, "machine": machine()}, indent=2) + "\n"
        write_atomically(json_file, lambda path: path.write_text(text, encoding="utf-8"))


@app.command()
def predict(
    folder: Path = typer.Argument(metavar="FOLDER", help="A fine-tuned model with its tokenizer."),
    file: Path | None = typer.Argument(None, metavar="[FILE]", help="Without labels; if none, standard input."),
    output: Path | None = typer.Option(None, "--output", help="A .jsonl or .csv file; if none, standard output."),
    format: str | None = typer.Option(None, help="Of standard input: txt (a text a line), jsonl, csv, tsv, conllu."),
    text_column: str = typer.Option(None, show_default="guessed", help="Column of the text."),
    pair_column: str = typer.Option(None, show_default="guessed", help="Column of a second text."),
    token_column: str = typer.Option(None, show_default="the first", help="Column of the words, to tag."),
    max_seq_length: int = typer.Option(None, min=3, show_default="the model's", help="Tokens of a sequence at most."),
    base: Path = typer.Option(None, show_default="as it says", help="Folder of the model that an adapter is of."),
    batch_tokens: int = typer.Option(4096, min=1, help="Tokens of one pass."),
    backend: str = typer.Option(None, *BACKENDS, show_default="the fastest here", help=BACKEND_HELP),
    dtype: str = typer.Option("float32", help=DTYPE_HELP),
    threads: int = typer.Option(None, min=1, max=MOST_THREADS, show_default="all cores", help="Threads."),
) -> None:
    """What a fine-tuned model makes of texts, words or questions: a row for each, in their order."""
    if output is not None and output.suffix not in (".jsonl", ".csv"):
        raise UserError(f"--output: expected a name that ends in .jsonl or .csv, got {output}")
    if output is not None and output.exists():
        raise UserError(f"--output: {output} exists: name another file")
    if output is not None and not output.resolve().parent.is_dir():
        raise UserError(f"--output: there is no folder {output.resolve().parent}; make it first")
    model = loaded(pipeline, folder, base, backend, dtype, threads, max_seq_length)
    source: Any = file
    if file is None:  # without its buffer, which a thread that waits for a line would hold when the program ends
        source = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
    if file is None and format is None:
        format = "json" if model.kind == "answer" else "txt"
    columns = Columns(text_column, pair_column, token_column=token_column)

    def rows() -> Iterator[dict[str, Any]]:
        for examples in in_parts(model.kind, source, columns, format):
            yield from model.of_examples(examples, batch_tokens)

    if output is None:
        for row in rows():
            print(json.dumps(row, ensure_ascii=False), flush=True)
        return
    write_atomically(output, lambda path: written(path, output.suffix, rows()))


def in_parts(kind: str, source: Any, columns: Columns, format: str | None) -> Iterator[Any]:
    """Examples without labels, some at a time, as they come. Questions come together: their windows share contexts."""
    options = {**columns.of(kind), "labelled": False}
    parts = equal_parts if isinstance(source, Path) else as_they_come
    if kind == "answer":
        yield read_questions(source, labelled=False, format=format)
        return
    if kind == "tag":
        note, sentences = stream_words(source, **options, format=format)
        for some in parts(sentences):
            yield WordExamples(name_of(source), note, some)
        return
    taken, texts = stream_texts(source, kind, **options, format=format)
    for some in parts(texts):
        yield TextExamples.of(name_of(source), taken, some)


def equal_parts(rows: Iterator[Any]) -> Iterator[list[Any]]:
    while part := list(islice(rows, ROWS_AT_ONCE)):
        yield part


def as_they_come(rows: Iterator[Any]) -> Iterator[list[Any]]:
    """At least one row, and what else has come by then: a line that is typed is answered at once, and of what flows in
    while the model is at work much goes through together."""
    came: Queue[Any] = Queue(ROWS_AT_ONCE)

    def read() -> None:
        try:
            for row in rows:
                came.put(row)
            came.put(None)
        except Exception as error:
            came.put(error)

    Thread(target=read, daemon=True).start()
    while True:
        part = [came.get()]
        part += [came.get() for _ in range(came.qsize())]
        end = part.pop() if part[-1] is None or isinstance(part[-1], Exception) else part
        if part:
            yield part
        if isinstance(end, Exception):
            raise end
        if end is None:
            return


def written(path: Path, suffix: str, rows: Iterator[dict[str, Any]]) -> None:
    """JSON lines; or a CSV, whose cells hold what is no text or number as JSON."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        table: csv.DictWriter[str] | None = None
        for row in rows:
            if table is None:
                table = csv.DictWriter(file, list(row))
                table.writeheader()
            table.writerow({k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in row.items()})
