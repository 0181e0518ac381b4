"""Columns by name and by guess, the sentence that says so, and the error where a guess is not sure."""

from __future__ import annotations

from typing import Any

import pytest

from minibert.errors import UserError
from minibert.tasks.columns import find_columns

GUESSED = [
    ("classify", "text label", {}, "text: column 'text', label: column 'label'"),
    ("classify", "id Review Stars", {}, "text: column 'Review', label: column 'Stars'; not read: 'id'"),
    ("classify", "Sentence-1 Sentence-2 label", {}, "text: column 'Sentence-1', pair: column 'Sentence-2', label:"),
    ("classify", "idx question sentence label", {}, "text: column 'question', pair: column 'sentence', label: column"),
    ("classify", "title text label", {}, "text: column 'text', label: column 'label'; not read: 'title'"),
    ("classify", "verbatim verdict", {"label": "verdict"}, "text: column 'verbatim', label: column 'verdict'"),
    ("classify", "verbatim label", {}, "text: column 'verbatim', label: column 'label'"),
    ("classify", "review verdict idx", {}, "text: column 'review', label: column 'verdict'; not read: 'idx'"),
    ("classify", "a b verdict", {"text": "b", "label": "verdict"}, "text: column 'b', label: column 'verdict'; not"),
    ("classify", "a text label", {"text": "a"}, "text: column 'a', label: column 'label'; not read: 'text'"),
    ("classify", "premise other label", {"pair": "other"}, "text: column 'premise', pair: column 'other', label: col"),
    ("classify", "text hypothesis label", {"pair": "hypothesis"}, "text: column 'text', pair: column 'hypothesis', l"),
    ("regress", "text score", {}, "text: column 'text', label: column 'score'"),
    ("regress", "sentence1 sentence2 score", {}, "text: column 'sentence1', pair: column 'sentence2', label: column"),
    ("classify", "verbatim", {"labelled": False}, "text: column 'verbatim'"),
    ("classify", "id", {"labelled": False}, "text: column 'id'"),
    ("classify", "verbatim label", {"labelled": False}, "text: column 'verbatim'; not read: 'label'"),
    ("classify", "text label stars", {"labelled": False}, "text: column 'text'; not read: 'label', 'stars'"),
    ("embed", "anchor positive", {}, "text: column 'anchor', pair: column 'positive'"),
    ("embed", "anchor positive negative", {}, "text: column 'anchor', pair: column 'positive', negative: column 'neg"),
    ("embed", "question answer id", {}, "text: column 'question', pair: column 'answer'; not read: 'id'"),
    ("embed", "sentence1 sentence2 similarity", {}, "text: column 'sentence1', pair: column 'sentence2', label: col"),
    ("embed", "left right", {}, "text: column 'left', pair: column 'right'"),
    ("embed", "left right score", {}, "text: column 'left', pair: column 'right', label: column 'score'"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "available", "given", "note"), GUESSED)
def test_columns_are_guessed_and_said(task: str, available: str, given: dict[str, Any], note: str) -> None:
    assert find_columns(available.split(), "a.csv", task, **given).note.startswith(note)


UNSURE = [
    ("classify", "review comment label", {}, "a.csv: 'review', 'comment' could each be the text; its columns are 'revie"
     "w', 'comment', 'label': name one with --text-column"),
    ("classify", "text class topic", {}, "a.csv: 'class', 'topic' could each be the label; its columns are 'text', 'c"),
    ("classify", "Text text label", {}, "a.csv: 'Text', 'text' could each be the text; its columns are 'Text', 'tex"),
    ("classify", "text a b", {}, "a.csv: which column is the label? Its columns, as the first line names them, are 'tex"
     "t', 'a', 'b': name one with --label-column"),
    ("classify", "a b", {}, "a.csv: which column is the text? Its columns, as the first line names them, are 'a', 'b'"),
    ("classify", "text", {}, "a.csv: which column is the label?"),
    ("classify", "a b label", {"labelled": False}, "a.csv: which column is the text?"),
    ("embed", "a b c", {}, "a.csv: which column is the text?"),
    ("embed", "text", {}, "a.csv: which column is the pair?"),
    ("classify", "text label", {"label": "lable"}, "a.csv has no column 'lable' (--label-column): its columns are 'text"
     "', 'label'; did you mean 'label'?"),
    ("classify", "text label", {"text": "label", "label": "label"}, "a.csv: the column 'label' is named for two thing"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "available", "given", "said"), UNSURE)
def test_what_is_not_sure_is_an_error_that_lists_the_columns(
    task: str, available: str, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as raised:
        find_columns(available.split(), "a.csv", task, **given)
    assert str(raised.value).startswith(said)
