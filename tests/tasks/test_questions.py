"""SQuAD's JSON and flat tables of questions; answers that do not stand where they are said to."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from minibert.errors import UserError
from minibert.tasks import Answer, Question, read_questions

CONTEXT = "The cat sat on the mat. The cat slept."


def qa(id: str = "a", answers: Any = None, **more: Any) -> dict[str, Any]:
    found = [{"text": "mat", "answer_start": 19}] if answers is None else answers
    return {"id": id, "question": "Where?", "answers": found, **more}


def squad(*qas: dict[str, Any], context: Any = CONTEXT) -> str:
    return json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]}]})


ANSWERED = Question("a", "Where?", CONTEXT, [Answer("mat", 19)])
NONE = Question("b", "Where?", CONTEXT, [])


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: str) -> str:
        Path(name).write_text(content, encoding="utf-8")
        return name

    return write


def test_squad_of_both_versions(file: Any) -> None:
    text = squad(qa(), qa("b", [], is_impossible=True, plausible_answers=[{"text": "cat", "answer_start": 4}]))
    assert read_questions(file("a.json", text)).questions == [ANSWERED, NONE]
    found = read_questions("a.json")
    assert (found.answers, found.answer_spans, found.contexts) == ([["mat"], []], [(19, 22), None], [CONTEXT] * 2)
    several = qa(answers=[{"text": "mat", "answer_start": 19}, {"text": "the mat", "answer_start": 15}])
    (question,) = read_questions(file("b.json", squad(several))).questions
    assert question.answers == [Answer("mat", 19), Answer("the mat", 15)]


def test_flat_rows(file: Any) -> None:
    row = {"id": "a", "question": "Where?", "context": CONTEXT}
    columns = {"text": ["mat"], "answer_start": [19]}
    rows = [row | {"answers": columns}, row | {"id": "b", "answers": {"text": [], "answer_start": []}}]
    lines = "".join(json.dumps(each) + "\n" for each in rows)
    for name, text in (
        ("a.jsonl", lines), ("a.json", lines), ("b.json", json.dumps(rows)), ("c.json", json.dumps({"data": rows}))
    ):  # fmt: skip
        assert read_questions(file(name, text)).questions == [ANSWERED, NONE]
    with open("a.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["question", "context", "answer", "answer_start"], ["Where?", CONTEXT, "mat", 19]])
        writer.writerow(["Where?", CONTEXT, "", ""])
    found = read_questions("a.csv").questions
    assert found == [ANSWERED._replace(id="2"), NONE._replace(id="3")]


def test_without_labels_no_answers_are_read(file: Any) -> None:
    name = file("a.jsonl", json.dumps({"question": "Where?", "context": CONTEXT}) + "\n")
    assert read_questions(name, labelled=False).questions == [NONE._replace(id="1")]
    with pytest.raises(UserError, match=r"a.jsonl has no column 'answers': its columns are 'question', 'context'"):
        read_questions(name)


FLAT = {"question": "Where?", "context": CONTEXT}
WRONG = [
    ("a.json", squad(qa(answers=[{"text": "mat", "answer_start": 20}])), "a.json, data[0].paragraphs[0].qas[0]: expecte"
     "d the answer 'mat' at answer_start 20, got 'at.': it stands at 19"),
    ("a.json", squad(qa(answers=[{"text": "dog", "answer_start": -1}])), "a.json, data[0].paragraphs[0].qas[0]: expecte"
     "d the answer 'dog' at answer_start -1, got 'The': its context does not hold it"),
    ("a.json", squad(qa(answers=[{"text": "", "answer_start": 0}])), "a.json, data[0].paragraphs[0].qas[0]: expected an"
     " answer's text, got \"\": an unanswerable question has no answers"),
    ("a.json", squad(qa(answers=["mat"])), "a.json, data[0].paragraphs[0].qas[0]: expected answers with text and answ"),
    ("a.json", squad(qa(), qa()), "a.json, data[0].paragraphs[0].qas[1]: the id 'a' came before: give each question"),
    ("a.json", squad(qa(), context=None), "a.json, data[0].paragraphs[0].qas[0]: expected text in 'context', got null"),
    ("a.json", squad(), "a.json has no questions: expected data, paragraphs and qas, as SQuAD has them"),
    ("a.json", '{"data": [{"paragraphs": 3}]}', "a.json, data[0]: expected an object with a list of paragraphs"),
    ("a.json", '{"data": [{"paragraphs": [3]}]}', "a.json, data[0].paragraphs[0]: expected an object with a context a"),
    ("a.json", '{"data":\n[}', "a.json is no JSON: line 2: Expecting value"),
    ("a.json", "", "a.json is no JSON: line 1"),
    ("a.json", '{"data": ' + "9" * 5000 + "}", "a.json is no JSON: a number of too many digits"),
    ("a.jsonl", json.dumps(FLAT | {"answers": [{"text": "mat", "answer_start": "x"}]}), "a.jsonl, line 1: expected answ"
     "er_start, the character of the context where 'mat' begins, got 'x'"),
    ("a.jsonl", json.dumps({"question": "", "context": "x", "answers": []}), "a.jsonl, line 1: expected text in 'ques"),
    ("a.txt", "x", "cannot tell the format of a.txt"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said"), WRONG)
def test_a_wrong_question_is_told_by_file_and_place(name: str, content: str, said: str, file: Any) -> None:
    with pytest.raises(UserError) as raised:
        read_questions(file(name, content))
    assert str(raised.value).startswith(said)
    assert "\n" not in str(raised.value)
