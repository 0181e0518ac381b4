"""A folder that may be read and not written ends a command before its work, in one line and exit code 1."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minibert.data import SHIPPED_TEXT
from minibert.train.checkpoint import checkpoints, fault, read_state
from tests.cli.test_full_disk import run
from tests.torture import corpus

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")

# Who is root may write anywhere: this process gives that up for itself, and stays the owner of its files.
AS_ANYBODY = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
version_3, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capset(version_3, none) == 0, ctypes.get_errno()
from minibert.cli import main
main()
"""


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    yield folder
    for found in (folder, *folder.rglob("*")):
        if found.is_dir():
            found.chmod(0o755)


def refused(root: Path, *words: object) -> str:
    """The one line of a command that ends with exit code 1."""
    command = [sys.executable, "-c", AS_ANYBODY, *map(str, words)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("name", ["", "new", "new/deeper"])
def test_a_run_is_refused_before_its_text_is_read(name: str, read_only: Path, tmp_path: Path, root: Path) -> None:
    line = refused(root, *run(read_only / name, tmp_path / "text.txt"))
    assert line.endswith(f"{read_only} is read-only for you; choose another --output")


def test_a_run_is_not_resumed_there_and_stays_as_it_is(tmp_path: Path, root: Path) -> None:
    output = tmp_path / "run"
    words = [sys.executable, "-m", "minibert", *run(output, tmp_path / "text.txt")]
    words[words.index("--steps") + 1] = "2"
    subprocess.run(words, cwd=root, check=True, capture_output=True, timeout=300)
    folders = [output, *(path for path in output.rglob("*") if path.is_dir())]
    try:
        for path in folders:
            path.chmod(0o555)
        (output / ".lock").chmod(0o444)
        line = refused(root, "pretrain", "--output", output, "--resume", "--steps", 4)
    finally:
        for path in folders:
            path.chmod(0o755)
    assert "cannot write into " in line
    assert fault(checkpoints(output)[0]) is None and read_state(output).progress["step"] == 2


def test_what_else_writes(read_only: Path, tmp_path: Path, root: Path) -> None:
    corpus.make_model(tmp_path / "model")
    corpus.make_tokenizer(tmp_path / "model")
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"the word {i},{i % 2}\n" for i in range(8)))
    model = ["--model", tmp_path / "model", "--backend", "numpy"]
    assert str(read_only) in refused(root, "finetune", "classify", *model, "--train", rows, "--output", read_only / "r")
    assert str(read_only) in refused(root, "tokenizer", "train", SHIPPED_TEXT, "--output", read_only / "t")
    assert str(read_only) in refused(root, "compare", "--backend", "numpy", "--json", read_only / "facts.json")
    assert not os.listdir(read_only)
