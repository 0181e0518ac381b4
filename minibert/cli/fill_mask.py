"""`minibert fill-mask`: what a masked language model puts in the place of [MASK]."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from itertools import tee
from pathlib import Path

import typer
from rich.markup import escape

from minibert.backends import MOST_THREADS
from minibert.cli import app
from minibert.cli.compiling import show_compiling
from minibert.cli.embed import STDIN, lines_of, say
from minibert.cli.options import BACKENDS, DTYPE_HELP, OWN_HELP, console, plain_table
from minibert.cli.running import fastest_or
from minibert.data import load_tokenizer
from minibert.errors import UserError
from minibert.tasks.fill_mask import BATCH_TOKENS, Filling, fill_masks, load_masked_lm


@app.command()
def fill_mask(
    folder: Path = typer.Argument(metavar="FOLDER", help="A model with its masked-language-model head and tokenizer."),
    texts: list[str] = typer.Argument(
        None, metavar="[TEXT ...]", help="Each with one [MASK] or several; if none, lines of standard input."
    ),
    file: str = typer.Option(None, help="Texts in UTF-8, one a line; - is standard input."),
    top_k: int = typer.Option(5, min=1, help="Tokens that are shown of each mask, the likeliest first."),
    targets: str = typer.Option(None, metavar="WORD,WORD", help="Only these words; scores are those among all tokens."),
    json_lines: bool = typer.Option(
        False, "--json", help="A JSON object for each text, rather than a table; so it is where output is no terminal."
    ),
    batch_tokens: int = typer.Option(
        None, min=1, show_default=str(BATCH_TOKENS), help="Tokens of a batch, packed; 1 answers each text at once."
    ),
    backend: str = typer.Option(
        None, *BACKENDS, show_default="the fastest here", help=f"See `minibert backends`. {OWN_HELP}"
    ),
    dtype: str = typer.Option("float32", help=DTYPE_HELP),
    threads: int = typer.Option(
        None, min=1, max=MOST_THREADS, show_default="all cores", help="Threads of kernels and BLAS."
    ),
) -> None:
    """Fill each [MASK] of a text with the likeliest tokens; several in a text each by itself."""
    if texts and file is not None:
        raise UserError("expected TEXT or --file, got both: leave one out")
    place = fastest_or(backend, threads)
    place.require_dtype(dtype)
    tokenizer, model = load_tokenizer(folder), load_masked_lm(folder, place, dtype)
    say(f"backend {place.name}: {place.describe()}, {dtype}")
    typed = not texts and file in (None, STDIN) and sys.stdin.isatty()
    if typed:
        say("a text a line, with [MASK] where a word is wanted; Ctrl-D ends")
    wanted = None if targets is None else [word.strip() for word in targets.split(",") if word.strip()]
    given, read = tee(texts or lines_of(file or STDIN))
    filled = fill_masks(
        model, tokenizer, read, top_k, wanted, batch_tokens=batch_tokens or (1 if typed else BATCH_TOKENS)
    )
    show = show_table if console.is_terminal and not json_lines else show_json
    with show_compiling():
        for text, masks in zip(given, filled, strict=True):
            show(text, masks)


def show_json(text: str, masks: list[list[Filling]]) -> None:
    print(json.dumps({"text": text, "masks": masks}, ensure_ascii=False), flush=True)


def show_table(text: str, masks: Iterable[list[Filling]]) -> None:
    console.print(text, style="bold", markup=False, highlight=False, soft_wrap=True)
    for fillings in masks:
        table = plain_table("score", "token", "token_str", "sequence")
        table.columns[-1].overflow = "fold"
        for each in fillings:
            table.add_row(
                f"{each['score']:.4g}", str(each["token"]), escape(each["token_str"]), escape(each["sequence"])
            )
        console.print(table, highlight=False)
