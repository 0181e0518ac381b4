"""`minibert embed`: a vector for each line of text. `minibert similarity`: how alike lines of text are."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import typer

from minibert.backends import MOST_THREADS
from minibert.cli import app
from minibert.cli.compiling import show_compiling
from minibert.cli.options import BACKENDS, DTYPE_HELP, OWN_HELP, notes, refuse_unwritable, takes_options_of
from minibert.cli.running import fastest_or
from minibert.data.lines import Source, name_of, text_lines
from minibert.errors import UserError
from minibert.model.checkpoint import write_atomically
from minibert.model.sentence_config import POOLINGS
from minibert.tasks.sentences import BATCH_TOKENS, Embedded, SentenceTransformer

TOKENS = typer.Option(BATCH_TOKENS, min=1, help="Tokens of a batch, packed.")
STDIN = "-"
ROWS = 256  # that are compared at once


def load(
    model: Path = typer.Option(..., "--model", help="A folder of sentence-transformers, or any BERT's."),
    pooling: str = typer.Option(
        None, show_default="as the folder says", help=f"{' or '.join(POOLINGS)}: how tokens become one vector."
    ),
    normalize: bool = typer.Option(
        None, "--normalize/--no-normalize", show_default="as the folder says", help="Vectors of length 1."
    ),
    backend: str = typer.Option(
        None, *BACKENDS, show_default="the fastest here", help=f"See `minibert backends`. {OWN_HELP}"
    ),
    dtype: str = typer.Option("float32", help=f"{DTYPE_HELP} Vectors are float32 always."),
    threads: int = typer.Option(
        None, min=1, max=MOST_THREADS, show_default="all cores", help="Threads of kernels and BLAS."
    ),
) -> SentenceTransformer:
    """The encoder that the options name on its backend, and a line on stderr that says which and how it pools."""
    place = fastest_or(backend, threads)
    place.require_dtype(dtype)
    encoder = SentenceTransformer.from_pretrained(model, place, dtype, pooling=pooling, normalize=normalize)
    say(f"backend {place.name}: {place.describe()}, {dtype}")
    say(f"model {model}: {encoder.config}, {encoder.model.max_seq_length} tokens of a text at most")
    return encoder


@app.command()
@takes_options_of(load)
def embed(
    text: str = typer.Argument(STDIN, metavar="[FILE]", help="Text in UTF-8, one a line; - is standard input."),
    output: Path = typer.Option(
        None, show_default="JSON lines on standard output", help="A file that ends in .jsonl, or .npy: (n, C) float32."
    ),
    prompt_name: str = typer.Option(
        None, show_default="the folder's own", help="What is put before each text, by its name in the folder."
    ),
    batch_tokens: int = TOKENS,
    **of_encoder: Any,
) -> None:
    """Write a vector for each line of text, in the order of the lines."""
    write, lines = writer_for(output, {".npy": write_npy, ".jsonl": write_jsonl}), lines_of(text)
    encoder = load(**of_encoder)
    counted = Counted(encoder, batch_tokens, prompt_name)
    with show_compiling():
        write((line, embedded.vector) for line, embedded in counted.through(lines))
    counted.say(output)


@app.command()
@takes_options_of(load)
def similarity(
    text: str = typer.Argument(metavar="FILE", help="Text in UTF-8, one a line; - is standard input."),
    other: str = typer.Argument(None, metavar="[OTHER]", show_default="FILE itself", help="What it is compared with."),
    pairs: bool = typer.Option(False, "--pairs", help="Line 1 with line 1, 2 with 2 ..., instead of all with all."),
    output: Path = typer.Option(
        None, show_default="lines on standard output, four digits", help="A file that ends in .tsv, or .npy: float32."
    ),
    batch_tokens: int = TOKENS,
    **of_encoder: Any,
) -> None:
    """How alike each line of FILE is to each of OTHER: a row of cosines for each line of FILE."""
    if pairs and other is None:
        raise UserError("--pairs compares two files line by line: name the second one")
    if text == other == STDIN:
        raise UserError("standard input can be read once: name a file for one of the two")
    write = writer_for(output, {".npy": write_npy, ".tsv": write_tsv})
    lines, others = lines_of(text), None if other is None else lines_of(other)
    encoder = load(**of_encoder)
    counted = Counted(encoder, batch_tokens, None)
    with show_compiling():
        right = np.stack(list(counted.vectors(lines if others is None else others)))
        left: Iterable[np.ndarray] = right if others is None else counted.vectors(lines)
        write(("", row) for row in compared(encoder, left, right, pairs))
    counted.say(output)


# -------------------------------------------------------------------------------------------------------------- texts


def lines_of(text: str) -> Iterator[str]:
    """The lines of a file or of standard input, without their ends. Raises UserError at once where there is none."""
    source: Source = sys.stdin.buffer if text == STDIN else text
    lines = text_lines(source)
    first = next(lines, None)
    if first is None:
        raise UserError(f"{name_of(source)} is empty: expected text, one a line")
    return (line.removesuffix("\n") for line in chain([first], lines))


def say(line: str) -> None:
    notes.print(line, markup=False, highlight=False, soft_wrap=True)


class Counted:
    """Lines of text through an encoder, and what has gone through."""

    def __init__(self, encoder: SentenceTransformer, batch_tokens: int, prompt_name: str | None) -> None:
        self.encoder, self.batch_tokens, self.prompt_name = encoder, batch_tokens, prompt_name
        encoder.config.prompt(prompt_name)  # an unknown one is refused before the first line is read
        self.texts = self.tokens = self.truncated = 0

    def through(self, lines: Iterable[str]) -> Iterator[tuple[str, Embedded]]:
        """Each line, and what became of it."""
        waiting: deque[str] = deque()  # until the batch that they are in is done

        def read() -> Iterator[str]:
            for line in lines:
                waiting.append(line)
                yield line

        stream = self.encoder.stream(read(), batch_tokens=self.batch_tokens, prompt_name=self.prompt_name)
        for embedded in stream:
            self.texts += 1
            self.tokens += embedded.tokens
            self.truncated += embedded.truncated
            yield waiting.popleft(), embedded

    def vectors(self, lines: Iterable[str]) -> Iterator[np.ndarray]:
        return (embedded.vector for _, embedded in self.through(lines))

    def say(self, output: Path | None) -> None:
        cut = f", {self.truncated:,} of them cut at {self.encoder.model.max_seq_length} tokens" * (self.truncated > 0)
        say(f"{self.texts:,} text{'s' * (self.texts != 1)}{cut}, {self.tokens:,} tokens" + f"; {output}" * bool(output))


def compared(
    encoder: SentenceTransformer, left: Iterable[np.ndarray], right: np.ndarray, pairs: bool
) -> Iterator[np.ndarray]:
    """A row for each vector of `left`: of all of `right`, or of the one beside it."""
    done, vectors = 0, iter(left)
    while block := list(islice(vectors, ROWS)):
        beside = right[done : done + len(block)]
        done += len(block)
        if pairs and len(beside) < len(block):
            raise UserError(f"--pairs: expected files of as many lines, got {len(right)} in the second and more before")
        rows = np.stack(block)
        yield from encoder.similarity_pairwise(rows, beside)[:, None] if pairs else encoder.similarity(rows, right)
    if pairs and done < len(right):
        raise UserError(f"--pairs: expected files of as many lines, got {done} in the first and {len(right)} after")


# ------------------------------------------------------------------------------------------------------------- output

Rows = Iterable[tuple[str, np.ndarray]]  # a line and its vector


def writer_for(output: Path | None, formats: dict[str, Callable[[Any, Rows], None]]) -> Callable[[Rows], None]:
    """What writes rows to a file, whole or not at all, by how its name ends; or as the last of `formats` to stdout.

    Raises UserError for a name that ends otherwise, and for a file that must not be replaced.
    """
    if output is None:
        return lambda rows: list(formats.values())[-1](sys.stdout, rows)
    if output.suffix not in formats:
        raise UserError(f"--output {output}: expected a name that ends in {' or '.join(formats)}")
    refuse_unwritable(**{output.suffix[1:]: output})
    write = formats[output.suffix]
    return lambda rows: write_atomically(output, lambda path: write(path, rows))


def opened(target: Path | TextIO) -> AbstractContextManager[TextIO]:
    return target.open("w", encoding="utf-8") if isinstance(target, Path) else nullcontext(target)


def write_jsonl(target: Path | TextIO, rows: Rows) -> None:
    """A line for each text: {"text": ..., "embedding": [...]}, in as many digits as a float32 has."""
    with opened(target) as file:
        for text, vector in rows:
            numbers = ", ".join(map(str, vector))
            file.write(f'{{"text": {json.dumps(text, ensure_ascii=False)}, "embedding": [{numbers}]}}\n')


def write_tsv(target: Path | TextIO, rows: Rows) -> None:
    with opened(target) as file:
        for _, values in rows:
            file.write("\t".join(f"{value:.4f}" for value in values) + "\n")


def write_npy(path: Path, rows: Rows) -> None:
    """(n, C) float32. NumPy leaves room in the header for a first axis that grows: n is written at the end."""
    with path.open("wb") as file:
        count, columns = 0, 0
        for _, vector in rows:
            if not count:
                columns = len(vector)
                write_header(file, count, columns)
            file.write(vector.astype("<f4").tobytes())
            count += 1
        file.seek(0)
        write_header(file, count, columns)


def write_header(file: Any, rows: int, columns: int) -> None:
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f4", "fortran_order": False, "shape": (rows, columns)}
    )  # fmt: skip
