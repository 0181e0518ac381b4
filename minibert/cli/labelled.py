"""Labelled examples as commands are told of them: a file, the columns in it, and the task that they set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from minibert.errors import UserError
from minibert.tasks.embedding_task import Embed
from minibert.tasks.examples import TextExamples, read_texts
from minibert.tasks.finetune import names_for
from minibert.tasks.questions import read_questions
from minibert.tasks.task import Answer, Classify, Tag, Task, own_names
from minibert.tasks.words import read_words

EMBED = "embed"
TASKS = ("classify", "regress", "tag", "answer", EMBED)
MLM, RTD = UNLABELLED = "mlm", "rtd"  # masked language model; replaced-token detection


class Columns(NamedTuple):
    """Names of columns, where they are not to be guessed."""

    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    label_separator: str | None = None
    token_column: str | None = None
    negative_column: str | None = None

    def of(self, kind: str) -> dict[str, Any]:
        """Those that files of a task have. Raises UserError for another one that was given."""
        for name, given in self._asdict().items():
            if given is not None and name not in COLUMNS[kind]:
                option = name.replace("_", "-")
                having = " or ".join(task for task, names in COLUMNS.items() if name in names)
                raise UserError(f"--{option}: expected with {having}, got it with {kind}: leave it out")
        return {name: getattr(self, name) for name in COLUMNS[kind]}


COLUMNS = {
    "classify": ("text_column", "pair_column", "label_column", "label_separator"),
    "regress": ("text_column", "pair_column", "label_column"),
    "tag": ("token_column", "label_column"),
    "answer": (),
    "embed": ("text_column", "pair_column", "negative_column", "label_column"),
}


class Labelled(NamedTuple):
    """What a step trains, and the labelled examples that it is told of."""

    task: str = MLM
    train: Path | None = None
    columns: Columns = Columns()

    def refuse_unfit(self, text: list[Path] | None) -> None:
        """Raise UserError for options that do not go together."""
        if self.task not in (*UNLABELLED, *TASKS):
            raise UserError(f"--task: expected {', '.join((*UNLABELLED, *TASKS))}, got {self.task!r}")
        if self.train is None:
            for name, value in self.columns._asdict().items():
                if value is not None:
                    option = name.replace("_", "-")
                    raise UserError(f"--{option}: expected --train FILE with it: it is about its columns")
        elif self.task in UNLABELLED:
            raise UserError(f"--train: labelled examples are for --task {', '.join(TASKS)}: name one of them")
        elif text:
            raise UserError("--text: the examples are those of --train: leave one of the two out")


def labelled(
    task: Annotated[str, typer.Option(help=f"What the step trains: {', '.join((*UNLABELLED, *TASKS))}.")] = MLM,
    train: Annotated[
        Path | None,
        typer.Option(
            show_default="made from the text",
            help=f"Labelled examples, for --task {'|'.join(TASKS)}: a file that `minibert finetune` takes.",
        ),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(show_default="guessed", help="Column of --train: the text.")
    ] = None,
    pair_column: Annotated[str | None, typer.Option(show_default="guessed", help="The same: a second text.")] = None,
    label_column: Annotated[str | None, typer.Option(show_default="guessed", help="The same: the label.")] = None,
    label_separator: Annotated[str | None, typer.Option(help="Cuts a label of --train into several.")] = None,
    token_column: Annotated[
        str | None, typer.Option(show_default="the first", help="The same: the words, to tag.")
    ] = None,
    negative_column: Annotated[
        str | None, typer.Option(show_default="guessed", help="The same: to embed, a text that is no pair.")
    ] = None,
) -> Labelled:
    """What the options of commands that take a step say of it."""
    columns = Columns(text_column, pair_column, label_column, label_separator, token_column, negative_column)
    return Labelled(task, train, columns)


def read_examples(kind: str, path: Path, columns: Columns) -> Any:
    """The labelled examples of a file for a task."""
    options = columns.of(kind)
    if kind == "answer":
        return read_questions(path)
    return read_words(path, **options) if kind == "tag" else read_texts(path, kind, **options)


def note_of(examples: Any) -> str:
    """Which column was taken as what."""
    return examples.columns.note if isinstance(examples, TextExamples) else getattr(examples, "note", "")


def task_for(kind: str, examples: Any, folder: Path | None) -> Task:
    """The task, with the labels of the model in the folder, if there is one, where they are those of the examples."""
    if kind == "answer":
        return Answer()
    if kind == "embed":
        return Embed.of(examples, folder)
    names = own_names(examples) if folder is None else names_for(examples, folder, Tag if kind == "tag" else Classify)
    return Tag(names) if kind == "tag" else Classify.of(examples, names)
