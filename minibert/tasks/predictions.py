"""What a model's logits say, row by row, as JSON takes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minibert.tasks.answers import answers_from
from minibert.tasks.examples import MULTI, REGRESSION
from minibert.tasks.tags import entities, is_entity_tag
from minibert.tasks.task import Answer, Classify, Prepared, Tag, Task, probabilities

THRESHOLD = 0.5  # from which a class of several is predicted


def predictions(task: Task, part: Prepared, logits: np.ndarray) -> Iterator[dict[str, Any]]:
    """A row for each example, in order.

    Of one class: `label`, its probability `score`, and the `scores` of all; of several classes: the `labels` that are
    more likely than not, and `scores`; of numbers: `prediction`. Of words: `tokens` and `tags`, and of entities where
    they stand in the text, under the names of transformers' pipeline. Of questions: `id`, `answer` (empty: none), its
    `score`, `start` and `end` in the context, and the `null_score` of not answering.
    """
    if isinstance(task, Answer):
        yield from _answers(part, logits)
    elif isinstance(task, Tag):
        yield from _tags(task, part, logits)
    else:
        assert isinstance(task, Classify)
        yield from _classes(task, part, logits)


def _classes(task: Classify, part: Prepared, logits: np.ndarray) -> Iterator[dict[str, Any]]:
    found = logits if task.problem_type == REGRESSION else probabilities(logits, str(task.problem_type))
    for text, row in zip(part.examples.texts, found, strict=True):
        scores = {name: float(p) for name, p in zip(task.names, row, strict=True)}
        if task.problem_type == REGRESSION:
            yield {"text": text, "prediction": float(row[0])}
        elif task.problem_type == MULTI:
            likely = [name for name, p in scores.items() if p >= THRESHOLD]
            yield {"text": text, "labels": likely, "scores": scores}
        else:
            label = task.names[int(row.argmax())]
            yield {"text": text, "label": label, "score": scores[label], "scores": scores}


def _tags(task: Tag, part: Prepared, logits: np.ndarray) -> Iterator[dict[str, Any]]:
    sentences = part.examples.sentences
    counts = [len(sentence.words) for sentence in sentences]
    best = part.encoded.per_word(probabilities(logits).max(axis=-1), counts, missing=1.0)
    for sentence, tags, scores in zip(sentences, task.tags(part, logits), best, strict=True):
        row: dict[str, Any] = {"text": sentence.text, "tokens": sentence.words, "tags": tags}
        if all(map(is_entity_tag, task.names)):
            found = entities(tags, sentence.spans, sentence.text, scores.tolist())
            row["entities"] = [entity.as_dict() for entity in found]
        yield row


def _answers(part: Prepared, logits: np.ndarray) -> Iterator[dict[str, Any]]:
    found = answers_from(part.encoded, part.examples.contexts, logits[:, 0], logits[:, 1])
    for question, answer in zip(part.examples.questions, found, strict=True):
        yield {
            "id": question.id, "question": question.question, "answer": answer.text, "score": answer.score,
            "start": answer.start, "end": answer.end, "null_score": answer.null_score,
        }  # fmt: skip
