"""Sentences of words, each with a tag: CoNLL, CoNLL-U, JSON lines; plain text for what is to be tagged.

CoNLL: a word a line, its columns separated by tabs or spaces, the word first and the tag last; a blank line ends a
sentence; `-DOCSTART-` lines are passed over. CoNLL-U (universaldependencies.org/format.html): ten columns with names,
here FORM and UPOS; ranges `1-2` and empty nodes `1.1` are passed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from minibert.data.lines import Source, name_of, text_lines
from minibert.data.tokenizer_config import is_text
from minibert.errors import UserError
from minibert.tasks.columns import listed
from minibert.tasks.labels import LabelIds, sorted_names
from minibert.tasks.tables import format_of, open_table, wrong_line

FORMATS = {
    ".conll": "conll", ".txt": "conll", ".bio": "conll", ".iob": "conll", ".iob2": "conll", ".tsv": "conll",
    ".conllu": "conllu", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
}  # fmt: skip
UNLABELLED_FORMATS = FORMATS | {".txt": "txt"}
CONLLU_COLUMNS = ("ID", "FORM", "LEMMA", "UPOS", "XPOS", "FEATS", "HEAD", "DEPREL", "DEPS", "MISC")
GLOBAL_COLUMNS = "# global.columns ="  # CoNLL-U Plus: the names of other columns
WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("ner_tags", "tags", "labels", "pos_tags", "upos")
CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # a word each, as BERT cuts them
# A word of plain text: letters and digits, with marks between them; a Chinese character; any other mark alone.
WORD = re.compile(rf"[{CHINESE}]|(?:(?![{CHINESE}])\w)+(?:['’.&-](?:(?![{CHINESE}])\w)+)*|\S")


class Sentence(NamedTuple):
    """Words with their lines in the file and their tags (None where the file has none), and the text they stand in."""

    words: list[str]
    lines: list[int]
    tags: list[str] | None
    text: str
    spans: list[tuple[int, int]]  # where each word begins and ends in the text, in characters


@dataclass(frozen=True)
class WordExamples:
    """S sentences."""

    name: str  # the file, as messages call it
    note: str  # which column was taken as what
    sentences: list[Sentence]

    def __len__(self) -> int:
        return len(self.sentences)

    def subset(self, rows: np.ndarray) -> WordExamples:
        """Some of the examples, by number."""
        return replace(self, sentences=[self.sentences[row] for row in rows])

    @property
    def words(self) -> list[list[str]]:
        return [sentence.words for sentence in self.sentences]

    @property
    def tags(self) -> list[list[str]]:
        """The tags of each sentence. Raises ValueError where they were not read."""
        if any(sentence.tags is None for sentence in self.sentences):
            raise ValueError("these sentences were read without tags")
        return [sentence.tags or [] for sentence in self.sentences]

    def label_names(self) -> list[str]:
        """The tags that occur, sorted. Raises UserError where there is nothing to tell apart."""
        names = sorted_names(tag for tags in self.tags for tag in tags)
        if len(names) < 2:
            raise UserError(f"{self.name} has only the tag {names[0]!r}: nothing can be learned from it")
        return names

    def targets(self, names: Sequence[str]) -> list[list[int]]:
        """The number of each word's tag among `names`. Raises UserError, naming the line, for another tag."""
        ids = LabelIds(names)
        return [
            [ids(tag, self.name, line) for tag, line in zip(sentence.tags or [], sentence.lines, strict=True)]
            for sentence in self.sentences
        ]


def read_words(source: Source, **options: Any) -> WordExamples:
    """All sentences of a file; the options are those of `stream_words`."""
    note, sentences = stream_words(source, **options)
    return WordExamples(name_of(source), note, list(sentences))


def stream_words(
    source: Source,
    *,
    token_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = True,
    format: str | None = None,
) -> tuple[str, Iterator[Sentence]]:
    """What was taken for what, in a sentence, and the sentences of a file.

    A column of CoNLL is named by its number, counted from 1; of CoNLL-U and JSON by its name. Without `labelled` no
    tags are read, and a .txt file is plain text, a line a sentence. Raises UserError for a file or a line that does
    not fit, and where there is no sentence.
    """
    kind = format_of(source, FORMATS if labelled else UNLABELLED_FORMATS, format)
    if kind in ("jsonl", "json"):
        return json_sentences(source, kind, token_column, label_column, labelled)
    name = name_of(source)
    if kind == "txt":
        lines = (line.rstrip("\n") for line in text_lines(source))
        return "words: cut at spaces and marks", checked(plain_sentences(lines), name)
    read = read_conllu if kind == "conllu" else read_conll
    note, sentences = read(list(text_lines(source)), name, token_column, label_column, labelled)
    return note, checked(sentences, name)


def checked(sentences: Iterator[Sentence], name: str) -> Iterator[Sentence]:
    """The same. Raises UserError where there is none."""
    empty = True
    for sentence in sentences:
        empty = False
        yield sentence
    if empty:
        raise UserError(f"{name} has no words: expected sentences")


def joined(words: Sequence[str], lines: list[int], tags: list[str] | None, glued: Iterable[int] = ()) -> Sentence:
    """A sentence whose words stand with a space between them, but none after those whose places are in `glued`."""
    glued = set(glued)
    pieces = [word if place in glued else word + " " for place, word in enumerate(words)]
    begins = [0]
    for piece in pieces:
        begins.append(begins[-1] + len(piece))
    spans = [(begin, begin + len(word)) for begin, word in zip(begins, words, strict=False)]
    return Sentence(list(words), lines, tags, "".join(pieces).rstrip(" "), spans)


def plain_sentences(lines: Iterable[str]) -> Iterator[Sentence]:
    """A sentence for each line of plain text; a blank line has none of the words, so that answers stay in step."""
    for number, line in enumerate(lines, 1):
        found = list(WORD.finditer(line))
        yield Sentence([m[0] for m in found], [number] * len(found), None, line, [m.span() for m in found])


# ------------------------------------------------------------------------------------------------------------- CoNLL

Sentences = tuple[str, Iterator[Sentence]]


class Line(NamedTuple):
    """A line of columns, and its number in the file."""

    number: int
    cells: list[str]


def read_conll(
    lines: list[str], name: str, token_column: str | None, label_column: str | None, labelled: bool
) -> Sentences:
    """CoNLL. A line that begins with # and opens a sentence is a comment unless it reads as a word with a known tag."""
    rows = [Line(number, cells_of(line)) for number, line in enumerate(lines, 1)]
    certain = [row for row in rows if row.cells and not row.cells[0].startswith(("#", "-DOCSTART-"))]
    if not certain:
        raise UserError(f"{name} has no words: expected a word a line, its columns separated by tabs or spaces")
    width = len(certain[0].cells)
    token = place_of(token_column, "--token-column", 1, width, name)
    label = place_of(label_column, "--label-column", width, width, name) if labelled else None
    if label == token:
        raise UserError(f"{name}, line {certain[0].number}: expected a word and its tag, got one column: "
                        "separate them by a tab or a space")  # fmt: skip
    tags = {"O", *(row.cells[label] for row in certain if label is not None and len(row.cells) == width)}

    def is_comment(row: Line) -> bool:
        fits = len(row.cells) == width and (label is None or row.cells[label] in tags)
        return row.cells[0].startswith("#") and not fits

    def sentences() -> Iterator[Sentence]:
        held: list[Line] = []
        for row in [*rows, Line(len(rows) + 1, [])]:
            if row.cells and row.cells[0].startswith("-DOCSTART-"):
                continue
            if row.cells and not held and is_comment(row):
                continue
            if row.cells and len(row.cells) != width:
                what = f"expected {width} columns, as in line {certain[0].number}, got {len(row.cells)}"
                wrong_line(name, row.number, f"{what}; a blank line separates sentences")
            if row.cells:
                held.append(row)
            elif held:
                words = [line.cells[token] for line in held]
                labels = None if label is None else [line.cells[label] for line in held]
                yield joined(words, [line.number for line in held], labels)
                held = []

    said = f"words: column {token + 1}" + ("" if label is None else f", tags: column {label + 1} of {width}")
    return said, sentences()


def cells_of(line: str) -> list[str]:
    """The columns of a line: at its tabs if it has any, else at spaces. None for a blank line."""
    line = line.rstrip("\n")
    if not line.strip():
        return []
    return [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()


def place_of(given: str | None, option: str, default: int, width: int, name: str) -> int:
    """The place of a column, from 0, by its number from 1."""
    if given is None:
        return default - 1
    if not given.isdecimal() or not 1 <= int(given) <= width:
        raise UserError(f"{name} has {width} columns without names: expected {option} from 1 to {width}, got {given!r}")
    return int(given) - 1


def read_conllu(
    lines: list[str], name: str, token_column: str | None, label_column: str | None, labelled: bool
) -> Sentences:
    """CoNLL-U, and CoNLL-U Plus, whose first line names its columns."""
    plus = lines[0].startswith(GLOBAL_COLUMNS) if lines else False
    columns = lines[0].removeprefix(GLOBAL_COLUMNS).split() if plus else list(CONLLU_COLUMNS)
    token_name, label_name = token_column or "FORM", label_column or "UPOS"
    for option, column in (("--token-column", token_name), ("--label-column", label_name)):
        if column not in columns and (labelled or column == token_name):
            raise UserError(f"{name} has no column {column!r} ({option}): its columns are {listed(columns)}")

    def sentence_of(held: list[dict[str, str]], numbers: list[int]) -> Sentence:
        tags = [cells[label_name] for cells in held] if labelled else None
        glued = [i for i, cells in enumerate(held) if "SpaceAfter=No" in cells.get("MISC", "").split("|")]
        return joined([cells[token_name] for cells in held], numbers, tags, glued)

    def sentences() -> Iterator[Sentence]:
        held: list[dict[str, str]] = []
        numbers: list[int] = []
        for number, line in enumerate([*lines, ""], 1):
            line = line.rstrip("\n")
            if line.startswith("#") and not held:
                continue
            if not line.strip():
                if held:
                    yield sentence_of(held, numbers)
                held, numbers = [], []
                continue
            cells = line.split("\t")
            if len(cells) != len(columns):
                wrong_line(name, number, f"expected {len(columns)} columns separated by tabs, got {len(cells)}")
            row = dict(zip(columns, cells, strict=True))
            if re.fullmatch(r"\d+[-.]\d+", row.get("ID", "")):
                continue  # a range of words written as one, or a word that is not written
            if labelled and label_name in ("UPOS", "XPOS") and row[label_name] == "_":
                wrong_line(name, number, f"the word {row[token_name]!r} has no {label_name}: it is '_'")
            held.append(row)
            numbers.append(number)

    return f"words: column {token_name!r}" + (f", tags: column {label_name!r}" if labelled else ""), sentences()


# -------------------------------------------------------------------------------------------------------------- JSON


def json_sentences(
    source: Source, format: str, token_column: str | None, label_column: str | None, labelled: bool
) -> Sentences:
    """Objects with a list of words and a list of tags; without `labelled`, or a plain text instead of the words."""
    table = open_table(source, format)

    def column(given: str | None, names: tuple[str, ...], option: str) -> str:
        found = [given] if given in table.columns else [] if given else [n for n in names if n in table.columns]
        if len(found) != 1:
            which = f"has {listed(found)}" if found else f"has no {listed([given] if given else list(names))}"
            raise UserError(f"{table.name} {which}; its columns are {listed(table.columns)}: name one with {option}")
        return str(found[0])

    words_in = column(token_column, WORD_COLUMNS if labelled else (*WORD_COLUMNS, "text"), "--token-column")
    tags_in = column(label_column, TAG_COLUMNS, "--label-column") if labelled else None

    def sentences() -> Iterator[Sentence]:
        for line, row in table:
            words = row.get(words_in)
            if isinstance(words, str) and is_text(words) and not labelled:
                (sentence,) = plain_sentences([words])
                yield sentence._replace(lines=[line] * len(sentence.words))
                continue
            if not isinstance(words, list) or not all(is_text(word) for word in words):
                wrong_line(table.name, line, f"expected a list of words in {words_in!r}, got {json.dumps(words)[:60]}")
            if labelled and not words:
                wrong_line(table.name, line, f"{words_in!r} has no words: drop the row")
            yield joined(words, [line] * len(words), None if tags_in is None else tags_of(row, len(words), line))

    def tags_of(row: dict[str, Any], count: int, line: int) -> list[str]:
        tags = row.get(str(tags_in))
        if not isinstance(tags, list) or not all(isinstance(t, str | int) and t != "" for t in tags):
            wrong_line(table.name, line, f"expected a list of tags in {tags_in!r}, got {json.dumps(tags)[:60]}")
        if len(tags) != count:
            wrong_line(table.name, line, f"expected as many tags as words, got {len(tags)} and {count}")
        return [str(tag) for tag in tags]

    said = f"words: column {words_in!r}" + ("" if tags_in is None else f", tags: column {tags_in!r}")
    return said, sentences()
