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
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.cli import main
from minibert.data import SHIPPED_TEXT
from minibert.errors import UserError, WriteError
from minibert.model.bert import BertForMaskedLM
from minibert.model.checkpoint import read_arrays, write_arrays
from minibert.train.checkpoint import LOCK, MANIFEST, STATE, checkpoints, read_state
from minibert.train.guard import NonFiniteError
from minibert.train.log import LOG
from minibert.train.trainer import Data
from tests.stopped_calls import Killed, stopping_at
from tests.tiny_runs import result, resumed, trainer


def ended(tiny: Data, folder: Path) -> tuple[Any, ...]:
    """What comes of a run that was stopped in whatever way, once it is resumed or begun again: with no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            run = resumed(tiny, folder)
        except UserError as error:
            assert "nothing to resume" in str(error), error
            assert "begin it again" in str(error) or not (folder / LOCK).is_file()
            run = trainer(tiny, folder)
        list(run.run())
        assert [path.name for path in checkpoints(folder)] == ["checkpoint-3"] and not list(folder.glob("*.partial"))
        return result(folder)


# ------------------------------------------------------------------------------------------ every call of the system


def calls_of_a_run(tiny: Data, folder: Path) -> int:
    with stopping_at(10**9, Killed()) as calls:
        list(trainer(tiny, folder, max_steps=1).run())
    return len(calls)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("part", range(4))
def test_a_process_may_die_at_any_call(tiny: Data, straight: tuple[Any, ...], tmp_path: Path, part: int) -> None:
    """In the first save, and in one that replaces a checkpoint."""
    numbers = range(1 + part, calls_of_a_run(tiny, tmp_path / "whole") + 1, 4)
    assert len(numbers) > 20
    for number in numbers:
        folder = tmp_path / str(number)
        with stopping_at(number, Killed()), pytest.raises(Killed):
            list(trainer(tiny, folder).run())
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            BertForMaskedLM.from_pretrained(folder)
        assert ended(tiny, folder) == straight, number


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("part", range(4))
def test_any_call_may_fail(tiny: Data, straight: tuple[Any, ...], tmp_path: Path, part: int) -> None:
    """The first one makes the output: where that fails, another is to be named."""
    full = OSError(errno.ENOSPC, "No space left on device")
    for number in range(2 + part, calls_of_a_run(tiny, tmp_path / "whole") + 1, 4):
        folder = tmp_path / str(number)
        with stopping_at(number, full), pytest.raises(WriteError, match=r"cannot write into .* MB of room; ") as told:
            list(trainer(tiny, folder, save_errors="fatal").run())
        assert "\n" not in str(told.value) and "No space left" in str(told.value)
        if kept := checkpoints(folder):
            assert f"{kept[0].name} is whole" in str(told.value)
        assert ended(tiny, folder) == straight, number


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.tiny_runs import tiny_data, trainer
calls, fsync = 0, os.fsync
def last(file):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
os.fsync = last
list(trainer(tiny_data(), Path(sys.argv[1])).run())
"""


@pytest.mark.parametrize("number", [5, 60])
def test_a_process_that_is_killed(
    tiny: Data, straight: tuple[Any, ...], tmp_path: Path, root: Path, number: int
) -> None:
    """In earnest; its lock hinders nobody."""
    folder = tmp_path / "run"
    child = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(number)], cwd=root, timeout=300)
    assert child.returncode == -signal.SIGKILL and (folder / LOCK).is_file()
    assert bool(checkpoints(folder)) == (number == 60)
    assert ended(tiny, folder) == straight


# ----------------------------------------------------------------------------------------------- what is wrong is named


@pytest.fixture
def stopped(tiny: Data, tmp_path: Path) -> Path:
    """A run of which two checkpoints are kept, after its second step."""
    run = trainer(tiny, tmp_path, save_total_limit=2)
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
    harm: Callable[[Path], Any], why: str, tiny: Data, straight: tuple[Any, ...], stopped: Path
) -> None:
    harm(stopped / "checkpoint-2")
    with pytest.warns(UserWarning, match=f"checkpoint-2 is broken, so it is checkpoint-1 that is resumed: .*{why}"):
        run = resumed(tiny, stopped)
    assert run.step == 1
    list(run.run())
    assert ended(tiny, stopped) == straight
    flip(stopped / "checkpoint-3" / STATE)
    with pytest.raises(UserError, match=f"no checkpoint in .* is whole: checkpoint-3: {STATE} is damaged"):
        read_state(stopped)


def test_what_is_at_the_top_is_made_to_agree(tiny: Data, straight: tuple[Any, ...], stopped: Path) -> None:
    """Also where nothing is left to do: a finished run keeps no stale model, and its log is that of the checkpoint."""
    list(resumed(tiny, stopped, save_total_limit=1).run())
    shutil.copyfile(stopped / "checkpoint-3" / STATE, stopped / "model.safetensors")
    (stopped / "vocab.txt").unlink()
    with open(stopped / LOG, "a", encoding="utf-8") as file:
        file.write('{"step": 4}\ngarbage\n')
    assert ended(tiny, stopped) == straight


def test_two_runs_never_write_into_one_folder(tiny: Data, stopped: Path) -> None:
    late = resumed(tiny, stopped)
    first = resumed(tiny, stopped).run()
    next(first)
    with pytest.raises(UserError, match="another run is writing into "):
        list(resumed(tiny, stopped).run())
    list(first)
    with pytest.raises(UserError, match="another run has gone on to checkpoint-3 meanwhile"):
        list(late.run())


def test_a_state_from_before_there_were_checkpoints(tiny: Data, straight: tuple[Any, ...], stopped: Path) -> None:
    for path in (stopped / "checkpoint-2").iterdir():
        shutil.copyfile(path, stopped / path.name)
    for checkpoint in checkpoints(stopped):
        shutil.rmtree(checkpoint)
    (stopped / MANIFEST).unlink()
    with open(stopped / LOG, "a", encoding="utf-8") as file:
        file.write('{"step": 3}\n{"st')
    assert read_state(stopped).folder == stopped
    assert ended(tiny, stopped) == straight
    assert not (stopped / STATE).exists()


def test_states_from_before_there_was_a_format(tiny: Data, tmp_path: Path) -> None:
    """Warm-up steps of 0 meant then that none were given."""
    run = trainer(tiny, tmp_path, warmup_steps=0)
    run.stop = True
    list(run.run())
    assert read_state(tmp_path).config.warmup_steps == 0
    arrays, metadata = read_arrays(tmp_path / "checkpoint-0" / STATE)
    shutil.rmtree(tmp_path / "checkpoint-0")
    about = json.loads(metadata["trainer_state"])
    del about["format"]
    write_arrays(tmp_path / STATE, arrays, {"trainer_state": json.dumps(about)})
    assert read_state(tmp_path).config.warmup_steps is None
    again = resumed(tiny, tmp_path)
    assert [record["step"] for kind, record in again.run() if kind == "eval"] == [0, 2, 3], "it was saved unevaluated"


# ---------------------------------------------------------------------------------------------------- what is not saved


def test_weights_that_are_not_finite_replace_nothing(
    tiny: Data, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resumed(tiny, stopped)
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


def test_room_is_asked_for_before_the_run(tiny: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(
        WriteError, match=r"the checkpoints of this run need \d\.\d MB, and 0\.1 MB are free: make room"
    ):
        list(trainer(tiny, tmp_path / "run").run())
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_a_folder_that_is_removed_meanwhile(tiny: Data, stopped: Path) -> None:
    with pytest.raises(WriteError, match=r"step 3: cannot write into .*No such file.*there is no checkpoint"):
        for kind, _ in resumed(tiny, stopped).run():
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
