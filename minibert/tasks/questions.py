"""Questions about a context, with the answers in it: SQuAD's JSON, versions 1.1 and 2, and flat tables.

SQuAD: data, paragraphs, qas, nested (Rajpurkar et al. 2016, 2018). A flat row has question, context and, when it is to
be learned from, answers: as Hugging Face's data sets have them, {"text": [...], "answer_start": [...]}; a list of
{"text", "answer_start"}; or in a CSV a column `answer` beside one called `answer_start`. No answer means that the
context has none.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from minibert.data.lines import Source, name_of, text_lines
from minibert.data.tokenizer_config import is_text
from minibert.errors import UserError
from minibert.tasks.columns import listed
from minibert.tasks.tables import FORMATS, format_of, open_table, unreadable

SHOWN = 60  # characters of an answer that a message shows


class Answer(NamedTuple):
    """A text and where it begins in its context, in characters."""

    text: str
    start: int


class Question(NamedTuple):
    """A question about a context. Of several answers each is right; none means that there is none in the context."""

    id: str
    question: str
    context: str
    answers: list[Answer]


@dataclass(frozen=True)
class QuestionExamples:
    """S questions, in the order of the file."""

    name: str  # the file, as messages call it
    questions: list[Question]

    def __len__(self) -> int:
        return len(self.questions)

    def subset(self, rows: np.ndarray) -> QuestionExamples:
        """Some of the examples, by number."""
        return replace(self, questions=[self.questions[row] for row in rows])

    @property
    def contexts(self) -> list[str]:
        return [question.context for question in self.questions]

    @property
    def answers(self) -> list[list[str]]:
        """The right answers to each question: what predictions are judged by."""
        return [[answer.text for answer in question.answers] for question in self.questions]

    @property
    def answer_spans(self) -> list[tuple[int, int] | None]:
        """Where the first answer to each question stands in its context: what is trained on, as in Hugging Face's."""
        firsts = [question.answers[0] if question.answers else None for question in self.questions]
        return [None if first is None else (first.start, first.start + len(first.text)) for first in firsts]


def read_questions(source: Source, *, labelled: bool = True, format: str | None = None) -> QuestionExamples:
    """All questions of a file. Raises UserError where one of them does not fit, an answer does not stand where it is
    said to stand, an id comes twice, or none is there.

    Without `labelled` no answers are read.
    """
    name = name_of(source)
    kind = format_of(source, {key: value for key, value in FORMATS.items() if value != "txt"}, format)
    if kind == "json":  # one document, an array, or lines of objects: only the whole tells
        text = "".join(text_lines(source))
        document = document_in(text, name)
        found = (
            flat(io.BytesIO(text.encode()), name, kind, labelled) if document is None else nested(document, labelled)
        )
    else:
        found = flat(source, name, kind, labelled)
    questions, seen = [], set()
    for where, question in found:
        if isinstance(question, str):
            raise UserError(f"{name}, {where}: {question}")
        if question.id in seen:
            raise UserError(f"{name}, {where}: the id {question.id!r} came before: give each question its own")
        seen.add(question.id)
        questions.append(question)
    if not questions:
        raise UserError(f"{name} has no questions: expected data, paragraphs and qas, as SQuAD has them")
    return QuestionExamples(name, questions)


Found = Iterator[tuple[str, Question | str]]  # where in the file; a question, or what is wrong there


def document_in(text: str, name: str) -> list[Any] | None:
    """The list `data` of a SQuAD document; None where the text is an array or lines of objects instead."""
    if text.lstrip().startswith("["):
        return None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":
            return None
        what = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else unreadable(error)
        raise UserError(f"{name} is no JSON: {what}") from None
    if not isinstance(document, dict) or not isinstance(document.get("data"), list):
        return None
    return list(document["data"])


def nested(data: list[Any], labelled: bool) -> Found:
    """The questions of data / paragraphs / qas; an entry of data may be a flat row too."""
    for number, entry in enumerate(data):
        where = f"data[{number}]"
        if isinstance(entry, dict) and "paragraphs" not in entry:
            yield where, question_in(entry, str(number), labelled)
            continue
        paragraphs = entry.get("paragraphs") if isinstance(entry, dict) else None
        if not isinstance(paragraphs, list):
            yield where, "expected an object with a list of paragraphs"
            continue
        for inner, paragraph in enumerate(paragraphs):
            place = f"{where}.paragraphs[{inner}]"
            if not isinstance(paragraph, dict) or not isinstance(paragraph.get("qas"), list):
                yield place, "expected an object with a context and a list of qas"
                continue
            for last, qa in enumerate(paragraph["qas"]):
                row = {**qa, "context": paragraph.get("context")} if isinstance(qa, dict) else {}
                yield f"{place}.qas[{last}]", question_in(row, f"{number}.{inner}.{last}", labelled)


def flat(source: Source, name: str, kind: str, labelled: bool) -> Found:
    """The questions of a table."""
    table = open_table(source, kind)
    missing = [column for column in ("question", "context") if column not in table.columns]
    if labelled and not {"answers", "answer", "is_impossible"} & set(table.columns):
        missing.append("answers")
    if missing:
        raise UserError(f"{name} has no column {listed(missing)}: its columns are {listed(table.columns)}")
    for line, row in table:
        yield f"line {line}", question_in(row, str(line), labelled)


def question_in(row: Mapping[str, Any], number: str, labelled: bool) -> Question | str:
    """The question of a row, its id the `number` where it has none; or what is wrong with it."""
    for key in ("question", "context"):
        value = row.get(key)
        if not is_text(value) or not value.strip():
            return f"expected text in {key!r}, got {json.dumps(value)[:SHOWN]}"
    context = str(row["context"])
    found = answers_in(row) if labelled else []
    if isinstance(found, str):
        return found
    for answer in found:
        if wrong := misplaced(answer, context):
            return wrong
    return Question(str(row.get("id", number)), str(row["question"]), context, found)


def answers_in(row: Mapping[str, Any]) -> list[Answer] | str:
    """The answers of a row, or what is wrong with how they are written."""
    given = row.get("answers", row.get("answer"))
    if row.get("is_impossible") in (True, "true", "True", "1") or given in (None, "", []):
        return []
    if isinstance(given, dict):
        texts, starts = given.get("text"), given.get("answer_start")
    elif isinstance(given, str):
        texts, starts = [given], [row.get("answer_start", "")]
    elif isinstance(given, list) and all(isinstance(each, dict) for each in given):
        texts, starts = [each.get("text") for each in given], [each.get("answer_start") for each in given]
    else:
        texts, starts = None, None
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return f"expected answers with text and answer_start, got {json.dumps(given)[:SHOWN]}"
    answers = []
    for text, start in zip(texts, starts, strict=True):
        if not is_text(text) or not text.strip():
            return f"expected an answer's text, got {json.dumps(text)[:SHOWN]}: an unanswerable question has no answers"
        if isinstance(start, str) and start.strip().isdecimal():
            start = int(start)
        if not isinstance(start, int) or isinstance(start, bool):
            return f"expected answer_start, the character of the context where {text[:SHOWN]!r} begins, got {start!r}"
        answers.append(Answer(text, start))
    return answers


def misplaced(answer: Answer, context: str) -> str | None:
    """What is wrong with where an answer is said to stand."""
    text, start = answer
    if start >= 0 and context.startswith(text, start):
        return None
    there = context[max(start, 0) : max(start, 0) + len(text)][:SHOWN]
    elsewhere = context.find(text)
    hint = f"it stands at {elsewhere}" if elsewhere >= 0 else "its context does not hold it"
    return f"expected the answer {text[:SHOWN]!r} at answer_start {start}, got {there!r}: {hint}"
