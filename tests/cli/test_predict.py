"""`minibert predict`: a row for each text, sentence or question, from files and as lines come; and mistakes."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minibert.cli import predict as command_module
from minibert.model.checkpoint import read_arrays, write_arrays
from minibert.tasks.finetune import load_model
from minibert.tasks.pipeline import pipeline
from minibert.tasks.task import Answer, Classify, Tag
from tests.toy_tasks import COUNT, FILES, TOKENIZER, command, make

Rows = list[dict[str, Any]]
TASKS = {
    "classify": Classify(["neg", "pos"], "single_label_classification"),
    "several": Classify(["neg", "pos", "wet"], "multi_label_classification"),
    "regress": Classify(["LABEL_0"], "regression"), "tag": Tag(["B-LOC", "B-PER", "O"]), "answer": Answer(),
}  # fmt: skip
TEXTS = ["the good river was good", "", "the sad song", "the  warm, road was\tbright"]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as cli:
        folder = make(tmp_path_factory.mktemp("toys"), cli)
        for kind, task in TASKS.items():
            files = [folder / "model" / name for name in TOKENIZER]
            load_model(task, folder / "model", "numpy", seed=5)[0].save_pretrained(folder / kind, files)
        yield folder


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], toys: Path) -> Callable[..., str]:
    """What `predict` prints, of a file or of what stands on standard input."""

    def run(kind: str, *arguments: object, given: str = "") -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
        code = command(monkeypatch, "predict", toys / kind, *arguments, "--backend", "numpy")
        out, err = capsys.readouterr()
        assert code == 0, err
        assert err.startswith("backend numpy: ")
        return out

    return run


def rows_in(text: str) -> Rows:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("at_once", [1024, 5])
def test_a_row_for_each_text_in_order(
    at_once: int, predicted: Callable[..., str], toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "ROWS_AT_ONCE", at_once)
    texts = [row["text"] for row in csv.DictReader((toys / FILES["classify"]).open())]
    found = rows_in(predicted("classify", toys / FILES["classify"], "--batch-tokens", "30"))
    assert [row["text"] for row in found] == texts and len(texts) == COUNT
    expected = pipeline(toys / "classify", "numpy")(texts)
    for row, other in zip(found, expected, strict=True):
        assert row["scores"] == pytest.approx(other["scores"], abs=1e-6)
        assert sum(row["scores"].values()) == pytest.approx(1)
        assert row["label"] == max(row["scores"], key=row["scores"].__getitem__)
        assert row["score"] == row["scores"][row["label"]]


def test_lines_of_standard_input_are_texts(predicted: Callable[..., str]) -> None:
    found = rows_in(predicted("classify", given="\n".join(TEXTS)))
    assert [row["text"] for row in found] == TEXTS, "a blank line has an answer too"


@pytest.mark.parametrize(("format", "given"), [
    ("csv", "id,text\n1,the good river\n2,\n"), ("tsv", "id\ttext\n1\tthe good river\n2\t\n"),
    ("jsonl", '{"text": "the good river"}\n{"text": ""}\n'), ("txt", "the good river\n\n"),
])  # fmt: skip
def test_formats_of_standard_input(format: str, given: str, predicted: Callable[..., str]) -> None:
    found = rows_in(predicted("classify", "--format", format, given=given))
    assert [row["text"] for row in found] == ["the good river", ""]


def test_several_classes_and_numbers(predicted: Callable[..., str]) -> None:
    for row in rows_in(predicted("several", given="\n".join(TEXTS))):
        assert row["labels"] == [name for name, score in row["scores"].items() if score >= 0.5]
        assert list(row["scores"]) == ["neg", "pos", "wet"]
    assert [list(row) for row in rows_in(predicted("regress", given="\n".join(TEXTS)))] == 4 * [["text", "prediction"]]


def test_tags_of_words_and_of_plain_text(predicted: Callable[..., str], toys: Path) -> None:
    found = rows_in(predicted("tag", toys / FILES["tag"], "--format", "conll"))
    assert len(found) == COUNT and all(len(row["tokens"]) == len(row["tags"]) for row in found)
    text = "anna  went to rome."
    rows = rows_in(predicted("tag", given=f"{text}\n\npeter\n"))
    assert [row["tokens"] for row in rows] == [["anna", "went", "to", "rome", "."], [], ["peter"]]
    for row in rows:
        assert all(row["text"][each["start"] : each["end"]] == each["word"] for each in row["entities"])


@pytest.mark.parametrize("way", ["file", "stdin", "stdin as jsonl"])
def test_answers(way: str, predicted: Callable[..., str], toys: Path) -> None:
    path = toys / FILES["answer"]
    arguments = [path] if way == "file" else ["--format", "jsonl"] if "as" in way else []
    found = rows_in(predicted("answer", *arguments, given=path.read_text()))
    assert [row["id"] for row in found] == [str(number) for number in range(COUNT)]
    contexts = [json.loads(line)["context"] for line in path.read_text().splitlines()]
    for row, context in zip(found, contexts, strict=True):
        assert context[row["start"] : row["end"]] == row["answer"]


def test_files_of_csv_and_json_lines(predicted: Callable[..., str], tmp_path: Path) -> None:
    given = "\n".join([*TEXTS, 'a "quoted", text'])
    for kind in ("classify", "several", "regress", "tag"):
        out = rows_in(predicted(kind, given=given))
        for name in ("a.csv", "a.jsonl"):
            assert predicted(kind, "--output", tmp_path / name, given=given) == ""
        assert rows_in((tmp_path / "a.jsonl").read_text()) == out
        table = list(csv.DictReader((tmp_path / "a.csv").open(newline="")))
        for row, expected in zip(table, out, strict=True):
            assert row.keys() == expected.keys()
            for key, value in expected.items():
                assert row[key] == value if isinstance(value, str) else json.loads(row[key]) == value
        for name in ("a.csv", "a.jsonl"):
            (tmp_path / name).unlink()
    assert list(tmp_path.iterdir()) == []


def test_float64(predicted: Callable[..., str]) -> None:
    narrow, wide = (rows_in(predicted("regress", "--dtype", name, given=TEXTS[0])) for name in ("float32", "float64"))
    assert narrow[0]["prediction"] == pytest.approx(wide[0]["prediction"], abs=1e-6)


def started(toys: Path, root: Path, kind: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "minibert", "predict", str(toys / kind), "--backend", "numpy"], cwd=root,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_line_is_answered_before_the_next_is_there(toys: Path, root: Path) -> None:
    """As a person or a program at the other end of a pipe needs it; Ctrl-C ends the wait."""
    with started(toys, root, "tag") as running:
        assert running.stdin and running.stdout and running.stderr
        for line in ("anna went to rome", "", "peter"):
            running.stdin.write(line + "\n")
            running.stdin.flush()
            assert json.loads(running.stdout.readline())["text"] == line
        os.kill(running.pid, signal.SIGINT)
        assert running.wait(timeout=60) == 130
        assert running.stderr.read().splitlines()[1:] == ["stopped by SIGINT"], "beside the backend"


def test_rows_that_wait_go_through_together() -> None:
    """What came while a part was at work is one part; an error comes after the rows before it."""

    def rows() -> Iterator[int]:
        yield from range(2500)
        raise ValueError("row 2500")

    found: list[int] = []
    sizes = []
    with pytest.raises(ValueError, match="row 2500"):
        for part in command_module.as_they_come(rows()):
            found += part
            sizes.append(len(part))
            if len(sizes) == 1:
                time.sleep(0.2)  # the reader goes on meanwhile
    assert found == list(range(2500)) and max(sizes) > 500


# ------------------------------------------------------------------------------------------------------------ mistakes


def changed(toys: Path, folder: Path, **config: Any) -> Path:
    """The classifier with another config.json, in another folder."""
    folder.mkdir()
    for name in ("model.safetensors", *TOKENIZER):
        (folder / name).write_bytes((toys / "classify" / name).read_bytes())
    own = json.loads((toys / "classify" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**own, **config}))
    return folder


@pytest.mark.parametrize("name", ["predict", "evaluate"])
@pytest.mark.parametrize(
    ("config", "said"),
    [({"architectures": None}, "holds a model without a name: expected a fine-tuned model"),
     ({"architectures": ["BertForMaskedLM"]}, "holds BertForMaskedLM: expected a fine-tuned model"),
     ({"id2label": {"0": "neg", "2": "pos"}}, "to number its names from 0 without a gap, got [0, 2]"),
     ({"problem_type": "regression"}, "expected a single label with problem_type regression, got 2"),
     ({"id2label": {"0": "pos"}}, "expected two labels or more with problem_type single_label_classification, got 1")],
)  # fmt: skip
def test_models_of_another_kind(
    name: str, config: dict[str, Any], said: str, refused: Callable[..., str], toys: Path, tmp_path: Path
) -> None:
    folder = changed(toys, tmp_path / "model", **config)
    error = refused(name, folder, toys / FILES["classify"], "--backend", "numpy")
    assert error.startswith(f"error: {folder}") and said in error


def test_a_model_without_its_head(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head drawn at random predicts nothing."""
    folder = changed(toys, tmp_path / "model")
    arrays = read_arrays(folder / "model.safetensors")[0]
    write_arrays(folder / "model.safetensors", {n: a for n, a in arrays.items() if not n.startswith("classifier")})
    assert command(monkeypatch, "predict", folder, toys / FILES["classify"], "--backend", "numpy") == 2
    out, err = capsys.readouterr()
    assert not out and err.splitlines()[-1] == (
        f"error: {folder} lacks classifier.bias, classifier.weight: fine-tune it first"
    )


def test_an_output_is_not_replaced(refused: Callable[..., str], toys: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.csv"
    kept.write_text("mine")
    file = toys / FILES["classify"]
    assert "kept.csv exists: name another file" in refused("predict", toys / "classify", file, "--output", kept)
    assert kept.read_text() == "mine"
    said = refused("predict", toys / "classify", file, "--output", tmp_path / "a.txt")
    assert "expected a name that ends in .jsonl or .csv" in said
    said = refused("predict", toys / "classify", file, "--output", tmp_path / "no" / "a.csv")
    assert "there is no folder" in said


@pytest.mark.parametrize(
    ("kind", "arguments", "given", "said"),
    [
        ("classify", [], "", " is empty: expected text"),
        ("classify", ["--format", "xml"], "a", "error: expected a format of csv, json, jsonl, tsv, txt, got 'xml'"),
        ("classify", ["--token-column", "1"], "a", "error: --token-column: expected with tag, got it with classify"),
        (
            "tag",
            ["--text-column", "a"],
            "a",
            "error: --text-column: expected with classify or regress or embed, got it with tag",
        ),
        ("answer", [], "{", "is no JSON: line 1"),
        (
            "classify",
            ["--max-seq-length", "49"],
            "a",
            "expected max_seq_length from 3 to 48, the model's positions, got 49",
        ),
    ],
)
def test_a_mistake_is_told(
    kind: str, arguments: list[str], given: str, said: str, toys: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    assert command(monkeypatch, "predict", toys / kind, *arguments, "--backend", "numpy") == 2
    out, err = capsys.readouterr()
    assert not out and said in err.splitlines()[-1]


def test_a_bad_row_is_told_after_the_rows_before_it(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.csv"
    for more, count in (((), 2), (("--output", output), 0)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text\na\nb\nc,d\n")))
        assert command(monkeypatch, "predict", toys / "classify", "--format", "csv", "--backend", "numpy", *more) == 2
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == count
        assert err.splitlines()[-1].startswith("error: the input, line 4: expected 1 columns, as in the header, got 2")
    assert list(tmp_path.iterdir()) == [], "a file is written whole, or not at all"


def test_evaluation_of_texts_that_the_model_has_no_label_for(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,pos\nb,other\n")
    assert command(monkeypatch, "evaluate", toys / "classify", tmp_path / "a.csv", "--backend", "numpy") == 2
    said = f"error: unknown label 'other' in {tmp_path / 'a.csv'}, line 3: the model knows neg, pos"
    assert capsys.readouterr().err.splitlines()[-1] == said
