"""`minibert finetune` and `minibert evaluate`: what they write and say, resuming, and mistakes in one line, early."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.errors import pip_install
from minibert.model.checkpoint import read_arrays, read_config, write_arrays
from minibert.tasks.finetune import FineTuning, load_model
from minibert.tasks.picture import figure_library
from minibert.tasks.pipeline import pipeline
from minibert.tasks.task import Classify, Tag
from minibert.train.checkpoint import LOCK, STATE
from minibert.train.config import TrainingConfig
from minibert.train.log import LOG
from tests.event_files import event_files, logged, points_in
from tests.toy_tasks import COUNT, FILES, TOKENIZER, command, make, state_file

pytest.importorskip("sklearn.metrics", reason=f"needs scikit-learn: {pip_install('[tasks]')}")
pytest.importorskip("seqeval.metrics", reason=f"needs seqeval: {pip_install('[tasks]')}")

Command = Callable[..., tuple[int, list[str], list[str]]]
QUICK = ("--num-train-epochs", "2", "--learning-rate", "5e-3", "--backend", "numpy")


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as cli:
        folder = make(tmp_path_factory.mktemp("toys"), cli)
        arguments = ("--model", folder / "model", "--train", folder / FILES["classify"], "--output", folder / "tuned")
        assert command(cli, "finetune", "classify", *arguments, *QUICK) == 0
        yield folder


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """A command's exit code, and the lines that it prints and says."""

    def run(*arguments: object) -> tuple[int, list[str], list[str]]:
        code = command(monkeypatch, *arguments)
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def fine_tune(kind: str, toys: Path, output: Path, *more: object) -> tuple[object, ...]:
    task = "classify" if kind == "several" else kind
    separator = ("--label-separator", "|") if kind == "several" else ()
    files = "--model", toys / "model", "--train", toys / FILES[kind], "--output", output
    return "finetune", task, *files, *separator, *more


def strict_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_classifier_from_a_table(ran: Command, toys: Path, tmp_path: Path) -> None:
    test = ("--test", toys / FILES["classify"], "--group-column", "group", "--dtype", "float64")
    code, out, _ = ran(*fine_tune("classify", toys, tmp_path / "run", *test, *QUICK))
    assert code == 0
    assert out[0] == "text: column 'text', label: column 'label'; not read: 'group'"
    assert out[1] == "no --validation: 10% of the examples are held out for it"
    assert out[2].startswith("backend numpy: ") and out[2].endswith(", float64")
    assert out[3].endswith("parameters trained, a new head; 2 labels: neg, pos")
    assert out[4].startswith("examples: 43 to train on (") and out[4].endswith(" tokens), 5 to choose by; 6 steps")
    assert [line.partition(":")[0] for line in out if line.startswith("epoch ")] == ["epoch 0", "epoch 1", "epoch 2"]
    written = {"config.json", "model.safetensors", *TOKENIZER, LOG, "test_results.json", "confusion_matrix.png"}
    found = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith("checkpoint-")}
    assert found == written | {LOCK}

    results = strict_json(tmp_path / "run" / "test_results.json")
    matrix = np.array(results["test_confusion_matrix"])
    assert matrix.sum() == COUNT and matrix.trace() / COUNT == pytest.approx(results["test_accuracy"])
    groups = results["test_by_group"]
    assert [group["count"] for group in groups.values()] == [16, 16, 16] and list(groups) == ["a", "b", "c"]
    assert np.mean([group["accuracy"] for group in groups.values()]) == pytest.approx(results["test_accuracy"])
    assert (tmp_path / "run" / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG\r\n")
    config = strict_json(tmp_path / "run" / "config.json")
    assert config["id2label"] == {"0": "neg", "1": "pos"} and config["dtype"] == "float64"
    assert read_arrays(tmp_path / "run" / "model.safetensors")[0]["classifier.weight"].dtype == np.float64

    code, again, said = ran(
        "evaluate", tmp_path / "run", toys / FILES["classify"], "--dtype", "float64", "--backend", "numpy",
        "--json", tmp_path / "figures.json", "--max-seq-length", "48", "--group-column", "group",
    )  # fmt: skip
    assert code == 0 and "weighted avg" in "\n".join(again) and said[-1] == out[0]
    figures = strict_json(tmp_path / "figures.json")
    assert figures.pop("machine")
    for name, value in figures.items():
        expected = results[name.replace("eval", "test", 1)]
        assert value == (pytest.approx(expected) if isinstance(value, float) else expected)


@pytest.mark.parametrize(
    ("kind", "metric", "labels"),
    [("several", "f1_micro", ["neg", "pos", "wet"]), ("regress", "pearson", ["LABEL_0"]),
     ("tag", "entity_f1", ["B-LOC", "B-PER", "O"]), ("answer", "exact_match", [])],
)  # fmt: skip
def test_other_tasks(kind: str, metric: str, labels: list[str], ran: Command, toys: Path, tmp_path: Path) -> None:
    code, out, _ = ran(*fine_tune(kind, toys, tmp_path / "run", "--test", toys / FILES[kind], *QUICK))
    assert code == 0
    results = strict_json(tmp_path / "run" / "test_results.json")
    assert results["test_loss"] > 0 and 0 <= results[f"test_{metric}"] <= 1
    assert list(read_config(tmp_path / "run").id2label.values()) == labels
    assert not (tmp_path / "run" / "confusion_matrix.png").exists()
    assert "the best model, of step " in "\n".join(out)


def test_event_files_hold_what_the_log_holds(ran: Command, toys: Path, tmp_path: Path) -> None:
    more = ("--tensorboard", "--logging-steps", "1", *QUICK)
    code, out, _ = ran(*fine_tune("classify", toys, tmp_path / "run", *more))
    assert code == 0 and f"for TensorBoard: tensorboard --logdir {tmp_path / 'run'}" in out
    (file,) = event_files(tmp_path / "run")
    start, points = points_in(file)
    assert (start, points) == (0, logged(tmp_path / "run"))
    assert [step for step, _ in points["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in points["eval/accuracy"]] == [0, 3, 6]


def test_a_new_head_is_no_news_and_a_pooler_that_is_missing_is(
    toys: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    arrays, _ = read_arrays(toys / "model" / "model.safetensors")
    pretrained = {f"bert.{name}": array for name, array in arrays.items() if "pooler" not in name}
    pretrained["cls.predictions.bias"] = np.zeros(3, np.float32)
    shutil.copytree(toys / "model", tmp_path / "mlm")
    write_arrays(tmp_path / "mlm" / "model.safetensors", pretrained, {"format": "pt"})
    poolers = "missing: bert.pooler.dense.weight, bert.pooler.dense.bias"
    for model, missing in ((toys / "model", []), (tmp_path / "mlm", [poolers])):
        recwarn.clear()
        load_model(Classify(["neg", "pos"], "single_label_classification"), model, "numpy")
        load_model(Tag(["B-PER", "O"]), model, "numpy")  # it has no pooler
        assert [str(one.message).partition(": ")[2].partition(" (")[0] for one in recwarn] == missing


def test_sequences_are_as_long_as_the_model_takes(ran: Command, toys: Path, tmp_path: Path) -> None:
    """128 tokens are usual, of a model that has positions for them."""
    assert read_config(toys / "model").max_position_embeddings == 48
    assert state_of(toys / "tuned")["config"]["max_seq_length"] == 48
    prefix = ("--peft", "prefix", "--num-virtual-tokens", "30")
    assert ran(*fine_tune("classify", toys, tmp_path / "prefix", *prefix, *QUICK))[0] == 0
    assert state_of(tmp_path / "prefix")["config"]["max_seq_length"] == 18
    assert pipeline(tmp_path / "prefix", "numpy")(["long " * 99])[0]["label"] in ("neg", "pos")
    code, out, _ = ran(*fine_tune("classify", toys, tmp_path / "run", "--max-seq-length", "4", *QUICK))
    assert code == 0 and "note: 43 of 43 texts were cut" in out


def test_few_texts_and_texts_without_a_token(ran: Command, toys: Path, tmp_path: Path) -> None:
    """Characters that a tokenizer drops leave [CLS] [SEP]; a batch may be larger than all there is."""
    table = tmp_path / "few.csv"
    table.write_text("text,label\n\u200b,neg\nthe good house,pos\n\u200b\u200b,neg\n")
    arguments = ("--model", toys / "model", "--train", table, "--validation", table, "--test", table)
    code, out, _ = ran("finetune", "classify", *arguments, "--output", tmp_path / "run", *QUICK)
    assert code == 0 and any(line.endswith("; 2 steps") for line in out)
    words = tmp_path / "few.conll"
    words.write_text("\u200b O\n\nanna B-PER\n")
    arguments = ("--model", toys / "model", "--train", words, "--validation", words, "--test", words)
    code, out, _ = ran("finetune", "tag", *arguments, "--output", tmp_path / "tags", *QUICK,
                       "--per-device-train-batch-size", "1")  # fmt: skip
    assert code == 0 and "note: 1 words lie beyond 48 tokens, or have no token: taken for O" in out


def state_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read_arrays(state_file(folder))[1]["trainer_state"])
    return found


# ------------------------------------------------------------------------------------------------------------ resuming


def interrupted_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is sent SIGINT while it takes a step."""
    train_step = FineTuning.train_step

    def interrupted(run: FineTuning) -> Any:
        if run.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(run)

    monkeypatch.setattr(FineTuning, "train_step", interrupted)


def test_ctrl_c_saves_and_resume_goes_on_with_all_that_was_asked_for(
    ran: Command, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--test", toys / FILES["classify"], "--group-column", "group", *QUICK)
    assert ran(*fine_tune("classify", toys, tmp_path / "whole", *more))[0] == 0
    with monkeypatch.context() as patched:
        interrupted_after(2, patched)
        code, out, _ = ran(*fine_tune("classify", toys, tmp_path / "run", *more))
    assert code == 130 and not (tmp_path / "run" / "test_results.json").exists()
    output = tmp_path / "run"
    assert out[-1] == (
        f"stopped after step 2 of 6, and saved. To go on: minibert finetune classify --output {output} --resume"
    )
    code, out, _ = ran(*out[-1].partition("minibert ")[2].split())
    assert code == 0 and "going on after step 2" in out
    assert any(line.startswith("backend numpy: ") for line in out), "the run's, not the fastest"
    for name in ("test_results.json", "model.safetensors", "config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    code, out, _ = ran("finetune", "classify", "--output", output, "--resume")  # nothing is left to do
    assert code == 0 and "going on after step 6" in out


@pytest.mark.parametrize(
    ("task", "more", "said"),
    [
        ("tag", (), "the run began with task classify, got tag"),
        ("classify", ("--learning-rate", "1e-4"), "the run began with learning_rate 0.005, got 0.0001"),
        ("classify", ("--dtype", "float64"), "the run began with dtype float32, got float64"),
        ("classify", ("--label-column", "group"), "the run began with label_column None, got group"),
        ("classify", ("--validation-split", "0.5"), "the run began with validation_split 0.1, got 0.5"),
        ("classify", ("--deterministic",), "the run began with deterministic False, got True"),
        ("classify", ("--seed", "3"), "the run began with seed 0, got 3"),
    ],
)
def test_what_would_be_another_run_is_refused(
    task: str, more: tuple[str, ...], said: str, refused: Callable[..., str], toys: Path
) -> None:
    assert said in refused("finetune", task, "--output", toys / "tuned", "--resume", *more)


def test_only_a_run_of_fine_tuning_is_resumed(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "nothing to resume in" in refused("finetune", "classify", "--output", tmp_path / "no", "--resume")
    about = {"format": 1, "config": asdict(TrainingConfig()), "options": {}, "progress": {}}
    write_arrays(tmp_path / STATE, {"a": np.zeros(1)}, {"trainer_state": json.dumps(about)})
    said = refused("finetune", "classify", "--output", tmp_path, "--resume")
    assert "is no state of such a run (its setting eval_steps is another command's" in said


def test_other_data_at_the_same_place_are_refused(ran: Command, toys: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.csv"
    changed.write_text((toys / FILES["classify"]).read_text().replace("house", "road"))
    code, _, said = ran("finetune", "classify", "--output", toys / "tuned", "--resume", "--train", changed)
    assert code == 2 and said[-1].startswith("error: ") and "not those this run began with" in said[-1]


# ------------------------------------------------------------------------------------------------------------ mistakes

TABLES = {
    "one_class.csv": "text,label\na,pos\nb,pos\n", "one.csv": "text,label\na,pos\n", "empty.csv": "",
    "header.csv": "text,label\n", "ragged.csv": "text,label\na\n", "no_text.csv": "text,label\na,pos\n,neg\n",
    "unknown.csv": "text,label\na,pos\nb,other\n", "huge.csv": "text,label\na,1\nb,1e30\n",
    "names.csv": "text,label\na,pos\nb,neg\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("guess", "TASK: expected classify, regress, tag, answer, embed, got 'guess'"),
        ("classify --model TOYS/tuned", "expected --model, a folder, and --train, a file"),
        ("classify --model TOYS/absent --train TOYS/classify.csv", "no checkpoint at"),
        ("classify --model TOYS/empty --train TOYS/classify.csv", "no config.json in"),
        ("classify --model TOYS/no_tokenizer --train TOYS/classify.csv", "expected tokenizer.json or vocab.txt in"),
        ("classify --model TOYS/no_weights --train TOYS/classify.csv", "no weights in"),
        (
            "classify --model TOYS/gaps --train TOYS/classify.csv",
            "to number its names from 0 without a gap, got [0, 2]",
        ),
        ("classify --model TOYS/tuned --train absent.csv", "no file "),
        ("classify --model TOYS/tuned --train one_class.csv", "has only the label 'pos': nothing can be learned"),
        ("classify --model TOYS/tuned --train one.csv", "has only the label 'pos': nothing can be learned"),
        ("classify --model TOYS/tuned --train empty.csv", "empty.csv is empty: expected rows"),
        ("classify --model TOYS/tuned --train header.csv", "header.csv has a header and no row"),
        ("classify --model TOYS/tuned --train ragged.csv", "ragged.csv, line 2: expected 2 columns"),
        ("classify --model TOYS/tuned --train no_text.csv", "no_text.csv, line 3: the column 'text' is empty"),
        ("classify --model TOYS/tuned --train TOYS/answer.jsonl", "which column is the label?"),
        ("tag --model TOYS/tuned --train TOYS/classify.csv", "cannot tell the format of "),
        ("answer --model TOYS/tuned --train TOYS/classify.csv", "has no column 'question', 'context', 'answers'"),
        ("regress --model TOYS/tuned --train huge.csv", "huge.csv, line 3: expected a number of at most 1e+15"),
        ("regress --model TOYS/tuned --train names.csv", "names.csv, line 2: expected a finite number"),
        (
            "CLASSIFY --validation unknown.csv",
            "unknown label 'other' in {}/unknown.csv, line 3: the model knows neg, pos",
        ),
        ("CLASSIFY --test unknown.csv", "unknown label 'other' in {}/unknown.csv, line 3: the model knows neg, pos"),
        ("CLASSIFY --test absent.csv", "no file "),
        ("CLASSIFY --test TOYS/classify.csv --group-column no", "classify.csv has no column 'no': its columns are"),
        ("CLASSIFY --group-column group", "--group-column: expected with --test"),
        ("CLASSIFY --metric-for-best-model f2", "metric_for_best_model: expected one of loss, accuracy, f1_micro,"),
        ("CLASSIFY --learning-rate nan", "expected learning_rate to be above 0, got nan"),
        ("CLASSIFY --num-train-epochs 0", "expected num_train_epochs to be above 0, got 0.0"),
        ("CLASSIFY --freeze layers:0-9", "freeze: expected layers from 0 to 0, got layers:0-9"),
        ("CLASSIFY --max-seq-length 2", "expected a max_seq_length of at least 3, got 2"),
        ("CLASSIFY --max-seq-length 64", "expected max_seq_length of at most 48, the model's positions, got 64"),
        ("CLASSIFY --text-column no", "classify.csv has no column 'no' (--text-column)"),
        ("CLASSIFY --lora-r 4", "--lora-r: expected with --peft lora or adalora: leave it out"),
        ("CLASSIFY --peft prefix --target-modules query", "--target-modules: expected with --peft lora or adalora"),
        ("CLASSIFY --peft lora --num-virtual-tokens 4", "--num-virtual-tokens: expected with --peft prefix: leave it"),
        ("CLASSIFY --token-column 1", "--token-column: expected with tag, got it with classify: leave it out"),
        (
            "CLASSIFY --label-separator |  --class-weights balanced",
            "class_weights: expected one class for each example",
        ),
        ("CLASSIFY --label-separator=", "label_separator: expected what stands between two labels, got nothing"),
        (
            "regress --model TOYS/tuned --train huge.csv --label-separator |",
            "--label-separator: expected with classify",
        ),
        ("answer --model TOYS/tuned --train TOYS/answer.jsonl --label-column a", "got it with answer: leave it out"),
        ("CLASSIFY --output TOYS/tuned", "is not empty: go on with the run in it by --resume"),
        ("CLASSIFY --output TOYS/classify.csv", "is a file: name a folder for the output"),
        ("CLASSIFY --output TOYS/classify.csv/run", "cannot write into "),
        (
            "CLASSIFY --dtype int8",
            "--dtype: backend numpy has arrays of float32, float64, float16, bfloat16: not 'int8'",
        ),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: str, said: str, refused: Callable[..., str], toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in TABLES.items():
        Path(name).write_text(text)
    broken_models(toys)
    arguments = arguments.replace("CLASSIFY", "classify --model TOYS/tuned --train TOYS/classify.csv")
    output = () if "--output" in arguments else ("--output", tmp_path / "run")
    words = arguments.replace("TOYS", str(toys)).split()
    assert said.replace("{}", str(tmp_path)) in refused("finetune", *words, *output, "--backend", "numpy")
    assert not (tmp_path / "run").exists()


def broken_models(toys: Path) -> None:
    if (toys / "empty").exists():
        return
    (toys / "empty").mkdir()
    for name, lost in (("no_tokenizer", TOKENIZER), ("no_weights", ("model.safetensors",)), ("gaps", ())):
        (toys / name).mkdir()
        for file in {"config.json", "model.safetensors", *TOKENIZER} - set(lost):
            (toys / name / file).write_bytes((toys / "tuned" / file).read_bytes())
    config = json.loads((toys / "gaps" / "config.json").read_text())
    (toys / "gaps" / "config.json").write_text(json.dumps({**config, "id2label": {"0": "neg", "2": "pos"}}))


def test_tags_have_no_groups(ran: Command, toys: Path, tmp_path: Path) -> None:
    more = ("--test", toys / FILES["tag"], "--group-column", "a", *QUICK)
    code, _, said = ran(*fine_tune("tag", toys, tmp_path / "run", *more))
    assert (
        code == 2 and said[-1] == "error: --group-column: expected with classify or regress, whose files have columns"
    )
    assert not (tmp_path / "run").exists()


def test_a_picture_that_cannot_be_drawn_is_told_before_the_training(
    refused: Callable[..., str], toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure_library()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ("finetune", "classify", "--model", toys / "tuned", "--train", toys / FILES["classify"])
    said = refused(*arguments, "--output", tmp_path / "run", "--test", toys / FILES["classify"], "--backend", "numpy")
    assert "a picture needs matplotlib: pip install" in said
    assert not (tmp_path / "run").exists()


def test_wandb_that_is_missing_is_told_before_the_training(
    refused: Callable[..., str], toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    small = ("--layers", "1", "--hidden", "64", "--tokens-per-batch", "256", "--max-seq-length", "32", "--steps", "1")
    text = ("pretrain", toys / "text.txt", "--vocab-size", "60", "--output", tmp_path / "run", *small)
    for words in (fine_tune("classify", toys, tmp_path / "run"), text):
        said = refused(*words, "--backend", "numpy", "--wandb", "laws")
        assert said == "error: a run of Weights & Biases needs wandb: pip install 'minibert-lab[wandb]'"
        assert not (tmp_path / "run").exists()


def test_a_learning_rate_beyond_all_stops_with_nothing_spoilt(ran: Command, toys: Path, tmp_path: Path) -> None:
    more = ("--num-train-epochs", "2", "--learning-rate", "1e30", "--backend", "numpy")
    code, _, said = ran(*fine_tune("classify", toys, tmp_path / "run", *more))
    assert code == 1 and said[-1].startswith("error: step 2: the loss is nan: first in op ")
    assert all(np.isfinite(array).all() for array in read_arrays(tmp_path / "run" / "model.safetensors")[0].values())
