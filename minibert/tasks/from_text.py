"""Labelled examples made of plain text, where a step of fine-tuning is wanted and no labelled data are at hand.

Real text and real tokens, labels that can be read off the text; each maker says how. To learn from they are poor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

from minibert.data import Document
from minibert.errors import UserError
from minibert.tasks.columns import Columns
from minibert.tasks.examples import MULTI, REGRESSION, SINGLE, TextExample, TextExamples
from minibert.tasks.questions import Answer, Question, QuestionExamples
from minibert.tasks.task import Classify, Tag, Task
from minibert.tasks.words import WORD, WordExamples, plain_sentences

NAME = "the text"  # what messages call the examples
DOCUMENTS = 4  # that texts are taken from, each alike
CHARACTERS = 4  # of a token, about: a passage is a sequence of the greatest length, or little more or less
AROUND = 4  # words to either side of the one that a question leaves out
UNANSWERABLE = 4  # of so many questions one has no answer


class Made(NamedTuple):
    """Examples, and how their labels were made, in a sentence."""

    examples: Any
    how: str


def examples_of_text(
    kind: str, documents: Sequence[Document], max_seq_length: int, characters: int, like: Task | None = None
) -> Made:
    """Examples for `minibert finetune`'s tasks, from the beginnings of the first documents, so many characters in all.

    Where `like` has labels for such examples, theirs are those. Raises UserError where a text does not do.
    """
    chosen = documents[:DOCUMENTS]
    passages = [passages_of(document, CHARACTERS * max_seq_length, characters // len(chosen)) for document in chosen]
    return MAKERS[kind](passages, like)


def passages_of(document: Document, size: int, characters: int) -> list[list[str]]:
    """Sentences that stand together, some `size` characters of them, until there are so many characters in all."""
    passages: list[list[str]] = [[]]
    held = taken = 0
    for sentence in document:
        if held >= size:
            passages.append([])
            held = 0
        passages[-1].append(sentence)
        held += len(sentence)
        taken += len(sentence)
        if taken >= characters:
            break
    return passages


Passages = list[list[list[str]]]  # of each document, each a list of sentences


def _classes(passages: Passages, like: Task | None) -> Made:
    own = like.names if isinstance(like, Classify) and like.problem_type != REGRESSION else []
    if len(passages) < 2:
        raise UserError(
            "--task classify: expected text of two documents or more, got one: a text's class is the document that it "
            "stands in; give more --text, or labelled examples with --train"
        )
    names = own or [f"document {number}" for number in range(1, len(passages) + 1)]
    kind = MULTI if own and like is not None and like.problem_type == MULTI else SINGLE
    rows = [
        (" ".join(sentences), names[number % len(names)])
        for number, document in enumerate(passages)
        for sentences in document
    ]
    made = _texts([(text, [name] if kind == MULTI else name) for text, name in rows], kind)
    how = f"a text's class is which of {len(passages)} documents it stands in"
    return Made(made, how + (f", counted round the model's {len(own)} labels" if own else ""))


def _numbers(passages: Passages, like: Task | None) -> Made:
    rows = [
        (" ".join(sentences), number / max(len(document) - 1, 1))
        for document in passages
        for number, sentences in enumerate(document)
    ]
    return Made(_texts(rows, REGRESSION), "a text's number is its place in what was taken of its document, from 0 to 1")


def _texts(rows: Sequence[tuple[str, Any]], kind: str) -> TextExamples:
    found = [TextExample(line, text, None, None, label, {}) for line, (text, label) in enumerate(rows, 1)]
    return TextExamples.of(NAME, Columns("text", label="label"), found, kind)


WRITTEN = ("capital", "lower", "mark", "number")  # how a word may be written


def _written(word: str) -> str:
    if word[0].isupper():
        return "capital"
    return "lower" if word[0].isalpha() else "number" if word[0].isdigit() else "mark"


def _tags(passages: Passages, like: Task | None) -> Made:
    own = like.names if isinstance(like, Tag) else []
    names = own or WRITTEN
    tag = {how: names[number % len(names)] for number, how in enumerate(WRITTEN)}
    texts = [" ".join(sentences) for document in passages for sentences in document]
    found = [one._replace(tags=[tag[_written(word)] for word in one.words]) for one in plain_sentences(texts)]
    how = f"a word's tag is how it is written: {', '.join(WRITTEN)}"
    return Made(WordExamples(NAME, "", found), how + (f", counted round the model's {len(own)} labels" if own else ""))


def _pairs(passages: Passages, like: Task | None) -> Made:
    rows = [two for document in passages for two in pairwise(chain.from_iterable(document))]
    if len(rows) < 2:
        raise UserError(
            "--task embed: expected text of three sentences or more in a document, of which each and the next are a "
            "pair; give more --text, or pairs with --train"
        )
    found = [TextExample(line, text, pair, None, None, {}) for line, (text, pair) in enumerate(rows, 1)]
    made = TextExamples.of(NAME, Columns("text", pair="pair"), found)
    return Made(made, "a pair is a sentence and the next one")


def _questions(passages: Passages, like: Task | None) -> Made:
    every = [sentences for document in passages for sentences in document]
    texts = [" ".join(sentences) for sentences in every]
    found = []
    for number, (sentences, text) in enumerate(zip(every, texts, strict=True)):
        middle = len(sentences) // 2
        words = list(WORD.finditer(sentences[middle]))
        place = max(range(len(words)), key=lambda i, words=words: len(words[i][0]))  # type: ignore[misc]
        before, after = words[max(place - AROUND, 0) : place], words[place + 1 : place + 1 + AROUND]
        question = " ".join([*(word[0] for word in before), "what", *(word[0] for word in after)])
        start = len(" ".join([*sentences[:middle], ""])) + words[place].start()
        answers, context = [Answer(words[place][0], start)], text
        if len(texts) > 1 and number % UNANSWERABLE == UNANSWERABLE - 1:
            answers, context = [], texts[(number + 1) % len(texts)]
        found.append(Question(str(number), question, context, answers))
    how = (
        f"an answer is the longest word of a sentence, its question the {AROUND} words before and after; of "
        f"{UNANSWERABLE} questions one is asked of another text, which has none"
    )
    return Made(QuestionExamples(NAME, found), how)


MAKERS: dict[str, Callable[[Passages, Task | None], Made]] = {
    "classify": _classes, "regress": _numbers, "tag": _tags, "answer": _questions,
    "embed": _pairs,
}  # fmt: skip
