"""Labelled texts: one text or a pair, and a class, several classes, or a number; pairs and triplets for embeddings.

    train = read_texts("reviews.csv", "classify")
    train.columns.note           # "text: column 'review', label: column 'stars'"
    train.problem_type           # as Hugging Face names it, from how the labels are written, never from their values
    names = train.label_names()
    train.targets(names)         # (S,) int64, (S, K) float32 for several classes, (S,) float32 for numbers

Words with tags are read by `words.py`, questions by `questions.py`.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from minibert.data.lines import Source, name_of
from minibert.data.tokenizer_config import is_text
from minibert.errors import UserError
from minibert.model.config import PROBLEM_TYPES
from minibert.tasks.columns import Columns, find_columns, listed
from minibert.tasks.labels import class_ids, class_sets, number_in, sorted_names
from minibert.tasks.tables import open_table, wrong_line

REGRESSION, SINGLE, MULTI = PROBLEM_TYPES
TASKS = ("classify", "regress", "embed")
LARGEST = 1e15  # number to be predicted: float32 can add up the squares of a thousand
MOST_NUMBERS = 20  # different decimal numbers that may be names of classes: half stars are 10

Label = str | list[str] | float


class TextExample(NamedTuple):
    """One row: a text, perhaps its pair and a negative, its label, and the row as the file has it."""

    line: int
    text: str
    pair: str | None
    negative: str | None
    label: Label | None
    row: dict[str, Any]


@dataclass(frozen=True)
class TextExamples:
    """S examples, column by column. `pairs`, `negatives` and `labels` are None where the file has no such column."""

    name: str  # the file, as messages call it
    columns: Columns
    problem_type: str | None  # of Hugging Face's config; None without labels
    lines: list[int]
    texts: list[str]
    pairs: list[str] | None
    negatives: list[str] | None
    labels: list[Any] | None  # names of classes; lists of them; or numbers
    rows: list[dict[str, Any]]

    @classmethod
    def of(cls, name: str, columns: Columns, found: list[TextExample], problem_type: str | None = None) -> TextExamples:
        """Rows, column by column."""
        return cls(
            name=name,
            columns=columns,
            problem_type=problem_type,
            lines=[example.line for example in found],
            texts=[example.text for example in found],
            pairs=None if columns.pair is None else [str(example.pair) for example in found],
            negatives=None if columns.negative is None else [str(example.negative) for example in found],
            labels=None if columns.label is None else [example.label for example in found],
            rows=[example.row for example in found],
        )

    def __len__(self) -> int:
        return len(self.texts)

    def label_names(self) -> list[str]:
        """The classes that occur, sorted: numbers by size. Raises UserError where there is nothing to tell apart."""
        if self.labels is None or self.problem_type == REGRESSION:
            raise ValueError("only labels that are classes have names")
        several = self.problem_type == MULTI
        names = sorted_names(name for label in self.labels for name in (label if several else [label]))
        if len(names) < (1 if several else 2):
            raise UserError(f"{self.name} has {'only the label ' + repr(names[0]) if names else 'no label'}: "
                            "nothing can be learned from it")  # fmt: skip
        numbers = [number_in(name) for name in names]
        decimal = [number for number in numbers if number is not None and not number.is_integer()]
        if not several and None not in numbers and decimal and len(names) > MOST_NUMBERS:
            raise UserError(
                f"{self.name}: the column {self.columns.label!r} holds {len(names)} different decimal numbers: "
                "expected classes; to predict numbers, use regress"
            )
        return names

    def targets(self, names: list[str]) -> np.ndarray:
        """What is to be predicted: (S,) int64 for one class, (S, K) float32 for several, (S,) float32 for numbers.

        `names` are the model's K classes (ignored for numbers). Raises UserError, naming the line, for another label,
        and for a number so large that its squared error is beyond float32.
        """
        if self.labels is None:
            raise ValueError("these examples were read without labels")
        if self.problem_type == REGRESSION:
            for number, line in zip(self.labels, self.lines, strict=True):
                if abs(number) > LARGEST:
                    wrong_line(self.name, line, f"expected a number of at most {LARGEST:g}, got {number:g}: divide all")
            return np.array(self.labels, dtype=np.float32)
        return (class_sets if self.problem_type == MULTI else class_ids)(self.labels, names, self.name, self.lines)

    def subset(self, rows: np.ndarray) -> TextExamples:
        """Some of the examples, by number."""

        def some(values: Any) -> Any:
            return None if values is None else [values[row] for row in rows]

        columns = ("lines", "texts", "pairs", "negatives", "labels", "rows")
        return replace(self, **{name: some(getattr(self, name)) for name in columns})

    def groups(self, column: str) -> list[str]:
        """The values of any column as text, for figures by group. Raises UserError where there is no such column."""
        if column not in self.rows[0]:
            raise UserError(f"{self.name} has no column {column!r}: its columns are {listed(list(self.rows[0]))}")
        return [value if isinstance(value := row.get(column), str) else json.dumps(value) for row in self.rows]


def stream_texts(
    source: Source,
    task: str,
    *,
    text_column: str | None = None,
    pair_column: str | None = None,
    negative_column: str | None = None,
    label_column: str | None = None,
    label_separator: str | None = None,
    labelled: bool = True,
    format: str | None = None,
) -> tuple[Columns, Iterator[TextExample]]:
    """The columns of a table, as named or guessed (`columns.py`), and its examples as they are read.

    `task` is classify, regress or embed. A JSON list as label, or a `label_separator` to cut one by, means several
    classes at once. Without `labelled`, labels are not read and a text may be empty. Raises UserError for a file or a
    row that does not fit, naming its line.
    """
    if task not in TASKS:
        raise ValueError(f"expected a task of {', '.join(TASKS)}, got {task!r}")
    if label_separator == "":
        raise UserError("label_separator: expected what stands between two labels, got nothing")
    table = open_table(source, format)
    columns = find_columns(
        table.columns, table.name, task, text=text_column, pair=pair_column, label=label_column,
        negative=negative_column, labelled=labelled,
    )  # fmt: skip

    def examples() -> Iterator[TextExample]:
        for line, row in table:
            text = text_in(row, columns.text, table.name, line, may_be_empty=not labelled)
            pair, negative = (
                None if column is None else text_in(row, column, table.name, line, may_be_empty=not labelled)
                for column in (columns.pair, columns.negative)
            )
            label: Label | None = None
            if columns.label is not None:
                value = row.get(columns.label)
                if value is None or (isinstance(value, str) and not value.strip() and label_separator is None):
                    wrong_line(table.name, line, f"no label in the column {columns.label!r}: add it, or drop the row")
                label = class_of(value, label_separator) if task == "classify" else number_of(value)
                if label is None:
                    expected = "a name or a list of names" if task == "classify" else "a finite number"
                    shown = reprlib.repr(value)
                    wrong_line(table.name, line, f"expected {expected} in the column {columns.label!r}, got {shown}")
            yield TextExample(line, text, pair, negative, label, row)

    return columns, examples()


def read_texts(source: Source, task: str, **options: Any) -> TextExamples:
    """All examples of a file; the options are those of `stream_texts`.

    Raises UserError too where some rows have a list of classes and others one.
    """
    columns, stream = stream_texts(source, task, **options)
    found = list(stream)
    name = name_of(source)
    several = isinstance(found[0].label, list)
    for example in found:
        if isinstance(example.label, list) != several:
            kinds = ("one label", "a list") if several else ("a list", "one label")
            wrong_line(name, example.line, f"{kinds[0]} where the rows before have {kinds[1]}: write all alike")
    kind = REGRESSION if task != "classify" else MULTI if several else SINGLE
    return TextExamples.of(name, columns, found, None if columns.label is None else kind)


def text_in(row: dict[str, Any], column: str, name: str, line: int, may_be_empty: bool) -> str:
    """The text of a row. Raises UserError where it is none, or is empty and may not be."""
    text = row.get(column)
    if not is_text(text):
        what = "half of a surrogate pair" if isinstance(text, str) else json.dumps(text)
        wrong_line(name, line, f"expected text in the column {column!r}, got {what}")
    if not may_be_empty and not text.strip():
        wrong_line(name, line, f"the column {column!r} is empty: expected text; drop the row if there is none")
    return str(text)


def class_of(value: Any, separator: str | None) -> str | list[str] | None:
    """The class that a value names; the list of them for a list or a text that is cut; None for anything else."""
    if isinstance(value, list):
        names = [name_in(each) for each in value]
        return None if None in names else list(dict.fromkeys(name for name in names if name is not None))
    if separator is not None and isinstance(value, str):
        return list(dict.fromkeys(part.strip() for part in value.split(separator) if part.strip()))
    return name_in(value)


def name_in(value: Any) -> str | None:
    """A class's name: text without spaces around it; a number or a truth value of JSON as it is written there."""
    if is_text(value) and value.strip():
        return str(value).strip()
    return json.dumps(value) if isinstance(value, int | float) else None


def number_of(value: Any) -> float | None:
    """A finite number, of JSON or written as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    return number_in(str(value))
