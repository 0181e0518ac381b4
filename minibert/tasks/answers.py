"""From the logits of windows to answers, as transformers' utils_qa.py and Google's run_squad.py do for SQuAD.

In each window the 20 likeliest starts meet the 20 likeliest ends. A span must lie in the context, end after it starts
and be no longer than 30 tokens; its score is the sum of its two logits. The score of not answering is the least sum of
the logits at [CLS] over a question's windows: the window that is surest that there is an answer decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minibert.tasks.encoding import Windows


class Candidate(NamedTuple):
    """A span of the context, or no answer: `text` empty, both places None."""

    text: str
    start: int | None  # character
    end: int | None  # character after it
    score: float  # the sum of two logits
    probability: float  # among the candidates that are kept


class AnswerPrediction(NamedTuple):
    """The answer to a question, and the candidates in order of their scores."""

    text: str  # empty: no answer
    start: int | None
    end: int | None
    score: float | None  # of the answer; None where no window holds a span that may be one
    null_score: float  # of not answering
    n_best: list[Candidate]

    @property
    def best(self) -> Candidate | None:
        """The best span, whether or not it is the answer."""
        return next((each for each in self.n_best if each.start is not None), None)

    @property
    def score_diff(self) -> float | None:
        """How much better not answering scores than the best span: what a threshold is compared with."""
        return None if self.best is None else self.null_score - self.best.score

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self._asdict(), "n_best": [candidate._asdict() for candidate in self.n_best]}


def answers_from(
    windows: Windows,
    contexts: Sequence[str],
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    *,
    n_best_size: int = 20,
    max_answer_length: int = 30,
    null_score_diff_threshold: float | None = 0.0,
) -> list[AnswerPrediction]:
    """The answer to each question: logits are (N,), one a token of `windows`, whose questions are those of `contexts`.

    No answer is given where not answering scores more than the best span by over `null_score_diff_threshold`; None
    answers wherever a span may be one, as in SQuAD 1.1. Spans that two windows give are one, with the better score.
    """
    spans: list[dict[tuple[int, int], float]] = [{} for _ in contexts]
    null_scores = np.full(len(contexts), np.inf)
    offsets = windows.sequences.offsets
    for window, question in enumerate(windows.sequences.documents):
        inside = slice(offsets[window], offsets[window + 1])
        starts, ends = start_logits[inside].astype(np.float64), end_logits[inside].astype(np.float64)
        null_scores[question] = min(null_scores[question], starts[0] + ends[0])
        scored = window_spans(starts, ends, windows.spans[inside], n_best_size, max_answer_length)
        for place, score in scored.items():
            spans[question][place] = max(score, spans[question].get(place, -np.inf))
    return [
        choose(found, float(null), context, n_best_size, null_score_diff_threshold)
        for found, null, context in zip(spans, null_scores, contexts, strict=True)
    ]


def window_spans(
    starts: np.ndarray, ends: np.ndarray, spans: np.ndarray, n_best_size: int, max_answer_length: int
) -> dict[tuple[int, int], float]:
    """The scores of a window's spans by (start, end) in characters: logits (T,) each, `spans` (T, 2)."""
    first = np.argsort(-starts, kind="stable")[:n_best_size, None]
    last = np.argsort(-ends, kind="stable")[None, :n_best_size]
    allowed = (last >= first) & (last - first < max_answer_length) & (spans[first, 0] >= 0) & (spans[last, 1] >= 0)
    scores = starts[first] + ends[last]
    found: dict[tuple[int, int], float] = {}
    for i, j in zip(*np.nonzero(allowed), strict=True):
        place = int(spans[first[i, 0], 0]), int(spans[last[0, j], 1])
        found[place] = max(float(scores[i, j]), found.get(place, -np.inf))
    return found


def choose(
    found: dict[tuple[int, int], float], null_score: float, context: str, n_best_size: int, threshold: float | None
) -> AnswerPrediction:
    """The answer among the spans that were found and none."""
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:n_best_size]
    entries: list[tuple[str, int | None, int | None, float]]
    entries = [(context[start:end], start, end, score) for (start, end), score in ranked]
    if threshold is not None:
        entries.append(("", None, None, null_score))
        entries.sort(key=lambda entry: -entry[3])
    scores = np.array([entry[3] for entry in entries])
    weights = np.exp(scores - scores.max()) if entries else scores
    candidates = [Candidate(*entry, float(w / weights.sum())) for entry, w in zip(entries, weights, strict=True)]
    best = next((each for each in candidates if each.start is not None), None)
    if best is None or (threshold is not None and null_score - best.score > threshold):
        score = None if threshold is None else null_score
        return AnswerPrediction("", None, None, score, null_score, candidates)
    return AnswerPrediction(best.text, best.start, best.end, best.score, null_score, candidates)
