"""Answers from logits, against the loops of transformers' utils_qa.py written out, on random windows."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert.data.sequences import Sequences
from minibert.tasks import Windows
from minibert.tasks.answers import answers_from

CONTEXT = "".join(f"w{n:02d} " for n in range(40))


def windows_of(lengths: list[tuple[int, int]], question: int = 3) -> Windows:
    """Windows of one question: `lengths` has of each the first of the context's words and how many."""
    spans, sizes = [], []
    for first, count in lengths:
        inside = [(4 * word, 4 * word + 3) for word in range(first, first + count)]
        spans += [(-1, -1)] * (question + 2) + inside + [(-1, -1)]
        sizes.append(question + 3 + count)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    sequences = Sequences(
        ids=np.zeros(offsets[-1], np.int32),
        offsets=offsets,
        second=np.full(len(sizes), question + 2, np.int32),
        documents=np.zeros(len(sizes), np.int32),
    )
    return Windows(sequences, np.array(spans, np.int32).reshape(-1, 2), 0)


def naive(windows: Windows, starts: np.ndarray, ends: np.ndarray, n_best: int, longest: int) -> tuple[dict, float]:
    """Every allowed span with its best score, and the null score."""
    found: dict[tuple[int, int], float] = {}
    nulls = []
    for a, b in zip(windows.sequences.offsets, windows.sequences.offsets[1:], strict=False):
        s, e, spans = starts[a:b].tolist(), ends[a:b].tolist(), windows.spans[a:b].tolist()
        nulls.append(s[0] + e[0])
        for i in sorted(range(len(s)), key=lambda i: -s[i])[:n_best]:
            for j in sorted(range(len(e)), key=lambda j: -e[j])[:n_best]:
                if spans[i][0] < 0 or spans[j][0] < 0 or j < i or j - i + 1 > longest:
                    continue
                place = (spans[i][0], spans[j][1])
                found[place] = max(found.get(place, -np.inf), s[i] + e[j])
    return found, min(nulls)


@settings(max_examples=150)
@given(st.data())
def test_answers_are_those_of_the_written_out_loops(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)), min_size=1, max_size=3))
    windows = windows_of(lengths)
    count = len(windows.spans)
    logits = st.lists(st.integers(-8, 8).map(float), min_size=count, max_size=count)
    starts, ends = np.array(data.draw(logits)), np.array(data.draw(logits))
    n_best, longest = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))
    threshold = data.draw(st.none() | st.integers(-6, 6).map(float))
    (answer,) = answers_from(
        windows, [CONTEXT], starts, ends, n_best_size=n_best, max_answer_length=longest,
        null_score_diff_threshold=threshold,
    )  # fmt: skip
    found, null = naive(windows, starts, ends, n_best, longest)
    best = max(found.values(), default=None)
    assert answer.null_score == null
    assert answer.score_diff == (None if best is None else null - best)
    if best is None or (threshold is not None and null - best > threshold):
        assert (answer.text, answer.start, answer.end) == ("", None, None)
    else:
        assert (answer.start, answer.end) in found
        assert answer.score == found[(answer.start, answer.end)] == best
        assert answer.text == CONTEXT[answer.start : answer.end]
    kept = [each for each in answer.n_best if each.start is not None]
    assert sorted((each.score for each in kept), reverse=True) == sorted(found.values(), reverse=True)[:n_best]
    assert all(found[(each.start, each.end)] == each.score for each in kept)
    assert len(answer.n_best) == len(kept) + (threshold is not None)
    assert [each.score for each in answer.n_best] == sorted((each.score for each in answer.n_best), reverse=True)
    if answer.n_best:
        weights = np.exp([each.score for each in answer.n_best])
        assert [each.probability for each in answer.n_best] == pytest.approx(weights / weights.sum())
    json.dumps(answer.as_dict(), allow_nan=False)


def test_only_the_null_is_left() -> None:
    """google-research/bert#476: a question all of whose spans are ruled out."""
    windows = windows_of([(0, 3)])
    starts, ends = np.zeros(len(windows.spans)), np.zeros(len(windows.spans))
    starts[-2], ends[-4] = 9, 9  # the end before the start
    (answer,) = answers_from(windows, [CONTEXT], starts, ends, n_best_size=1)
    assert (answer.text, answer.score, answer.score_diff, len(answer.n_best)) == ("", 0.0, None, 1)
    (answer,) = answers_from(windows, [CONTEXT], starts, ends, n_best_size=1, null_score_diff_threshold=None)
    assert (answer.text, answer.score, answer.n_best) == ("", None, [])


def test_the_surest_window_decides_and_the_threshold_moves_it() -> None:
    windows = windows_of([(0, 3), (3, 3)])
    starts, ends = np.full(len(windows.spans), -9.0), np.full(len(windows.spans), -9.0)
    first, second = windows.sequences.offsets[:2]
    starts[first], ends[first], starts[second], ends[second] = 5, 5, 1, 1
    starts[second + 5], ends[second + 6] = 0.5, 1
    (answer,) = answers_from(windows, [CONTEXT], starts, ends)
    assert (answer.null_score, answer.text, answer.score_diff) == (2.0, "", 0.5)
    (answer,) = answers_from(windows, [CONTEXT], starts, ends, null_score_diff_threshold=0.5)
    assert (answer.text, answer.start, answer.end) == ("w03 w04", 12, 19)
