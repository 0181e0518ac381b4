"""Pretraining an ELECTRA: its losses and log, backends that agree, runs that resume, its folder, and its command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.cli import main
from minibert.data import SHIPPED_TEXT, SHIPPED_VOCABULARY, load_tokenizer, read_documents
from minibert.model.electra_pair import ElectraPair, generator_of
from minibert.train.config import TrainingConfig
from minibert.train.loop import LOG, read_state
from minibert.train.replaced_tokens import ReplacedTokenTrainer
from minibert.train.trainer import Data, prepare
from tests.cli.conftest import refused as refused

TINY = mb.ElectraConfig(
    vocab_size=8000, embedding_size=24, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
    intermediate_size=64, max_position_embeddings=64,
)  # fmt: skip
CONFIG = TrainingConfig(
    objective="rtd", max_steps=6, tokens_per_batch=256, max_seq_length=64, warmup_steps=2, learning_rate=2e-3,
    eval_tokens=500, logging_steps=3, eval_steps=6, save_steps=3,
)  # fmt: skip
MEASURED = ("mlm_loss", "rtd_loss", "rtd_accuracy")


@pytest.fixture(scope="module")
def data() -> Data:
    return prepare(read_documents(SHIPPED_TEXT)[:3], load_tokenizer(SHIPPED_VOCABULARY), CONFIG)


def trainer(
    data: Data, folder: Path, backend: str = "numba", config: TrainingConfig = CONFIG, sizes: mb.ElectraConfig = TINY
) -> ReplacedTokenTrainer:
    pair = ElectraPair(sizes, generator_of(sizes, config.generator_size), backend, seed=config.seed)
    return ReplacedTokenTrainer(pair, data, config, folder)


def events(run: ReplacedTokenTrainer, kind: str) -> list[dict[str, Any]]:
    return [record for what, record in run.run() if what == kind]


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def test_both_losses_fall_and_are_logged(data: Data, tmp_path: Path) -> None:
    config = replace(CONFIG, max_steps=30, eval_steps=30)
    run = trainer(data, tmp_path, config=config)
    steps = events(run, "step")
    first, last = (line for line in log_of(tmp_path) if "eval_loss" in line)
    assert first["eval_mlm_loss"] == pytest.approx(np.log(8000), abs=0.2)
    assert first["eval_rtd_loss"] == pytest.approx(np.log(2), abs=0.05)
    assert last["eval_mlm_loss"] < first["eval_mlm_loss"] - 0.3
    assert last["eval_rtd_loss"] < first["eval_rtd_loss"] - 0.1 and last["eval_rtd_accuracy"] > 0.75
    for line in (first, last):
        assert line["eval_loss"] == pytest.approx(line["eval_mlm_loss"] + 50 * line["eval_rtd_loss"])
        assert 0.1 < line["eval_replaced"] < 0.16, "of the 15 % that are masked"
    for step in steps:
        assert step["loss"] == pytest.approx(step["mlm_loss"] + 50 * step["rtd_loss"], rel=1e-6)
    logged = next(line for line in log_of(tmp_path) if "loss" in line)
    for name in ("loss", *MEASURED):
        assert logged[name] == pytest.approx(np.mean([step[name] for step in steps[:3]]))


def test_backends_agree(data: Data, tmp_path: Path) -> None:
    by_numpy, by_numba = (events(trainer(data, tmp_path / name, name), "step") for name in ("numpy", "numba"))
    for name in ("loss", *MEASURED):
        apart = np.subtract([step[name] for step in by_numba], [step[name] for step in by_numpy])
        assert np.abs(apart).max() < 1e-3, name


def test_passes_count_by_their_masked_tokens_and_by_all(data: Data, tmp_path: Path) -> None:
    config = replace(CONFIG, gradient_accumulation_steps=2, tokens_per_batch=120)
    quiet = replace(TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    run = trainer(data, tmp_path, "numpy", config, quiet)
    loss, tokens = run.forward_backward()
    gradient = np.concatenate([group.grad for group in run.optimizer.groups])
    batches = [run.batches.batch(number) for number in range(2)]
    masked, every = [batch.counted for batch in batches], [len(batch.input_ids) for batch in batches]
    assert tokens == sum(every)
    run.optimizer.zero_grad()
    expected = 0.0
    for number, batch in enumerate(batches):
        run.model.step = number
        out = run.model(run.pack(batch, batch.labels))
        parts = (out.generated.loss, masked[number] / sum(masked)), (out.judged.loss, 50 * every[number] / sum(every))
        for part, weight in parts:
            part.backward(np.asarray(weight, np.float32))
            expected += part.item() * weight
    assert loss == pytest.approx(expected, rel=1e-6)
    by_hand = np.concatenate([group.grad for group in run.optimizer.groups])
    assert np.linalg.norm(gradient - by_hand) < 1e-5 * np.linalg.norm(by_hand)


def test_resumed_run_has_the_same_bits(data: Data, tmp_path: Path) -> None:
    """Stopped in the middle of a log interval."""
    whole = trainer(data, tmp_path / "whole")
    expected = events(whole, "step")
    first = trainer(data, tmp_path / "cut")
    for kind, record in first.run():
        first.stop = kind == "step" and record["step"] == 4
    second = trainer(data, tmp_path / "cut")
    second.resume(read_state(tmp_path / "cut"))
    assert second.step == 4
    for step, other in zip(events(second, "step"), expected[4:], strict=True):
        assert {**step, "seconds": 0} == {**other, "seconds": 0}
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    np.testing.assert_equal(second.model.state_dict(), whole.model.state_dict())


def test_the_folder_is_a_discriminator_and_its_generator(data: Data, tmp_path: Path) -> None:
    run = trainer(data, tmp_path, config=replace(CONFIG, max_steps=1))
    events(run, "step")
    top = mb.ElectraForPreTraining.from_pretrained(tmp_path, strict=True)
    np.testing.assert_equal(top.state_dict(), run.model.discriminator.state_dict())
    generator = mb.ElectraForMaskedLM.from_pretrained(tmp_path / "generator", strict=True)
    np.testing.assert_equal(generator.state_dict(), run.model.generator.state_dict())
    for folder in (tmp_path, tmp_path / "generator"):
        assert load_tokenizer(folder).get_vocab() == data.tokenizer.get_vocab()


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(mb.UserError, match="next_sentence to be False with the objective rtd"):
        replace(CONFIG, next_sentence=True)
    with pytest.raises(mb.UserError, match="objective to be mlm or rtd, got nsp"):
        replace(CONFIG, objective="nsp")
    with pytest.raises(mb.UserError, match="generator_size to be above 0, and 1 at most"):
        replace(CONFIG, generator_size=1.5)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Path, Path]:
    """A short text, and a folder with an ELECTRA of untrained weights."""
    text = tmp_path / "text.txt"
    text.write_text(SHIPPED_TEXT.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    pair = ElectraPair(TINY, generator_of(TINY, 0.5), "numpy", seed=9)
    pair.save_pretrained(tmp_path / "begun", [SHIPPED_VOCABULARY])
    return text, tmp_path / "begun"


SIZES = ("--max-seq-length", 32, "--tokens-per-batch", 128, "--steps", 2, "--backend", "numpy")


def test_the_command_goes_on_from_a_folder_and_resumes(
    begun: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, folder = begun
    output = tmp_path / "out"

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["minibert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        assert (stopped.value.code, said.err) == (0, "")
        return said.out

    said = run("pretrain", text, "--objective", "rtd", "--config", folder, "--output", output, *SIZES)
    assert f"beginning with the weights in {folder}" in said
    assert "held-out generator loss" in said and "of the tokens are original" in said
    assert f"minibert.ElectraForPreTraining.from_pretrained('{output}')" in said
    generator = mb.ElectraForMaskedLM.from_pretrained(output / "generator", "numpy")
    assert generator.config == generator_of(TINY, 0.5), "the folder's own, not of --generator-size"
    run("pretrain", text, "--output", output, "--resume", "--steps", 3)
    assert [line["step"] for line in log_of(output) if "eval_rtd_loss" in line] == [0, 2, 3]


def test_what_the_command_refuses(begun: tuple[Path, Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    text, folder = begun
    common = ("pretrain", text, "--output", tmp_path / "out", *SIZES)
    assert "--rtd-weight: expected with --objective rtd" in refused(*common, "--rtd-weight", 10)
    said = refused(*common, "--config", folder)
    assert "is of model_type 'electra', expected 'bert': give --objective rtd" in said
    said = refused(*common, "--config", folder, "--objective", "rtd", "--generator-size", 0.5)
    assert "--generator-size: the generator in" in said
    said = refused(*common, "--config", folder / "generator", "--objective", "rtd", "--tokenizer", folder)
    assert "no generator in" in said
    assert "objective to be mlm or rtd, got nsp" in refused(*common, "--objective", "nsp")
