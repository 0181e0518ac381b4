"""Toy tasks that a tiny BERT learns in a second, as files, and a model and its tokenizer to begin with."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.cli import main
from minibert.data import load_tokenizer
from minibert.model.checkpoint import read_arrays
from minibert.tasks.examples import read_texts
from minibert.tasks.finetune import FineTuning, FineTuningConfig, load_model, names_for
from minibert.tasks.questions import read_questions
from minibert.tasks.task import Answer, Classify, Tag, Task
from minibert.tasks.words import read_words
from minibert.train.checkpoint import STATE, checkpoints
from minibert.train.log import read_log

GOOD, BAD = ["good", "fine", "happy", "sweet", "bright", "warm"], ["bad", "poor", "sad", "sour", "dark", "cold"]
NOUNS = ["river", "house", "garden", "song", "child", "road"]
PEOPLE, PLACES = ["anna", "peter", "maria"], ["paris", "rome", "berlin"]
COUNT = 48  # examples of each task
FILES = {
    "classify": "classify.csv", "several": "several.csv", "regress": "regress.csv", "tag": "tag.conll",
    "answer": "answer.jsonl",
}  # fmt: skip
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
CONFIG = FineTuningConfig(
    learning_rate=5e-3, num_train_epochs=6, per_device_train_batch_size=4, gradient_accumulation_steps=2,
    max_seq_length=32,
)  # fmt: skip
SHORT = replace(CONFIG, num_train_epochs=2, per_device_train_batch_size=8, logging_steps=2, save_steps=4)


def make(folder: Path, cli: pytest.MonkeyPatch) -> Path:
    """Write into a folder `model`, of one layer, the same without dropout as `still`, and the files of all tasks."""
    rng = random.Random(0)

    def sentence(words: list[str]) -> str:
        return " ".join(["the", rng.choice(words), rng.choice(NOUNS), "was", *rng.choices(words, k=rng.randint(1, 4))])

    rows = [("pos", sentence(GOOD)) if number % 2 else ("neg", sentence(BAD)) for number in range(COUNT)]
    tables = {
        "classify": [(text, label, "abc"[n % 3]) for n, (label, text) in enumerate(rows)],
        "several": [(text, f"{label}|wet" if "river" in text else label, "a") for label, text in rows],
        "regress": [(text, 2 * (label == "pos") + n / COUNT, "a") for n, (label, text) in enumerate(rows)],
    }
    for name, table in tables.items():
        lines = ["text,label,group", *(",".join(map(str, row)) for row in table)]
        (folder / FILES[name]).write_text("\n".join(lines) + "\n")
    sentences, questions = [], []
    for number in range(COUNT):
        who, where = rng.choice(PEOPLE), rng.choice(PLACES)
        words = [f"{who} B-PER", "went O", "to O", f"{where} B-LOC"] + ["happy O"] * (number % 4)
        sentences.append("\n".join(words) + "\n")
        context = f"the {rng.choice(NOUNS)} of {who} was {'so ' * (number % 3)}in {where} ."
        answers = {"text": [where], "answer_start": [context.index(where)]}
        questions.append({"id": str(number), "question": "where ?", "context": context, "answers": answers})
    (folder / FILES["tag"]).write_text("\n".join(sentences))
    (folder / FILES["answer"]).write_text("\n".join(map(json.dumps, questions)))
    (folder / "text.txt").write_text("\n".join((folder / file).read_text() for file in FILES.values()))
    command(cli, "tokenizer", "train", folder / "text.txt", "--output", folder / "model", "--vocab-size", 200)
    config = mb.BertConfig(
        vocab_size=load_tokenizer(folder / "model").get_vocab_size(), hidden_size=64, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=48, initializer_range=0.1,
    )  # fmt: skip
    still = replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for name, each in {"model": config, "still": still}.items():
        files = [folder / "model" / file for file in TOKENIZER]
        mb.BertModel(each, "numpy", seed=1).save_pretrained(folder / name, files)
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run a command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["minibert", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def examples_of(kind: str, folder: Path) -> Any:
    path = folder / FILES[kind]
    if kind == "answer":
        return read_questions(path)
    if kind == "tag":
        return read_words(path)
    options = {"label_separator": "|"} if kind == "several" else {}
    return read_texts(path, "regress" if kind == "regress" else "classify", **options)


def task_of(examples: Any, folder: Path) -> Task:
    """The task of examples, with the labels of the model in the folder where they are its own."""
    if not hasattr(examples, "label_names"):
        return Answer()
    kind = Classify if hasattr(examples, "texts") else Tag
    names = names_for(examples, folder, kind)
    return Tag(names) if kind is Tag else Classify.of(examples, names)


def run_of(
    kind: str, folder: Path, output: Path, backend: str = "numpy", dtype: str = "float32", config: Any = CONFIG,
    cls: type[FineTuning] = FineTuning, model: str = "model",
) -> FineTuning:  # fmt: skip
    """A run on three quarters of a toy, evaluated on the rest."""
    examples, tokenizer = examples_of(kind, folder), load_tokenizer(folder / model)
    task = task_of(examples, folder / model)
    rows = list(range(COUNT))
    parts = [task.prepare(examples.subset(some), tokenizer, config.max_seq_length) for some in (rows[12:], rows[:12])]
    found, new = load_model(task, folder / model, backend, dtype, config.seed)
    return cls(found, task, *parts, tokenizer, config, output, new=new)


class Scripted(FineTuning):
    """A run whose evaluations are given: by epoch the accuracy, and the loss."""

    script: list[tuple[float | None, float | None]]
    kept: list[int]

    def evaluate(self) -> dict[str, Any]:
        accuracy, loss = self.script[round(self.epoch)]
        figures = {"eval_loss": loss, "eval_accuracy": accuracy, "eval_matthews_correlation": None}
        return {"epoch": round(self.epoch, 4), **figures}

    def save_best(self, folder: Path) -> None:
        super().save_best(folder)
        self.kept = [*getattr(self, "kept", []), round(self.epoch)]


def scripted(toys: Path, output: Path, script: Any, **changes: Any) -> Scripted:
    one_step = replace(CONFIG, num_train_epochs=len(script) - 1, per_device_train_batch_size=18, **changes)
    run = run_of("classify", toys, output, config=one_step, cls=Scripted)
    assert isinstance(run, Scripted) and run.ends[0] == 1
    run.script = script
    return run


def stopping(run: FineTuning, step: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """All that comes of a run that is told to stop after a step."""
    run.stop = step == run.step
    for kind, record in run.run():
        run.stop = run.stop or run.step == step
        yield kind, record


def weights(folder: Path) -> dict[str, np.ndarray]:
    return read_arrays(folder / "model.safetensors")[0]


def state_file(folder: Path) -> Path:
    """That of the newest checkpoint in the output of a run."""
    return checkpoints(folder)[0] / STATE


def the_log(folder: Path) -> list[dict[str, Any]]:
    """The log, without how long things took."""
    return [{key: value for key, value in line.items() if "second" not in key} for line in read_log(folder)]
