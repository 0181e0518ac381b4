"""Pretraining: the loss falls, backends agree, a run that was stopped goes on with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.cli import main
from minibert.cli.compiling import show_compiling
from minibert.cli.running import stopped_by_signals
from minibert.data import SHIPPED_TEXT, SHIPPED_VOCABULARY, load_tokenizer, read_documents
from minibert.errors import UserError
from minibert.kernels.cpu.jit import jit
from minibert.kernels.linear import linear_gelu
from minibert.model.bert import BertForMaskedLM, BertForPreTraining
from minibert.model.config import BertConfig
from minibert.model.packing import IGNORE
from minibert.train.checkpoint import LOCK
from minibert.train.config import TrainingConfig
from minibert.train.guard import NonFiniteError
from minibert.train.loop import LOG, read_state
from minibert.train.trainer import Data, Trainer, prepare
from tests.children import child

TINY = BertConfig(
    vocab_size=8000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
    max_position_embeddings=64,
)  # fmt: skip
CONFIG = TrainingConfig(
    max_steps=12, tokens_per_batch=512, max_seq_length=64, warmup_steps=3, learning_rate=2e-3, eval_tokens=1500,
    logging_steps=4, eval_steps=6, save_steps=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Data:
    return prepare(read_documents(SHIPPED_TEXT)[:4], load_tokenizer(SHIPPED_VOCABULARY), CONFIG)


def trainer(
    data: Data, folder: Path, config: TrainingConfig = CONFIG, backend: str = "numba", dtype: str = "float32"
) -> Trainer:
    return Trainer(BertForMaskedLM(TINY, backend, dtype, config.seed), data, config, folder)


def events(run: Trainer, kind: str) -> list[dict[str, Any]]:
    return [record for what, record in run.run() if what == kind]


def losses(run: Trainer) -> list[float]:
    return [record["loss"] for record in events(run, "step")]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]


def test_loss_falls(data: Data, tmp_path: Path) -> None:
    run = trainer(data, tmp_path, replace(CONFIG, max_steps=40, eval_steps=40))
    first, last = events(run, "eval")
    assert first["step"] == 0 and last["step"] == 40
    assert first["eval_loss"] == pytest.approx(np.log(8000), abs=0.2), "an untrained model guesses evenly"
    assert last["eval_loss"] < first["eval_loss"] - 1.5
    assert last["eval_accuracy"] > first["eval_accuracy"]


def test_backends_agree_with_dropout_on(data: Data, tmp_path: Path) -> None:
    config = replace(CONFIG, max_steps=8)
    by_numpy, by_numba = (losses(trainer(data, tmp_path / name, config, name)) for name in ("numpy", "numba"))
    np.testing.assert_allclose(by_numba, by_numpy, rtol=0, atol=1e-4)
    quiet = replace(TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    without = losses(Trainer(BertForMaskedLM(quiet, "numba"), data, config, tmp_path / "quiet"))
    assert np.abs(np.subtract(without, by_numba)).max() > 1e-3, "dropout was on"


def test_what_a_config_puts_out_changes_no_training(data: Data, tmp_path: Path) -> None:
    config, asking = replace(CONFIG, max_steps=3), replace(TINY, output_hidden_states=True, return_dict=False)
    run = Trainer(BertForMaskedLM(asking, "numba", seed=config.seed), data, config, tmp_path / "asking")
    assert losses(run) == losses(trainer(data, tmp_path / "plain", config))


@pytest.mark.parametrize(("passes", "words"), [(1, False), (2, True)])
def test_resumed_run_has_the_same_bits(data: Data, tmp_path: Path, passes: int, words: bool) -> None:
    """Stopped in the middle of a log interval, and again with steps done after the last checkpoint."""
    settings = {"gradient_accumulation_steps": passes, "tokens_per_batch": 512 // passes, "whole_word_mask": words}
    config = replace(CONFIG, **settings)
    whole = trainer(data, tmp_path / "whole", config)
    expected = losses(whole)

    first = trainer(data, tmp_path / "cut", config)
    begun = []
    for kind, record in first.run():
        if kind == "step":
            begun.append(record["loss"])
            first.stop = record["step"] == 5
    assert begun == expected[:5]

    second = trainer(data, tmp_path / "cut", config)
    second.resume(read_state(tmp_path / "cut"))
    for kind, record in second.run():  # abandoned at step 8: the last checkpoint is that of step 6
        if (kind, record["step"]) == ("log", 8):
            break
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"killed while it was written: the state needs no other file")
    third = trainer(data, tmp_path / "cut", config)
    third.resume(read_state(tmp_path / "cut"))
    assert third.step == 6
    assert losses(third) == expected[6:]

    timed = {"seconds", "tokens_per_second", "save_seconds"}
    kept, cut = (
        [{k: v for k, v in line.items() if k not in timed} for line in log_of(tmp_path / n)] for n in ("whole", "cut")
    )
    assert cut == kept
    for name, values in whole.model.state_dict().items():
        np.testing.assert_array_equal(third.model.state_dict()[name], values, err_msg=name)


def test_log_and_folder(data: Data, tmp_path: Path) -> None:
    run = trainer(data, tmp_path)
    steps = events(run, "step")
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 6, 12]
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [4, 8, 12]
    for line, start in zip(logged, (0, 4, 8), strict=True):
        assert line["loss"] == pytest.approx(np.mean([s["loss"] for s in steps[start : start + 4]]))
        assert line["tokens"] == sum(s["tokens"] for s in steps[: line["step"]])
        assert line["tokens_per_second"] > 0 and line["grad_norm"] > 0
    rates = [s["learning_rate"] for s in steps]
    assert max(rates) == CONFIG.learning_rate == rates[3] and rates[0] < rates[1] and rates[-1] < rates[-2]
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "tokenizer_config.json", LOG, LOCK,
        "checkpoint-6", "checkpoint-12",
    }  # fmt: skip
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert told["model_max_length"] == run.model.config.max_position_embeddings
    loaded = BertForMaskedLM.from_pretrained(tmp_path)
    for name, values in run.model.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[name], values, err_msg=name)


def test_evaluation_repeats_and_matches_the_plain_loss(data: Data, tmp_path: Path) -> None:
    run = trainer(data, tmp_path)
    once = run.evaluate()
    run.model.train()
    assert run.evaluate() == once, "the same masks, dropout off"
    run.model.eval()
    batch = run.held_out[0]
    out = run.model(run.pack(batch, batch.labels))
    index = np.flatnonzero(batch.labels != IGNORE)
    logits = out.logits.numpy()[index].astype(np.float64)
    np.testing.assert_allclose(out.logits_at(index).numpy(), logits, rtol=0, atol=1e-5)
    plain = -np.mean(
        (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(index)), batch.labels[index]]
    )
    run.held_out = [batch]
    assert run.evaluate()["eval_loss"] == pytest.approx(plain, abs=1e-5)
    assert run.evaluate()["eval_accuracy"] == np.mean(logits.argmax(-1) == batch.labels[index])


def test_held_out_text_is_never_trained_on(data: Data) -> None:
    train = {tuple(data.train.ids[a:b]) for a, b in zip(data.train.offsets, data.train.offsets[1:], strict=False)}
    held = [
        tuple(data.held_out.ids[a:b]) for a, b in zip(data.held_out.offsets, data.held_out.offsets[1:], strict=False)
    ]
    assert held and not any(len(sequence) > 20 and sequence in train for sequence in held)


def test_unigram_loss_by_hand(data: Data, tmp_path: Path) -> None:
    run = trainer(data, tmp_path)
    assert np.exp(data.unigram).sum() == pytest.approx(1)
    labels = [int(label) for batch in run.held_out for label in batch.labels if label != IGNORE]
    frequency = np.bincount(data.train.ids, minlength=8000) + 1
    frequency[:5] = 1
    expected = -np.mean([np.log(frequency[label] / frequency.sum()) for label in labels])
    assert run.unigram_loss == pytest.approx(expected)
    assert 4 < run.unigram_loss < np.log(8000)


def test_next_sentence(tmp_path: Path) -> None:
    config = replace(CONFIG, next_sentence=True, max_steps=3, eval_steps=3)
    data = prepare(read_documents(SHIPPED_TEXT)[:4], load_tokenizer(SHIPPED_VOCABULARY), config)
    run = Trainer(BertForPreTraining(TINY, "numba"), data, config, tmp_path)
    untrained = run.model.state_dict()["cls.seq_relationship.weight"]
    evaluations = events(run, "eval")
    assert all(0 <= record["eval_next_sentence_accuracy"] <= 1 for record in evaluations)
    assert not np.array_equal(run.model.state_dict()["cls.seq_relationship.weight"], untrained)
    state = read_state(tmp_path)
    assert state.config == config and state.progress["step"] == 3


def test_sentences_that_none_follows_are_no_next_sentence_task() -> None:
    """One line, one document: of every pair the label would be "does not follow"."""
    documents, tokenizer = [[f"sentence number {i}"] for i in range(50)], load_tokenizer(SHIPPED_VOCABULARY)
    with pytest.raises(UserError, match="each of 50 documents has a single sentence"):
        prepare(documents, tokenizer, replace(CONFIG, next_sentence=True))
    assert len(prepare(documents, tokenizer, CONFIG).train) > 40


def test_guard_names_the_op_and_leaves_the_weights(data: Data, tmp_path: Path) -> None:
    backend = backends.get("numba")
    run = trainer(data, tmp_path, replace(CONFIG, max_steps=4))
    original = backend.kernel(linear_gelu)
    assert original is not None
    calls = 0

    def broken(*arrays: Any, **params: Any) -> Any:
        nonlocal calls
        out, *rest = original(*arrays, **params)
        calls += 1
        if run.step == 2 and out.shape[1] == TINY.intermediate_size:
            out[1, 3] = np.nan
        return (out, *rest)

    with backend.using({linear_gelu: broken}), pytest.raises(NonFiniteError) as caught:
        losses(run)
    assert calls > 0
    message = str(caught.value)
    assert "step 3" in message and "op linear_gelu" in message and "element [1, 3] of output y" in message, message
    assert "its inputs were finite" in message and "\n" not in message
    assert run.step == 2 and all(np.isfinite(values).all() for values in run.model.state_dict().values())
    assert read_state(tmp_path).progress["step"] == 0, "the last good checkpoint is still there"


def test_guard_tells_of_weights_that_went_bad_before(data: Data, tmp_path: Path) -> None:
    run = trainer(data, tmp_path)
    dict(run.model.named_parameters())["bert.encoder.layer.1.output.dense.weight"].data[2, 5] = np.inf
    with pytest.raises(NonFiniteError, match="was not finite before"):
        run.train_step()


@pytest.mark.parametrize(
    "wrong",
    [{"max_steps": 0}, {"max_steps": 2.5}, {"learning_rate": -1e-3}, {"learning_rate": float("nan")}, {"seed": -1},
     {"tokens_per_batch": -5}, {"held_out": 1.5}, {"mlm_probability": 0.0}, {"warmup_steps": -1}, {"save_steps": 0},
     {"warmup_steps": 2.5}, {"warmup_steps": True}, {"max_steps": None}],
)  # fmt: skip
def test_config_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        TrainingConfig(**wrong)


@pytest.mark.parametrize(("given", "expected"), [(None, 100), (0, 0), (1, 1), (250, 250)])
def test_warmup_steps_that_are_given_are_taken(given: int | None, expected: int) -> None:
    assert TrainingConfig(max_steps=1000, warmup_steps=given).warmup == expected


def test_numbers_of_numpy_become_pythons() -> None:
    config = TrainingConfig(
        max_steps=np.int64(7), warmup_steps=np.int32(2), weight_decay=np.float32(0.5), seed=np.uint8(3)
    )
    values = config.max_steps, config.warmup_steps, config.weight_decay, config.seed
    assert values == (7, 2, 0.5, 3) and [type(v) for v in values] == [int, int, float, int]


def test_without_warmup_the_first_step_is_the_largest(data: Data, tmp_path: Path) -> None:
    rates = [step["learning_rate"] for step in events(trainer(data, tmp_path, replace(CONFIG, warmup_steps=0)), "step")]
    assert rates[0] == CONFIG.learning_rate and rates == sorted(rates, reverse=True)


def test_another_text_cannot_be_resumed(data: Data, tmp_path: Path) -> None:
    run = trainer(data, tmp_path, replace(CONFIG, max_steps=1))
    losses(run)
    other = prepare(read_documents(SHIPPED_TEXT)[4:7], data.tokenizer, CONFIG)
    with pytest.raises(UserError, match="the text"):
        trainer(other, tmp_path).resume(read_state(tmp_path))


@pytest.fixture
def small_text(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "text.txt"
    path.write_text(SHIPPED_TEXT.read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    yield path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["minibert", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0


FEW_STEPS = ["--steps", 2, "--max-seq-length", 32, "--tokens-per-batch", 256]


def test_command_trains_a_vocabulary_and_goes_on_from_weights(
    small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, first, second = (tmp_path / name for name in ("words", "first", "second"))
    command(monkeypatch, "tokenizer", "train", small_text, "--output", words, "--vocab-size", 600)
    assert "600 tokens" in capsys.readouterr().out
    command(monkeypatch, "tokenizer", "show", "the Senate", "--tokenizer", words)
    assert capsys.readouterr().out.startswith("[CLS]:2 the:")

    sizes = ["--layers", 1, "--hidden", 64]
    command(monkeypatch, "pretrain", small_text, "--output", first, "--tokenizer", words, *sizes, *FEW_STEPS)
    out = capsys.readouterr().out
    assert "backend numba" in out and "1 layers of 64 channels, vocabulary 600" in out and "to beat" in out
    assert "step 2/2: loss" in out and "step 2: held-out loss" in out

    command(monkeypatch, "pretrain", small_text, "--output", second, "--config", first, *FEW_STEPS)
    assert "beginning with the weights" in capsys.readouterr().out
    assert log_of(second)[0]["eval_loss"] == pytest.approx(log_of(first)[-1]["eval_loss"], abs=1e-6)
    command(monkeypatch, "pretrain", "--output", second, "--resume")
    assert "done before" in capsys.readouterr().out


def test_command_says_what_it_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "google.txt"
    text.write_text("the senate\nmet. It spoke. Then\n\nthe house\n\nthe law\n\n" * 4, encoding="utf-8")
    arguments = ["--layers", 1, "--hidden", 64, "--tokenizer", SHIPPED_VOCABULARY, *FEW_STEPS, "--warmup-steps", 0]
    command(monkeypatch, "pretrain", text, "--output", tmp_path / "plain", *arguments)
    out = capsys.readouterr().out
    assert "text: 1 file, 1 document, 20 sentences, 48 tokens; no two blank lines" in out
    assert "name it, as --document-separator blank-line\n" in out
    assert read_state(tmp_path / "plain").config.warmup_steps == 0

    cut = ["--document-separator", "blank-line"]
    command(monkeypatch, "pretrain", text, "--output", tmp_path / "cut", *arguments, *cut)
    assert "text: 1 file, 12 documents, 16 sentences, 48 tokens\n" in capsys.readouterr().out
    command(monkeypatch, "pretrain", "--output", tmp_path / "cut", "--resume", "--steps", 3)
    assert "text: 1 file, 12 documents, 16 sentences, 48 tokens\n" in capsys.readouterr().out


def test_command_takes_a_kernel_and_the_shipped_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("def broken(x):\n    return x.sum() * float('nan')\n", encoding="utf-8")
    arguments = [
        "--output",
        tmp_path / "out",
        "--layers",
        1,
        "--hidden",
        64,
        "--tokenizer",
        SHIPPED_VOCABULARY,
        *FEW_STEPS,
    ]
    monkeypatch.setattr(sys, "argv", ["minibert", "pretrain", *map(str, arguments)])
    spec = f"{tmp_path / 'mine.py'}:broken=square_norm"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--kernel", spec])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    assert stopped.value.code == 1
    assert "no TEXT given" in said.out and "first in op square_norm" in said.err and len(said.err.splitlines()) == 1


def test_compiling_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """The function has no file, so it is compiled anew in each process."""
    space: dict[str, Any] = {}
    exec("def doubled_rows(x, start, stop):\n    for i in range(start, stop):\n        x[i] *= 2\n", space)
    kernel, shown = jit(space["doubled_rows"]), []
    x = np.ones(3, np.float32)
    with show_compiling(shown.append):
        kernel(x, 0, 2)
    assert x.tolist() == [2, 2, 1]
    assert shown == ["compiling kernel 1 for this CPU: doubled_rows float32"]
    assert "compiled 1 kernels in" in capsys.readouterr().err
    with show_compiling(shown.append):
        kernel(x, 0, 2)
    assert len(shown) == 1 and capsys.readouterr().err == ""


COMMAND = [
    sys.executable, "-m", "minibert", "pretrain", "--steps", "400", "--layers", "1", "--hidden", "64",
    "--tokens-per-batch", "256", "--max-seq-length", "32", "--log-every", "1", "--eval-every", "1000",
    "--save-every", "1000", "--tokenizer", str(SHIPPED_VOCABULARY),
]  # fmt: skip


def test_an_ignored_interrupt_stays_ignored(data: Data, tmp_path: Path) -> None:
    """As in the background of a shell, whose foreground it is that Ctrl-C is for; SIGTERM still stops the run."""
    run = trainer(data, tmp_path)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopped_by_signals(run):
            signal.raise_signal(signal.SIGINT)
            assert not run.stop
            signal.raise_signal(signal.SIGTERM)
            assert run.stop and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "a second one ends it at once"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_resume_goes_on(
    small_text: Path, tmp_path: Path, root: Path, number: signal.Signals
) -> None:
    output = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [*COMMAND, str(small_text), "--output", str(output)]
    with child(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not (output / LOG).is_file() or len((output / LOG).read_text().splitlines()) < 4:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == 128 + number, out + err
    stopped = read_state(output).progress["step"]
    assert 0 < stopped < 400
    assert f"stopped after step {stopped} of 400" in out and f"minibert pretrain --output {output} --resume" in out
    steps = [line["step"] for line in log_of(output) if "loss" in line]
    assert steps == list(range(1, stopped + 1))

    again = [
        sys.executable,
        "-m",
        "minibert",
        "pretrain",
        "--output",
        str(output),
        "--resume",
        "--steps",
        str(stopped + 2),
    ]
    finished = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert [line["step"] for line in log_of(output) if "loss" in line] == list(range(1, stopped + 3))
