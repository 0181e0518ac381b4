"""Figures against definitions written out, the libraries' own answers, and what is not defined."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minibert.errors import UserError, pip_install
from minibert.tasks import metrics
from minibert.tasks.metrics import (
    GLUE,
    answer_f1,
    answer_metrics,
    best_null_threshold,
    by_group,
    class_metrics,
    confusion_matrix,
    group_report,
    multi_label_metrics,
    normalize_answer,
    regression_metrics,
    search_metrics,
    similarity_metrics,
    tag_metrics,
)
from minibert.tasks.picture import draw_confusion_matrix

TRUE = np.array([0, 0, 1, 1, 2, 2])
GIVEN = np.array([0, 1, 1, 1, 2, 0])


@pytest.fixture
def sklearn() -> None:
    pytest.importorskip("sklearn.metrics", reason=f"needs scikit-learn: {pip_install('[tasks]')}")


@pytest.fixture
def seqeval(sklearn: None) -> None:
    pytest.importorskip("seqeval.metrics", reason=f"needs seqeval: {pip_install('[tasks]')}")


def f1_of(true: np.ndarray, given: np.ndarray) -> float:
    """F1 of a class, from counts of what is true and what was given."""
    both = (true & given).sum()
    return 2 * both / (true.sum() + given.sum()) if both else 0.0


def test_classes(sklearn: None) -> None:
    figures, report = class_metrics(TRUE, GIVEN, ["a", "b", "c", "never"])
    assert figures["accuracy"] == figures["f1_micro"] == pytest.approx(4 / 6)
    assert figures["f1_macro"] == pytest.approx(np.mean([f1_of(k == TRUE, k == GIVEN) for k in range(3)]))
    assert -1 < figures["matthews_correlation"] < 1
    assert "f1" not in figures
    assert [line.split()[0] for line in report.splitlines()[2:5]] == ["a", "b", "c"]
    assert confusion_matrix(TRUE, GIVEN, 4).tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def test_two_classes_have_the_f1_of_the_second_and_matthews_by_its_formula(sklearn: None) -> None:
    true, given = np.array([1, 1, 1, 0, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0, 0])
    figures = class_metrics(true, given, ["no", "yes"]).figures
    assert figures["f1"] == pytest.approx(4 / 6)
    tp, fp, fn, tn = 2, 1, 1, 3
    root = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert figures["matthews_correlation"] == pytest.approx((tp * tn - fp * fn) / root)
    one_sided = class_metrics(np.zeros(3, int), np.zeros(3, int), ["no", "yes"]).figures
    assert (one_sided["accuracy"], one_sided["f1"], one_sided["matthews_correlation"]) == (1.0, 0.0, 0.0)


def test_several_classes_at_once(sklearn: None) -> None:
    rng = np.random.default_rng(0)
    true, likely = rng.integers(0, 2, (40, 5)).astype(np.float32), rng.random((40, 5))
    likely[:, 4], true[:, 4] = 0.1, 0
    figures, report = multi_label_metrics(true, likely, list("abcde"))
    t, g = true > 0, likely >= 0.5
    assert figures["f1_micro"] == pytest.approx(f1_of(t.ravel(), g.ravel()))
    assert figures["f1_macro"] == pytest.approx(np.mean([f1_of(t[:, k], g[:, k]) for k in range(5)]))
    assert figures["subset_accuracy"] == pytest.approx((t == g).all(axis=1).mean())
    assert "micro avg" in report
    assert multi_label_metrics(true, likely, list("abcde"), threshold=0.95).figures["f1_micro"] < figures["f1_micro"]


def test_numbers() -> None:
    figures, report = regression_metrics(np.array([1.0, 2, 3, 4]), np.array([1.0, 4, 9, 17]))
    assert figures["spearman"] == pytest.approx(1)
    assert 0.9 < figures["pearson"] < 1
    assert figures["mean_squared_error"] == pytest.approx((0 + 4 + 36 + 169) / 4)
    assert figures["mean_absolute_error"] == pytest.approx((0 + 2 + 6 + 13) / 4)
    assert "spearman  1.0000" in report
    figures, report = regression_metrics(np.array([1.0, 2]), np.array([3.0, 3]))
    assert (figures["pearson"], figures["spearman"]) == (None, None)
    assert "pearson  not defined" in report
    lost = regression_metrics(np.array([1.0, 2]), np.array([np.nan, 3])).figures
    assert json.loads(json.dumps(lost, allow_nan=False)) == dict.fromkeys(lost)
    assert similarity_metrics(np.array([0.0, 1, 2]), np.array([0.3, 0.2, 0.1])).figures["spearman"] == pytest.approx(-1)


def test_no_rows_give_no_figures(sklearn: None) -> None:
    none = np.zeros(0, int)
    for found in (
        class_metrics(none, none, ["a", "b"]), multi_label_metrics(none.reshape(0, 2), none.reshape(0, 2), ["a", "b"]),
        regression_metrics(none, none), answer_metrics([], []),
    ):  # fmt: skip
        assert set(found.figures.values()) == {None}


def test_entities_are_counted_leniently_and_strictly(seqeval: None) -> None:
    """The case that TASKS and seqeval's own README tell apart."""
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O"]]
    figures, report = tag_metrics(true, [["I-PER", "I-PER", "O", "B-LOC"], ["O"]])
    assert (figures["entity_f1"], figures["accuracy"]) == (1.0, pytest.approx(4 / 5))
    assert figures["entity_f1_strict"] == pytest.approx(2 / 3)
    assert figures["entity_precision_strict"] == 1.0
    assert figures["entity_recall_strict"] == 0.5
    assert "LOC" in report
    assert "PER" in report


@pytest.mark.parametrize("letters", ["ES", "LU"])
def test_other_schemes_are_strict_by_their_own_rules(letters: str, seqeval: None) -> None:
    end, alone = letters
    true = [["B-X", "I-X", f"{end}-X", f"{alone}-Y", "O"]]
    figures = tag_metrics(true, true).figures
    assert (figures["entity_f1"], figures["entity_f1_strict"]) == (1.0, 1.0)
    broken = tag_metrics(true, [["B-X", "I-X", "I-X", f"{alone}-Y", "O"]]).figures
    assert (broken["entity_f1"], broken["entity_f1_strict"]) == (1.0, pytest.approx(2 / 3))


def test_without_entities_and_without_entity_tags(seqeval: None) -> None:
    figures, report = tag_metrics([["O", "O"]], [["O", "O"]])
    assert (figures["accuracy"], figures["entity_f1"], report) == (1.0, 0.0, "no entities, and none predicted\n")
    assert tag_metrics([["O"]], [["B-X"]]).figures["entity_f1"] == 0.0
    spoken = tag_metrics([["NOUN", "VERB"]], [["NOUN", "O"]]).figures
    assert (spoken["accuracy"], "entity_f1" in spoken) == (0.5, False)


# What SQuAD's evaluate-v2.0.py gives for these, by hand from its text.
ANSWERS = [
    ("The  Cat!", "cat", 1, 1.0),
    ("a cat, the mat", "cat mat", 1, 1.0),
    ("cat sat", "cat on mat", 0, 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),
    ("cat cat dog", "cat bird", 0, 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
    ("", "", 1, 1.0),
    ("the", "", 1, 1.0),
    ("", "cat", 0, 0.0),
    ("cat", "", 0, 0.0),
    ("anthem", "them", 0, 0.0),
    ("U.S.", "us", 1, 1.0),
    ("naïve", "naive", 0, 0.0),
]


@pytest.mark.parametrize(("given", "true", "exact", "f1"), ANSWERS)
def test_answers_are_judged_by_squad_s_rules(given: str, true: str, exact: int, f1: float) -> None:
    assert int(normalize_answer(given) == normalize_answer(true)) == exact
    assert answer_f1(given, true) == pytest.approx(f1)


def test_the_best_of_several_answers_counts_and_none_is_an_answer() -> None:
    figures = answer_metrics([["dog", "the big cat"], [], [], ["cat"]], ["big cat", "", "dog", ""]).figures
    assert figures == {
        "exact_match": 0.5, "f1": 0.5, "HasAns_exact": 0.5, "HasAns_f1": 0.5, "NoAns_exact": 0.5, "NoAns_f1": 0.5,
    }  # fmt: skip
    assert set(answer_metrics([["dog"]], ["a dog barks"]).figures) == {"exact_match", "f1"}
    assert answer_metrics([["the"]], [""]).figures["exact_match"] == 1.0  # nothing is left of it


@given(
    st.lists(
        st.tuples(
            st.sampled_from([[], ["cat"], ["cat sat"]]), st.sampled_from(["cat", "dog"]),
            st.none() | st.integers(-3, 3).map(float),
        ),
        min_size=1, max_size=8,
    )
)  # fmt: skip
def test_the_best_threshold_is_the_best_of_all(rows: list[tuple[list[str], str, float | None]]) -> None:
    targets, best, diffs = (list(column) for column in zip(*rows, strict=True))

    def f1(threshold: float) -> float:
        given = [text if diff is not None and diff <= threshold else "" for text, diff in zip(best, diffs, strict=True)]
        return float(answer_metrics(targets, given).figures["f1"])

    threshold, found = best_null_threshold(targets, best, diffs)
    assert found == pytest.approx(f1(threshold))
    assert found == pytest.approx(max(f1(t) for t in (-np.inf, *range(-3, 4))))


def test_glue_s_figures_are_known(sklearn: None) -> None:
    known = {*class_metrics(TRUE % 2, GIVEN % 2, ["a", "b"]).figures, *regression_metrics(TRUE, GIVEN).figures}
    assert {name for names in GLUE.values() for name in names} <= known


def test_search() -> None:
    scores = np.array([[0.9, 0.1, 0.2], [0.9, 0.8, 0.7], [0.5, 0.5, 0.5]])
    figures = search_metrics(scores, np.array([0, 2, 1])).figures
    assert figures["mrr_10"] == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert figures["ndcg_10"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert (figures["recall_1"], figures["recall_5"]) == (pytest.approx(1 / 3), 1.0)
    far = search_metrics(-np.arange(12.0)[None], np.array([11])).figures
    assert (far["mrr_10"], far["ndcg_10"], far["recall_10"]) == (0.0, 0.0, 0.0)


def test_groups(sklearn: None) -> None:
    groups = ["10", "9", "10", "9", "10", "9"]
    found = by_group(groups, lambda rows: class_metrics(TRUE[rows], GIVEN[rows], ["a", "b", "c"]))
    assert list(found) == ["9", "10"]
    assert [row["count"] for row in found.values()] == [3, 3]
    assert [row["accuracy"] for row in found.values()] == [pytest.approx(1 / 3), 1.0]
    head, nine, ten = group_report(found).splitlines()
    assert head.split() == ["count", "accuracy", "f1_micro", "f1_macro", "matthews_correlation"]
    assert nine.split()[:3] == ["9", "3", "0.3333"]
    assert len(head) == len(nine) == len(ten)


def test_the_picture_of_a_confusion_matrix(tmp_path: Path) -> None:
    names = ["$a", "国家", "a name that is much too long for an axis"]
    draw_confusion_matrix(confusion_matrix(TRUE, GIVEN, 3), names, tmp_path / "small.svg")
    drawn = (tmp_path / "small.svg").read_text()
    assert "<!-- a name that is much too… -->" in drawn
    assert drawn.count("<!-- 2 -->") == 1
    many = np.eye(40, dtype=np.int64)
    draw_confusion_matrix(many, [str(k) for k in range(40)], tmp_path / "many.png")
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"cannot draw into .*small.xyz: "):
        draw_confusion_matrix(many, [str(k) for k in range(40)], tmp_path / "small.xyz")
    with pytest.raises(UserError, match=r"cannot write .*none/small.png: No such file"):
        draw_confusion_matrix(many, [str(k) for k in range(40)], tmp_path / "none" / "small.png")


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("sklearn", lambda path: class_metrics(TRUE, GIVEN, ["a", "b", "c"])),
        ("seqeval", lambda path: metrics.seqeval_metrics()),
        ("matplotlib", lambda path: draw_confusion_matrix(np.eye(2, dtype=int), ["a", "b"], path)),
    ],
)
def test_a_library_that_is_missing_is_named(
    package: str, call: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"pip install 'minibert-lab\[tasks\]'$"):
        call(tmp_path / "a.png")
