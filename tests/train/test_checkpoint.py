"""Checkpoints: whole or not there, whatever fails and wherever a process dies; and a run resumed from them is the same.

A save is a row of calls of the system. Each of them is made to fail, as on a full disk, and to be the last one, as when
the process is killed; then the run is resumed, or begun again, and must end as the one that was left alone.
"""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.cli import main
from minibert.data import SHIPPED_TEXT, read_documents, train_tokenizer
from minibert.errors import UserError, WriteError
from minibert.model.bert import BertForMaskedLM
from minibert.model.checkpoint import read_arrays, write_arrays
from minibert.train.checkpoint import LOCK, MANIFEST, STATE, checkpoints, read_state
from minibert.train.config import TrainingConfig
from minibert.train.guard import NonFiniteError
from minibert.train.log import LOG, read_log
from minibert.train.trainer import Data, Trainer, prepare
from tests.small_steps import TINY
from tests.stopped_calls import Killed, stopping_at

CONFIG = TrainingConfig(
    max_steps=3, tokens_per_batch=64, max_seq_length=32, eval_tokens=64, logging_steps=1, eval_steps=2, save_steps=1,
    save_total_limit=1,
)  # fmt: skip
MODEL = replace(TINY, vocab_size=300)


@pytest.fixture(scope="module")
def data() -> Data:
    documents = read_documents(SHIPPED_TEXT)[:2]
    return prepare(documents, train_tokenizer(documents, 300), CONFIG)


def trainer(data: Data, folder: Path, **changes: Any) -> Trainer:
    config = replace(CONFIG, **changes)
    return Trainer(BertForMaskedLM(MODEL, "numpy", seed=config.seed), data, config, folder)


def resumed(data: Data, folder: Path, **changes: Any) -> Trainer:
    run = trainer(data, folder, **changes)
    run.resume(read_state(folder))
    return run


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: untimed(v) if isinstance(v, dict) else v for name, v in values.items() if "second" not in name}


def result(folder: Path) -> tuple[Any, ...]:
    """All that a run leaves, but for times: weights and moments, how far it came, its log, the model at the top."""
    state = read_state(folder)
    arrays = {name: array.tobytes() for name, array in state.arrays.items()}
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    del files[LOG], files[LOCK]
    return arrays, untimed(state.progress), [untimed(record) for record in read_log(folder)], files


@pytest.fixture(scope="module")
def straight(data: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("straight")
    list(trainer(data, folder).run())
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-3"]
    return result(folder)


def ended(data: Data, folder: Path) -> tuple[Any, ...]:
    """What comes of a run that was stopped in whatever way, once it is resumed or begun again: with no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            run = resumed(data, folder)
        except UserError as error:
            assert "nothing to resume" in str(error), error
            assert "begin it again" in str(error) or not (folder / LOCK).is_file()
            run = trainer(data, folder)
        list(run.run())
        assert [path.name for path in checkpoints(folder)] == ["checkpoint-3"] and not list(folder.glob("*.partial"))
        return result(folder)


# ------------------------------------------------------------------------------------------ every call of the system


def calls_of_a_run(data: Data, folder: Path) -> int:
    with stopping_at(10**9, Killed()) as calls:
        list(trainer(data, folder, max_steps=1).run())
    return len(calls)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("part", range(4))
def test_a_process_may_die_at_any_call(data: Data, straight: tuple[Any, ...], tmp_path: Path, part: int) -> None:
    """In the first save, and in one that replaces a checkpoint."""
    numbers = range(1 + part, calls_of_a_run(data, tmp_path / "whole") + 1, 4)
    assert len(numbers) > 20
    for number in numbers:
        folder = tmp_path / str(number)
        with stopping_at(number, Killed()), pytest.raises(Killed):
            list(trainer(data, folder).run())
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            BertForMaskedLM.from_pretrained(folder)
        assert ended(data, folder) == straight, number


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("part", range(4))
def test_any_call_may_fail(data: Data, straight: tuple[Any, ...], tmp_path: Path, part: int) -> None:
    """The first one makes the output: where that fails, another is to be named."""
    full = OSError(errno.ENOSPC, "No space left on device")
    for number in range(2 + part, calls_of_a_run(data, tmp_path / "whole") + 1, 4):
        folder = tmp_path / str(number)
        with stopping_at(number, full), pytest.raises(WriteError, match=r"cannot write into .* MB of room; ") as told:
            list(trainer(data, folder).run())
        assert "\n" not in str(told.value) and "No space left" in str(told.value)
        if kept := checkpoints(folder):
            assert f"{kept[0].name} is whole" in str(told.value)
        assert ended(data, folder) == straight, number


KILLED = """
import os, signal, sys
from pathlib import Path
import tests.train.test_checkpoint as t
documents = t.read_documents(t.SHIPPED_TEXT)[:2]
data = t.prepare(documents, t.train_tokenizer(documents, 300), t.CONFIG)
calls, fsync = 0, os.fsync
def last(file):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
os.fsync = last
list(t.trainer(data, Path(sys.argv[1])).run())
"""


@pytest.mark.parametrize("number", [5, 60])
def test_a_process_that_is_killed(
    data: Data, straight: tuple[Any, ...], tmp_path: Path, root: Path, number: int
) -> None:
    """In earnest; its lock hinders nobody."""
    folder = tmp_path / "run"
    child = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(number)], cwd=root, timeout=300)
    assert child.returncode == -signal.SIGKILL and (folder / LOCK).is_file()
    assert bool(checkpoints(folder)) == (number == 60)
    assert ended(data, folder) == straight


# ----------------------------------------------------------------------------------------------- what is wrong is named


@pytest.fixture
def stopped(data: Data, tmp_path: Path) -> Path:
    """A run of which two checkpoints are kept, after its second step."""
    run = trainer(data, tmp_path, save_total_limit=2)
    for _ in run.run():
        run.stop = run.step == 2
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-1"]
    return tmp_path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda folder: flip(folder / STATE), f"{STATE} is damaged: its SHA-256"),
        (lambda folder: flip(folder / LOG), f"{LOG} is damaged"),
        (lambda folder: (folder / "vocab.txt").write_text(""), "vocab.txt has 0 bytes, not "),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), f"no {MANIFEST} in "),
        (lambda folder: (folder / MANIFEST).write_text('{"format": 9}'), "has the format 9, and 1 is known here"),
        (lambda folder: (folder / MANIFEST).write_text('{"format": 1, "files": [1]}'), "is no list of files"),
        (lambda folder: (folder / MANIFEST).write_text('{"format": 1, "files": {"../a": {"size": 1, "sha256": ""}}}'),
         "names the file '../a', which is outside"),
    ],
)  # fmt: skip
def test_a_broken_checkpoint_is_named_and_the_one_before_is_taken(
    harm: Callable[[Path], Any], why: str, data: Data, straight: tuple[Any, ...], stopped: Path
) -> None:
    harm(stopped / "checkpoint-2")
    with pytest.warns(UserWarning, match=f"checkpoint-2 is broken, so it is checkpoint-1 that is resumed: .*{why}"):
        run = resumed(data, stopped)
    assert run.step == 1
    list(run.run())
    assert ended(data, stopped) == straight
    flip(stopped / "checkpoint-3" / STATE)
    with pytest.raises(UserError, match=f"no checkpoint in .* is whole: checkpoint-3: {STATE} is damaged"):
        read_state(stopped)


def test_what_is_at_the_top_is_made_to_agree(data: Data, straight: tuple[Any, ...], stopped: Path) -> None:
    """Also where nothing is left to do: a finished run keeps no stale model, and its log is that of the checkpoint."""
    list(resumed(data, stopped, save_total_limit=1).run())
    shutil.copyfile(stopped / "checkpoint-3" / STATE, stopped / "model.safetensors")
    (stopped / "vocab.txt").unlink()
    with open(stopped / LOG, "a", encoding="utf-8") as file:
        file.write('{"step": 4}\ngarbage\n')
    assert ended(data, stopped) == straight


def test_two_runs_never_write_into_one_folder(data: Data, stopped: Path) -> None:
    late = resumed(data, stopped)
    first = resumed(data, stopped).run()
    next(first)
    with pytest.raises(UserError, match="another run is writing into "):
        list(resumed(data, stopped).run())
    list(first)
    with pytest.raises(UserError, match="another run has gone on to checkpoint-3 meanwhile"):
        list(late.run())


def test_a_state_from_before_there_were_checkpoints(data: Data, straight: tuple[Any, ...], stopped: Path) -> None:
    for path in (stopped / "checkpoint-2").iterdir():
        shutil.copyfile(path, stopped / path.name)
    for checkpoint in checkpoints(stopped):
        shutil.rmtree(checkpoint)
    (stopped / MANIFEST).unlink()
    with open(stopped / LOG, "a", encoding="utf-8") as file:
        file.write('{"step": 3}\n{"st')
    assert read_state(stopped).folder == stopped
    assert ended(data, stopped) == straight
    assert not (stopped / STATE).exists()


def test_states_from_before_there_was_a_format(data: Data, tmp_path: Path) -> None:
    """Warm-up steps of 0 meant then that none were given."""
    run = trainer(data, tmp_path, warmup_steps=0)
    run.stop = True
    list(run.run())
    assert read_state(tmp_path).config.warmup_steps == 0
    arrays, metadata = read_arrays(tmp_path / "checkpoint-0" / STATE)
    shutil.rmtree(tmp_path / "checkpoint-0")
    about = json.loads(metadata["trainer_state"])
    del about["format"]
    write_arrays(tmp_path / STATE, arrays, {"trainer_state": json.dumps(about)})
    assert read_state(tmp_path).config.warmup_steps is None
    again = resumed(data, tmp_path)
    assert [record["step"] for kind, record in again.run() if kind == "eval"] == [0, 2, 3], "it was saved unevaluated"


# ---------------------------------------------------------------------------------------------------- what is not saved


def test_weights_that_are_not_finite_replace_nothing(
    data: Data, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resumed(data, stopped)
    update = run.optimizer.step

    def spoiled() -> None:
        update()
        next(iter(run.model.parameters())).data[...] = np.nan

    monkeypatch.setattr(run.optimizer, "step", spoiled)
    with pytest.raises(NonFiniteError, match=r"step 3: model\..* is not finite after the update, and is not saved"):
        list(run.run())
    assert read_state(stopped).progress["step"] == 2
    arrays, _ = read_arrays(stopped / "model.safetensors")
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_room_is_asked_for_before_the_run(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(
        WriteError, match=r"the checkpoints of this run need \d\.\d MB, and 0\.1 MB are free: make room"
    ):
        list(trainer(data, tmp_path / "run").run())
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_a_folder_that_is_removed_meanwhile(data: Data, stopped: Path) -> None:
    with pytest.raises(WriteError, match=r"step 3: cannot write into .*No such file.*there is no checkpoint"):
        for kind, _ in resumed(data, stopped).run():
            if kind == "step":
                shutil.rmtree(stopped)


def test_the_command_ends_with_1_where_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SHIPPED_TEXT.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    command = ["minibert", "pretrain", text, "--output", tmp_path / "run", "--layers", 1, "--hidden", 64, "--steps", 2,
               "--vocab-size", 300, "--max-seq-length", 32, "--tokens-per-batch", 64, "--backend", "numpy"]  # fmt: skip
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--keep", "3"])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and "are free: make room" in said and len(said.splitlines()) == 1
