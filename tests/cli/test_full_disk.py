"""What the machine does not give ends a command in one line and exit code 1; what was saved stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minibert.data import SHIPPED_TEXT
from minibert.train.checkpoint import checkpoints, fault, read_state

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and /dev/full are Linux's")

# From a step on a file may be no longer than so many bytes: for the process as with a quota or a disk that is full.
LIMITED = """
import resource, sys
from minibert.cli import main
from minibert.train.trainer import Trainer
step, size = int(sys.argv.pop(1)), int(sys.argv.pop(1))
taken = Trainer.train_step
def train_step(self):
    if self.step == step:
        self.writer.settle(True)  # what is in flight
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return taken(self)
Trainer.train_step = train_step
main()
"""


def run(output: Path, text: Path) -> list[str]:
    text.write_text(SHIPPED_TEXT.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    model = ["--layers", 1, "--hidden", 64, "--steps", 4, "--backend", "numpy", "--tokens-per-batch", 128,
             "--max-seq-length", 32, "--save-every", 1, "--log-every", 1, "--vocab-size", 300]  # fmt: skip
    return list(map(str, ["pretrain", text, "--output", output, *model]))


@pytest.mark.parametrize(("size", "last"), [(100_000, 4), (0, 3)])
def test_a_disk_that_fills_up_in_a_run(size: int, last: int, tmp_path: Path, root: Path) -> None:
    """While checkpoints are written, and where not even a line of the log finds room; then there is room again."""
    words, output = run(tmp_path / "run", tmp_path / "text.txt"), tmp_path / "run"
    limited = [sys.executable, "-c", LIMITED, "2", str(size), *words]
    done = subprocess.run(limited, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    *warned, error = done.stderr.splitlines()
    assert error.startswith(f"error: step {last}: cannot write into "), done.stderr
    assert len(warned) == last - 3 and all(line.startswith("warning: step 3: cannot write into ") for line in warned)
    assert error.endswith("MB of room; checkpoint-2 is whole: --resume goes on from there")
    assert checkpoints(output)[0].name == "checkpoint-2" and fault(checkpoints(output)[0]) is None
    again = [sys.executable, "-m", "minibert", "pretrain", "--output", str(output), "--resume"]
    subprocess.run(again, cwd=root, check=True, capture_output=True, timeout=300)
    assert read_state(output).progress["step"] == 4


def test_what_is_printed_finds_no_room(root: Path) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        command = [sys.executable, "-m", "minibert", "tokenizer", "show", "the senate"]
        done = subprocess.run(command, cwd=root, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"error: [Errno 28] {os.strerror(28)}")


def test_a_vocabulary_that_finds_no_room(tmp_path: Path, root: Path) -> None:
    words = run(tmp_path / "run", tmp_path / "text.txt")
    train = ["tokenizer", "train", words[1], "--output", str(tmp_path / "words"), "--vocab-size", "300"]
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); from minibert.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *train], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: cannot write ") and not list((tmp_path / "words").glob("*"))
