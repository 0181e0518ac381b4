"""Labelled examples made of plain text, and batches of a task: every label stands where it is said to stand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.data import SHIPPED_TEXT, SHIPPED_VOCABULARY, load_tokenizer, read_documents
from minibert.errors import UserError
from minibert.tasks.batches import TaskBatches
from minibert.tasks.embedding_task import Embed
from minibert.tasks.evaluation import batch_of
from minibert.tasks.examples import MULTI, REGRESSION
from minibert.tasks.from_text import WRITTEN, examples_of_text
from minibert.tasks.task import Answer, Classify, Tag, Task

DOCUMENTS = read_documents(SHIPPED_TEXT)
TOKENIZER = load_tokenizer(SHIPPED_VOCABULARY)
CONFIG = mb.BertConfig(
    vocab_size=8000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=64,
)  # fmt: skip
TEXTS = [" ".join(document) for document in DOCUMENTS[:4]]


def made(kind: str, like: Task | None = None, length: int = 64) -> Any:
    return examples_of_text(kind, DOCUMENTS, length, 6000, like).examples


def task_of(kind: str) -> tuple[Task, Any]:
    examples = made(kind)
    if kind == "answer":
        return Answer(), examples
    if kind == "embed":
        return Embed.of(examples, None), examples
    return (Tag(examples.label_names()) if kind == "tag" else Classify.of(examples)), examples


def test_the_class_of_a_text_is_the_document_it_stands_in() -> None:
    examples = made("classify")
    assert examples.label_names() == [f"document {n}" for n in range(1, 5)]
    for text, label in zip(examples.texts, examples.labels, strict=True):
        assert text in TEXTS[int(label.split()[1]) - 1]
    assert sum(map(len, examples.texts)) < 9000  # no more than was asked for, and the rest of a sentence


def test_labels_of_a_model_are_kept_to() -> None:
    examples = made("classify", Classify(["no", "yes"], MULTI))
    assert examples.problem_type == MULTI
    documents: dict[str, set[int]] = {"no": set(), "yes": set()}
    for text, (label,) in zip(examples.texts, examples.labels, strict=True):
        documents[label] |= {number for number, whole in enumerate(TEXTS) if text in whole}
    assert documents == {"no": {0, 2}, "yes": {1, 3}}
    assert set(made("tag", Tag(["X", "Y", "Z"])).label_names()) == {"X", "Y", "Z"}
    assert made("classify", Classify(["LABEL_0"], REGRESSION)).label_names()[0] == "document 1"  # it has no classes


def test_the_number_of_a_text_is_its_place() -> None:
    examples = made("regress")
    values = np.array(examples.labels)
    firsts = np.flatnonzero(values == 0)
    assert len(firsts) == 4 and values.max() == 1
    assert all(np.all(np.diff(part) > 0) for part in np.split(values, firsts[1:]))
    for first, text in zip(firsts, TEXTS, strict=True):
        assert text.startswith(examples.texts[first])


def test_the_tag_of_a_word_is_how_it_is_written() -> None:
    pairs = {(w, t) for s in made("tag").sentences for w, t in zip(s.words, s.tags, strict=True)}
    assert {t for _, t in pairs} == set(WRITTEN)
    assert {("Congress", "capital"), ("the", "lower"), ("1790", "number"), (".", "mark")} <= pairs


def test_an_answer_stands_in_its_context_between_the_words_of_its_question() -> None:
    questions = made("answer").questions
    assert [not q.answers for q in questions] == [number % 4 == 3 for number in range(len(questions))]
    for question in questions:
        assert "what" in question.question.split()
        for text, start in question.answers:
            assert question.context[start : start + len(text)] == text
            before, _, after = question.question.partition("what")
            around = question.context[max(start - 80, 0) : start + 80]
            assert all(word in around for word in (*before.split(), *after.split()))


def test_one_document_has_no_classes() -> None:
    with pytest.raises(UserError, match=r"two documents or more, got one: .*--train"):
        examples_of_text("classify", DOCUMENTS[:1], 64, 1000)


def test_a_pair_is_a_sentence_and_the_next_one() -> None:
    examples = made("embed")
    sentences = [sentence for document in DOCUMENTS[:4] for sentence in document]
    following = dict(pairwise(sentences))
    assert len(examples) > 10 and examples.labels is None
    assert all(following[text] == pair for text, pair in zip(examples.texts, examples.pairs, strict=True))
    with pytest.raises(UserError, match=r"three sentences or more in a document.*--train"):
        examples_of_text("embed", [["One.", "Two."]], 64, 1000)


@pytest.mark.parametrize("kind", ["classify", "regress", "tag", "answer", "embed"])
def test_a_batch_is_what_a_run_of_fine_tuning_takes(kind: str) -> None:
    task, examples = task_of(kind)
    part = task.prepare(examples, TOKENIZER, 64)
    batches = TaskBatches(task, part, 200, seed=3)
    seen: list[int] = []
    model = task.model_class(CONFIG)(replace(CONFIG, **task.labels()), "numpy").eval()
    for step in range(batches.steps_in_epoch(0)):
        batch, chosen = batches.batch(step), batches.chosen(step)
        seen += chosen.tolist()
        packed, targets = batch_of(task, model, part, chosen)
        np.testing.assert_array_equal(batch.labels, targets)
        np.testing.assert_array_equal(batch.input_ids, packed.input_ids)
        logits, loss = task.forward(model, packed, targets)
        assert loss is not None and batch.loss(model).item() == loss.item()
        np.testing.assert_array_equal(batch.infer(model).numpy(), logits.numpy())
        assert batch.counted == task.counted(targets) > 0
    assert sorted(seen) == list(range(part.count))
