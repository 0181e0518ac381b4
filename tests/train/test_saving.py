"""Saving while training goes on: by another thread, one write at a time; a failure is told, and nothing is lost."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import minibert.train.saving
from minibert.cli import main
from minibert.data import SHIPPED_TEXT
from minibert.errors import WriteError
from minibert.train.checkpoint import checkpoints, read_state, write_checkpoint
from minibert.train.log import read_log
from minibert.train.trainer import Data
from tests.stopped_calls import failing
from tests.tiny_runs import result, resumed, trainer


def test_training_goes_on_meanwhile_and_one_write_waits_for_another(
    tiny: Data, straight: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of step 1 ends only once step 2 is done: who would wait for it waited for ever."""
    run = trainer(tiny, tmp_path)
    on, done, here = threading.Event(), threading.Event(), threading.get_ident()
    writing: list[int] = []

    def slow(output: Path, step: int, fill: Callable[[Path], Any]) -> Path:
        assert not writing and threading.get_ident() != here
        writing.append(step)
        if step == 1:
            assert on.wait(60)
        path = write_checkpoint(output, step, fill)
        writing.clear()
        if step == 1:
            done.set()
        return path

    monkeypatch.setattr(minibert.train.saving, "write_checkpoint", slow)
    for kind, record in run.run():
        if (kind, record["step"]) == ("step", 2):
            assert writing == [1] and [path.name for path in checkpoints(tmp_path)] == ["checkpoint-0"]
            on.set()
            assert done.wait(60)
    assert result(tmp_path) == straight, "what is written is the step's own, not what came of it since"
    lost = [record["save_seconds"] for record in read_log(tmp_path) if "loss" in record]
    assert len(lost) == 3 and 0 < lost[0] < lost[1] < lost[2] < run.progress["save_seconds"]


def test_a_write_that_fails_is_told_and_the_run_goes_on(
    tiny: Data, straight: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = failing(monkeypatch, 1, 2)
    with pytest.warns(UserWarning, match=r"step [12]: cannot write .*checkpoint-0 is whole.*the run goes on") as told:
        list(trainer(tiny, tmp_path).run())
    assert tried == [0, 1, 2, 3] and len(told) == 2
    assert result(tmp_path) == straight


@pytest.mark.parametrize(("step", "settings"), [(0, {}), (1, {"save_errors": "fatal"}), (3, {})])
def test_a_write_that_fails_ends_the_run_where_asked_and_the_first_and_last_always(
    step: int,
    settings: dict[str, Any],
    tiny: Data,
    straight: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, step)
        with pytest.raises(WriteError, match=f"step {step}: cannot write into .*No space left on device"):
            list(trainer(tiny, tmp_path, **settings).run())
    run = trainer(tiny, tmp_path) if step == 0 else resumed(tiny, tmp_path, save_errors="report")
    list(run.run())
    assert result(tmp_path) == straight


def test_the_command_fails_where_its_last_checkpoint_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SHIPPED_TEXT.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    words = [text, "--output", tmp_path / "run", "--layers", 1, "--hidden", 64, "--steps", 2, "--save-every", 1,
             "--vocab-size", 300, "--max-seq-length", 32, "--tokens-per-batch", 64, "--backend", "numpy"]  # fmt: skip

    def ended(*words: object) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "argv", ["minibert", "pretrain", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, capsys.readouterr()

    with monkeypatch.context() as patch:
        failing(patch, 1, 2)
        code, said = ended(*words)
    *warned, last = said.err.splitlines()
    assert code == 1 and "step 2: cannot write into" in last and last.endswith("--resume goes on from there")
    assert len(warned) == 1 and "warning: step 1: cannot write" in warned[0]
    code, said = ended("--resume", "--output", tmp_path / "run", "--save-errors", "fatal")
    assert code == 0 and "stood still for 0." in said.out
    assert read_state(tmp_path / "run").config.save_errors == "fatal"
