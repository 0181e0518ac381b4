"""Signals are seen wherever a command is: in a step, an evaluation, data, a vocabulary that is trained, a compiler."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.cli.signals import handled
from minibert.data import SHIPPED_TEXT, read_documents, train_tokenizer
from minibert.errors import Interrupted
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import NAMED
from minibert.train.checkpoint import LOCK, checkpoints, read_state
from minibert.train.config import TrainingConfig
from minibert.train.log import read_log
from minibert.train.trainer import Trainer, prepare
from tests.children import child

# Where the process says that it is at a place, and then goes on there for as long as nobody stops it.
AT = """
import os, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which who runs the tests may ignore
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
import numpy as np
from minibert.cli import main
import minibert.cli.pretrain as pretrain
import minibert.train.trainer as trainer
place, when = sys.argv.pop(1), int(sys.argv.pop(1))
calls = 0
def slowly(call):
    def instead(*arguments, **options):
        global calls
        calls += 1
        if calls == when:
            print("HERE", flush=True)
            until = time.monotonic() + 300
            while time.monotonic() < until:
                np.ones(1000).sum()
        return call(*arguments, **options)
    return instead
if place == "data":
    pretrain.prepare = slowly(pretrain.prepare)
elif place == "vocabulary":
    import minibert.data.wordpiece as wordpiece
    def held(call):
        print("HERE", flush=True)
        heeding(lambda: time.sleep(300))
    heeding, wordpiece.heeding_signals = wordpiece.heeding_signals, held
elif place == "evaluation":
    trainer.Trainer.mean_loss = slowly(trainer.Trainer.mean_loss)
elif place == "compilation":  # which is within the first step's first call of a kernel
    trainer.Trainer.mean_of = slowly(trainer.Trainer.mean_of)
main()
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(SHIPPED_TEXT.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return path


def run(text: Path, output: Path) -> list[str]:
    model = ["--layers", 1, "--hidden", 64, "--steps", 4, "--backend", "numpy", "--eval-every", 2, "--log-every", 1,
             "--tokens-per-batch", 128, "--max-seq-length", 32, "--keep", 1, "--save-every", 1,
             "--vocab-size", 300]  # fmt: skip
    return list(map(str, ["pretrain", text, "--output", output, *model]))


def stopped(place: str, when: int, number: signal.Signals, root: Path, words: list[str]) -> tuple[int, str, str]:
    """What becomes of a command that gets a signal at a place: exit code, output and errors after it."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", AT, place, str(when), *words]
    with child(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "HERE\n":
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("place", "number"), [("data", signal.SIGTERM), ("vocabulary", signal.SIGHUP), ("evaluation", signal.SIGINT)]
)
def test_before_there_is_anything_to_save(
    place: str, number: signal.Signals, text: Path, tmp_path: Path, root: Path
) -> None:
    code, _, err = stopped(place, 1, number, root, run(text, tmp_path / "run"))
    assert (code, err) == (128 + number, f"stopped by {number.name}\n")
    assert not checkpoints(tmp_path / "run")


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: untimed(v) if isinstance(v, dict) else v for name, v in values.items() if "second" not in name}


def result(folder: Path) -> tuple[Any, ...]:
    state = read_state(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}
    arrays = {name: np.asarray(array).tobytes() for name, array in state.arrays.items()}
    return arrays, files, untimed(state.progress), [untimed(record) for record in read_log(folder)]


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: pytest.TempPathFactory, root: Path) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("straight") / "run"
    subprocess.run([sys.executable, "-m", "minibert", *run(text, folder)], check=True, cwd=root, capture_output=True)
    return result(folder)


@pytest.mark.parametrize(
    ("place", "when", "number", "step"),
    [
        ("compilation", 1, signal.SIGINT, 0),
        ("evaluation", -2, signal.SIGTERM, 2),
        ("evaluation", -1, signal.SIGHUP, 4),
    ],
)  # fmt: skip
def test_a_run_saves_itself_and_goes_on_as_if_it_had_not_stopped(
    place: str, when: int, number: signal.Signals, step: int, straight: tuple[Any, ...], text: Path, tmp_path: Path,
    root: Path,
) -> None:  # fmt: skip
    """The last evaluation counts: a run that was stopped in it is not over."""
    if when < 0:  # of the three evaluations, each in as many passes
        when = passes_of_an_evaluation(text) * (3 + when) + 1
    folder = tmp_path / "run"
    code, out, err = stopped(place, when, number, root, run(text, folder))
    assert code == 128 + number, (out, err)
    assert f"stopped after step {step} of 4, and saved. To go on: minibert pretrain" in out and err == ""
    again = shlex.split(out.partition("To go on: ")[2].splitlines()[0])
    assert read_state(folder).progress["step"] == step
    done = subprocess.run([sys.executable, "-m", *again], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert result(folder) == straight
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4"] and (folder / LOCK).is_file()


def passes_of_an_evaluation(text: Path) -> int:
    config = TrainingConfig(tokens_per_batch=128, max_seq_length=32)
    documents = read_documents([text])
    data = prepare(documents, train_tokenizer(documents, 300), config)
    return len(Trainer(BertForMaskedLM(NAMED["tiny"], "numpy"), data, config, "unused").held_out)


def test_an_exception_that_a_callback_swallows_is_raised_again() -> None:
    """As where Numba compiles, which llvmlite tells of by a function that C calls."""

    @ctypes.CFUNCTYPE(None)
    def callback() -> None:
        signal.raise_signal(signal.SIGTERM)

    before = sys.unraisablehook, signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as raised, handled():
        callback()
        time.sleep(60)
    assert raised.value.exit_code == 143
    assert (sys.unraisablehook, signal.getsignal(signal.SIGTERM)) == before


def test_a_second_signal_ends_it_at_once(text: Path, tmp_path: Path, root: Path) -> None:
    held = AT.replace("main()", "import minibert.train.loop as loop\nloop.Loop.save = slowly(loop.Loop.save)\nmain()")
    command = [sys.executable, "-c", held, "save", "2", *run(text, tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with child(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "HERE\n":
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)  # waits for the end of the save
        assert process.poll() is None
        while process.poll() is None:  # two that come before the first is looked at are one
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
    assert process.returncode == -signal.SIGINT
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-0"]
