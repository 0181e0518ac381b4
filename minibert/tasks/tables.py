"""Files of rows: CSV, TSV, JSON lines, a JSON array, and plain text, a row a line.

    table = open_table("reviews.csv")
    table.columns                          # the names in the header
    for line, row in table: ...            # the line of the file where a row begins, and its values by column

Rows come as they are read, so a file may be longer than memory, or be what another program still writes. All text is
UTF-8. What is wrong is a UserError that names the file and the line.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from minibert.data.lines import Source, name_of, text_lines
from minibert.errors import UserError

FORMATS = {
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".txt": "txt",
}  # fmt: skip
LONGEST_FIELD = 2**31 - 1  # csv's own limit of 131072 characters is less than a long document
JSON_SPACE = re.compile(r"[ \t\n\r]*")


class Row(NamedTuple):
    """A row: the line of the file where it begins, counted from 1, and its values by column."""

    line: int
    values: dict[str, Any]  # text in CSV, TSV and plain text; whatever JSON can hold in JSON


@dataclass(frozen=True)
class Table:
    """Rows that are read once, from first to last."""

    name: str  # of the file, as errors call it
    columns: list[str]
    rows: Iterator[Row]

    def __iter__(self) -> Iterator[Row]:
        return self.rows


def format_of(source: Source, formats: dict[str, str] = FORMATS, given: str | None = None) -> str:
    """The format that a file's name tells, or the one `given`. Raises UserError where neither names a known one."""
    known = sorted(set(formats.values()))
    if given is not None:
        if given not in known:
            raise UserError(f"expected a format of {', '.join(known)}, got {given!r}")
        return given
    if not isinstance(source, str | PathLike):
        raise UserError(f"{name_of(source)} has no name that tells its format: say which, {', '.join(known)}")
    suffix = Path(source).suffix.lower()
    if suffix not in formats:
        raise UserError(
            f"cannot tell the format of {source}: expected a name that ends in {', '.join(formats)}; rename it"
        )
    return formats[suffix]


def open_table(source: Source, format: str | None = None) -> Table:
    """The table in a file or a stream, `format` (csv, tsv, jsonl, json, txt) told by the file's name if not given.

    CSV may be separated by commas, semicolons, tabs or bars: by what cuts its header into the most columns. Raises
    UserError for a file that is missing, no text, empty or without a row, at once; and for a bad row when it is read.
    """
    name = name_of(source)
    lines = text_lines(source)
    read = READERS[format_of(source, given=format)]
    columns, rows = read(lines, name)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{name} has a header and no row: expected rows below it")
    return Table(name, columns, chain([first], rows))


def wrong_line(name: str, line: int, what: str) -> NoReturn:
    raise UserError(f"{name}, line {line}: {what}")


# ------------------------------------------------------------------------------------------------------- CSV and TSV

Read = tuple[list[str], Iterator[Row]]


def delimiter_of(header: str) -> str:
    """What cuts a line into the most columns, a comma where several do; marks within quotes cut nothing."""
    return max(",;\t|", key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter))))


def read_csv(lines: Iterator[str], name: str) -> Read:
    """CSV (RFC 4180): quoted fields may hold delimiters, doubled quotes and line ends."""
    skipped, first = first_line(lines, name)
    csv.field_size_limit(LONGEST_FIELD)
    delimiter = delimiter_of(first)
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)

    def records() -> Iterator[tuple[int, list[str]]]:
        while True:
            line = skipped + reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                ended = "end of data" in str(error)
                what = "the quote that opens a field is never closed" if ended else "text follows a closing quote"
                wrong_line(name, line, f"{what}: write a quote inside a quoted field twice")
            if cells:
                yield line, cells

    found = records()
    return of_header(next(found)[1], found, name, f"quote a field that holds {delimiter!r}")


def read_tsv(lines: Iterator[str], name: str) -> Read:
    """TSV: a line a row. A line that reads as quoted fields is read so; a stray quote, as in GLUE's files, is text."""
    skipped, first = first_line(lines, name)
    csv.field_size_limit(LONGEST_FIELD)
    header = tab_cells(first, None)

    def records() -> Iterator[tuple[int, list[str]]]:
        for number, line in enumerate(lines, skipped + 2):
            if line.strip():
                yield number, tab_cells(line, len(header))

    return of_header(header, records(), name, "a field of TSV holds no tab and no line end; save it as CSV if one must")


def tab_cells(line: str, width: int | None) -> list[str]:
    """The fields of a line, unquoted where they are quoted and there are `width` of them that way."""
    line = line.rstrip("\n")
    plain = line.split("\t")
    if '"' not in line:
        return plain
    try:
        quoted = next(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error:
        return plain
    return quoted if width is None or len(quoted) == width else plain


def first_line(lines: Iterator[str], name: str) -> tuple[int, str]:
    """How many blank lines come first, and the first that is not. Raises UserError where all are."""
    for skipped, line in enumerate(lines):
        if line.strip():
            return skipped, line
    raise UserError(f"{name} is empty: expected rows")


def of_header(header: list[str], records: Iterator[tuple[int, list[str]]], name: str, advice: str) -> Read:
    """Rows under the names of a header. A column without a name, as pandas writes its index, is `column N`."""
    columns = [cell.strip() or f"column {i}" for i, cell in enumerate(header, 1)]
    twice = next((column for i, column in enumerate(columns) if column in columns[:i]), None)
    if twice is not None:
        raise UserError(f"{name} names the column {twice!r} twice: rename one")

    def rows() -> Iterator[Row]:
        for line, cells in records:
            if len(cells) != len(columns):
                what = f"expected {len(columns)} columns, as in the header, got {len(cells)}"
                wrong_line(name, line, f"{what}: {advice}")
            yield Row(line, dict(zip(columns, cells, strict=True)))

    return columns, rows()


# -------------------------------------------------------------------------------------------------------------- JSON


def read_jsonl(lines: Iterator[str], name: str) -> Read:
    """A JSON object a line; the columns are the keys of the first."""

    def rows() -> Iterator[Row]:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Row(number, json_object(line, name, number))

    return of_keys(rows(), name)


def read_json(lines: Iterator[str], name: str) -> Read:
    """An array of JSON objects; or lines of them, as many a file called .json holds."""
    skipped, first = first_line(lines, name)
    if not first.lstrip().startswith("["):
        return read_jsonl(chain(["\n"] * skipped, [first], lines), name)
    text = "\n" * skipped + "".join(chain([first], lines))

    def rows() -> Iterator[Row]:
        decoder = json.JSONDecoder()
        place, line, counted = text.index("[") + 1, 1, 0
        mark = ","
        while mark == ",":
            place = JSON_SPACE.match(text, place).end()  # type: ignore[union-attr]
            line, counted = line + text.count("\n", counted, place), place
            if text[place : place + 1] == "]":
                return
            try:
                value, place = decoder.raw_decode(text, place)
            except (json.JSONDecodeError, RecursionError) as error:
                at = getattr(error, "lineno", line)
                wrong_line(name, at, f"no JSON: {getattr(error, 'msg', 'nested too deeply')}")
            yield Row(line, checked_object(value, name, line))
            place = JSON_SPACE.match(text, place).end()  # type: ignore[union-attr]
            mark = text[place : place + 1]
            place += 1
        if mark != "]":
            wrong_line(name, 1 + text.count("\n", 0, place), "expected ',' or ']' after an object of the array")

    return of_keys(rows(), name)


def of_keys(rows: Iterator[Row], name: str) -> Read:
    first = next(rows, None)
    if first is None:
        raise UserError(f"{name} is empty: expected rows")
    return list(first.values), chain([first], rows)


def json_object(text: str, name: str, line: int) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else unreadable(error)
        wrong_line(name, line, f"no JSON: {what}")
    return checked_object(value, name, line)


def unreadable(error: Exception) -> str:
    """Why Python does not read what is JSON by its grammar."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"


def checked_object(value: Any, name: str, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        wrong_line(name, line, f'expected a JSON object, as {{"text": "..."}}, got {type(value).__name__}')
    return value


def read_text_lines(lines: Iterator[str], name: str) -> Read:
    """Plain text: each line is a row with one column, `text`; a blank one too, so that answers stay in step."""
    rows = (Row(number, {"text": line.rstrip("\n")}) for number, line in enumerate(lines, 1))
    first = next(rows, None)
    if first is None:
        raise UserError(f"{name} is empty: expected text")
    return ["text"], chain([first], rows)


READERS: dict[str, Callable[[Iterator[str], str], Read]] = {
    "csv": read_csv, "tsv": read_tsv, "jsonl": read_jsonl, "json": read_json, "txt": read_text_lines,
}  # fmt: skip
