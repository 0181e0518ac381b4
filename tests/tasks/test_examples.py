"""Labelled texts: what the labels are, by how they are written; their names and numbers; rows that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.errors import UserError
from minibert.tasks import names_of, read_texts, sorted_names, stream_texts


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a file into the folder that the test is in, and give its name."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | list[dict[str, Any]], name: str = "a.csv") -> str:
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        Path(name).write_text(text, encoding="utf-8", newline="")
        return name

    return write


def test_one_class(file: Any) -> None:
    found = read_texts(file('review,stars,user\n"a\nb",10 ,x\nc,2,y\nd,10,x\n'), "classify")
    assert (found.problem_type, len(found), found.lines) == ("single_label_classification", 3, [2, 4, 5])
    assert found.texts == ["a\nb", "c", "d"]
    assert found.columns.note == "text: column 'review', label: column 'stars'; not read: 'user'"
    assert found.label_names() == ["2", "10"]
    targets = found.targets(["2", "10"])
    assert (targets.dtype, targets.tolist()) == (np.int64, [1, 0, 1])
    assert found.targets(["10", "other", "2"]).tolist() == [0, 2, 0]
    assert found.groups("user") == ["x", "y", "x"]
    with pytest.raises(UserError, match=r"a.csv has no column 'age': its columns are 'review', 'stars', 'user'"):
        found.groups("age")


def test_several_classes_from_a_list_or_a_separator(file: Any) -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "labels": ["y", "x", "y"]}, {"text": "b", "labels": []}]
    listed = read_texts(file(rows, "a.jsonl"), "classify")
    cut = read_texts(file("text,genres\na, y | x|y\nb,\n"), "classify", label_separator="|")
    for found in (listed, cut):
        assert found.problem_type == "multi_label_classification"
        assert found.label_names() == ["x", "y"]
        targets = found.targets(["z", "y", "x"])
        assert (targets.dtype, targets.tolist()) == (np.float32, [[0, 1, 1], [0, 0, 0]])


def test_numbers_are_classes_or_targets_as_the_task_says(file: Any) -> None:
    name = file("text,score\na,2\nb,-1.5e1\nc,10\n")
    assert read_texts(name, "classify").label_names() == ["-1.5e1", "2", "10"]
    found = read_texts(name, "regress")
    assert (found.problem_type, found.targets([]).dtype) == ("regression", np.float32)
    assert found.targets([]).tolist() == [2.0, -15.0, 10.0]
    rows = [{"text": "a", "label": 0.5}, {"text": "b", "label": 3}]
    assert read_texts(file(rows, "a.jsonl"), "regress").labels == [0.5, 3.0]


def test_json_names_classes_as_it_writes_them(file: Any) -> None:
    rows = [{"text": "a", "label": value} for value in (True, 3, "x ", 1.0)]
    assert read_texts(file(rows, "a.jsonl"), "classify").labels == ["true", "3", "x", "1.0"]


def test_many_decimal_numbers_are_no_classes(file: Any) -> None:
    name = file("text,score\n" + "".join(f"t{i},{i / 8}\n" for i in range(40)))
    with pytest.raises(UserError, match=r"'score' holds 40 different decimal numbers: .* use regress"):
        read_texts(name, "classify").label_names()


def test_embedding_pairs_triplets_and_scores(file: Any) -> None:
    triplets = read_texts(file("anchor,positive,negative\na,b,c\n"), "embed")
    assert (triplets.texts, triplets.pairs, triplets.negatives) == (["a"], ["b"], ["c"])
    assert (triplets.labels, triplets.problem_type) == (None, None)
    scored = read_texts(file("sentence1,sentence2,score\na,b,0.5\n"), "embed")
    assert (scored.pairs, scored.negatives, scored.labels) == (["b"], None, [0.5])


def test_without_labels_nothing_is_required_and_texts_may_be_empty(file: Any) -> None:
    found = read_texts(file("text,label\na,\n,x\n"), "classify", labelled=False)
    assert (found.texts, found.labels, found.problem_type) == (["a", ""], None, None)


def test_examples_come_as_they_are_read(file: Any) -> None:
    columns, examples = stream_texts(file("text,label\na,x\nb\n"), "classify")
    assert columns.label == "label"
    assert next(examples).label == "x"
    with pytest.raises(UserError, match=r"a.csv, line 3"):
        next(examples)


WRONG: list[tuple[str, Any, dict[str, Any], str]] = [
    ("classify", 'text,label\n"a\nb",x\n ,y\n', {}, "a.csv, line 4: the column 'text' is empty: expected text; drop"),
    ("classify", "text,label\na,x\nb, \n", {}, "a.csv, line 3: no label in the column 'label': add it, or drop the ro"),
    ("classify", [{"text": "a", "label": "x"}, {"text": "b"}], {}, "a.jsonl, line 2: no label in the column 'label'"),
    ("classify", [{"text": "a", "label": {}}], {}, "a.jsonl, line 1: expected a name or a list of names in the column"),
    ("classify", [{"text": 3, "label": "x"}], {}, "a.jsonl, line 1: expected text in the column 'text', got 3"),
    ("classify", [{"text": "\ud800", "label": "x"}], {}, "a.jsonl, line 1: expected text in the column 'text', got ha"),
    ("classify", [{"text": "a", "label": []}, {"text": "b", "label": "x"}], {},
     "a.jsonl, line 2: one label where the rows before have a list: write all alike"),
    ("classify", [{"text": "a", "label": "x"}, {"text": "b", "label": ["x"]}], {},
     "a.jsonl, line 2: a list where the rows before have one label"),
    ("regress", "text,score\na,1\nb,3,5\n", {}, "a.csv, line 3: expected 2 columns"),
    ("regress", 'text,score\na,1\nb,"3,5"\n', {}, "a.csv, line 3: expected a finite number in the column 'score', got"),
    ("regress", "text,score\na,nan\n", {}, "a.csv, line 2: expected a finite number in the column 'score', got 'nan'"),
    ("regress", [{"text": "a", "score": True}], {}, "a.jsonl, line 1: expected a finite number in the column 'score'"),
    ("classify", "text,label\na,x\n", {"label_column": "y"}, "a.csv has no column 'y' (--label-column)"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "content", "options", "said"), WRONG)
def test_a_wrong_row_is_told_by_file_and_line(
    task: str, content: Any, options: dict[str, Any], said: str, file: Any
) -> None:
    name = file(content, "a.csv" if isinstance(content, str) else "a.jsonl")
    with pytest.raises(UserError) as raised:
        read_texts(name, task, **options)
    assert str(raised.value).startswith(said)
    assert "\n" not in str(raised.value)


def test_an_unknown_label_is_told_by_file_and_line(file: Any) -> None:
    found = read_texts(file("text,label\na,x\nb,zzz\n"), "classify")
    with pytest.raises(UserError, match=r"^unknown label 'zzz' in a.csv, line 3: the model knows x, y$"):
        found.targets(["x", "y"])
    with pytest.raises(UserError, match=r"the model knows n0, n1, .*, n9 and 3 more$"):
        found.targets([f"n{i}" for i in range(13)])
    several = read_texts(file([{"text": "a", "label": ["x", "q"]}], "a.jsonl"), "classify")
    with pytest.raises(UserError, match=r"^unknown label 'q' in a.jsonl, line 1"):
        several.targets(["x"])


def test_the_number_alone_means_a_name_that_hugging_face_made_up(file: Any) -> None:
    found = read_texts(file("text,label\na,1\nb,0\nc,LABEL_1\n"), "classify")
    assert found.targets(["LABEL_0", "LABEL_1"]).tolist() == [1, 0, 1]
    with pytest.raises(UserError, match=r"unknown label '1'"):
        found.targets(["LABEL_1", "LABEL_0"])


def test_one_label_teaches_nothing(file: Any) -> None:
    with pytest.raises(UserError, match=r"a.csv has only the label 'x': nothing can be learned from it"):
        read_texts(file("text,label\na,x\nb,x\n"), "classify").label_names()


def test_names_are_in_order_and_read_from_id2label() -> None:
    assert sorted_names(["10", "9", "-1", "9"]) == ["-1", "9", "10"]
    assert sorted_names(["10", "9", "x"]) == ["10", "9", "x"]
    assert sorted_names(["1_0", "9"]) == ["1_0", "9"]
    assert names_of({"1": "b", "0": "a"}) == ["a", "b"]
    with pytest.raises(UserError, match=r"without a gap"):
        names_of({"1": "b", "2": "a"})
    with pytest.raises(UserError, match=r"'a' twice"):
        from minibert.tasks import LabelIds

        LabelIds(["a", "a"])
