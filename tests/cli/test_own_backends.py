"""A backend of one's own, named as FILE.py:NAME or module:NAME, in every command that takes one; kernels likewise."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.timing import frame
from minibert import backends
from minibert.cli import main, watch
from minibert.errors import UserError
from minibert.kernels import OPS

OWN = "shelf_backend.py:ShelfBackend"
WRONG = """
from shelf_backend import KERNELS, ShelfBackend
from minibert.kernels import OPS
from minibert.kernels.array_module import numpy_module

def add_layer_norm(*arrays, **params):
    y, *kept = OPS["add_layer_norm"].formula(numpy_module, *arrays, **params)
    return y * y.dtype.type(1.001), *kept

class Wrong(ShelfBackend):
    def __init__(self):
        super().__init__()
        self.name = "wrong-shelf"

    def kernel(self, op):
        return add_layer_norm if op is OPS["add_layer_norm"] else super().kernel(op)
"""
Ran = tuple[int, str, str]
pytestmark = pytest.mark.usefixtures("smaller_tiny")


@pytest.fixture
def folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with backends and a kernel of a user's own, in which commands are run."""
    shutil.copy(root / "tests" / "examples" / "shelf_backend.py", tmp_path)
    (tmp_path / "wrong.py").write_text(WRONG, encoding="utf-8")
    (tmp_path / "numpy_softmax.py").write_text("from shelf_backend import softmax\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("shelf_backend", "numpy_softmax"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(backends, "_loaded", dict(backends._loaded))
    return tmp_path


@pytest.fixture
def ran(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Ran]:
    """Exit code, standard output and standard error of a command."""

    def run(command: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["minibert", *command.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (f"check softmax --backend {OWN}", " softmax  shelf    float32  kernel "),
        ("check softmax --backends shelf_backend:ShelfBackend,numpy", " softmax  shelf    float32  kernel "),
        (
            "check softmax --backend numpy --kernel numpy_softmax.py:softmax=softmax",
            " softmax  numpy    float32  kernel ",
        ),
        ("check softmax --backend numpy --kernel numpy_softmax:softmax=softmax", " softmax  numpy    float32  kernel "),
        (f"ops softmax --backend {OWN}", " op       shelf "),
        (f"diff numpy {OWN} --tokens 32", "B: arrays on a shelf"),
        (f"compare --backend numpy,{OWN} --tokens 32 --steps 2", "PASS 25 ops on numpy, shelf"),
    ],
)
def test_every_command_takes_one(command: str, shown: str, ran: Callable[[str], Ran]) -> None:
    code, out, err = ran(command)
    assert code == 0 and shown in out, out + err


def test_a_run_names_it_again_when_it_is_resumed(folder: Path, ran: Callable[[str], Ran]) -> None:
    sizes = "--config tiny --tokens-per-batch 64 --max-seq-length 32"
    begun = f"pretrain --output run --backend {OWN} --steps 1 {sizes} --vocab-size 300"
    assert ran(begun)[0] == 0
    code, _, err = ran("pretrain --output run --resume --steps 2")
    assert code == 2 and f"--backend was {folder}/{OWN}, code of its own: name it again, or another" in err
    code, out, _ = ran(f"pretrain --output run --resume --steps 2 --backend {OWN}")
    assert code == 0 and "backend shelf: arrays on a shelf" in out


def test_what_bisect_writes_finds_it_wherever_it_is_started(
    folder: Path, root: Path, ran: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = ran("bisect numpy wrong.py:Wrong --steps 1 --tokens 32 --output found")
    assert code == 1 and "side B (wrong-shelf) is wrong" in out
    (test,) = (folder / "found").glob("test_add_layer_norm_on_wrong_shelf_*.py")
    assert "backends.get(str(HERE / '../wrong.py') + ':Wrong')" in test.read_text(encoding="utf-8")
    monkeypatch.chdir(root)
    space = {"__file__": str(test), "__name__": "found"}
    exec(compile(test.read_text(encoding="utf-8"), str(test), "exec"), space)
    with pytest.raises(AssertionError, match="off by"):
        next(made for name, made in space.items() if name.startswith("test_add_layer_norm"))()  # type: ignore[operator]


def test_a_failed_check_says_how_to_run_it_again(folder: Path, ran: Callable[[str], Ran]) -> None:
    code, out, _ = ran("check add_layer_norm --backend wrong.py:Wrong")
    assert code == 1 and f"minibert check add_layer_norm --backend {folder}/wrong.py:Wrong --dtype" in out


def test_watch_names_it_to_the_process_of_each_look(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def start(command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, 0, "null\n", "")

    monkeypatch.setattr(subprocess, "run", start)
    watched = watch.resolve(["numpy_softmax.py:softmax=softmax"], OWN)
    watch._look(watched, None)
    assert watched.backend.name == "shelf" and started[0][3] == f"{folder}/{OWN}"


def test_a_bench_names_it_to_its_own_processes(folder: Path) -> None:
    spec = {"config": {}, "task": {"batch": 1, "length": 8, "threads": 1}, "backends": [f"{folder}/{OWN}"]}
    assert frame.Task.again(spec).length == 8
    assert backends.get("shelf").describe().startswith("arrays on a shelf")


def test_it_is_known_by_its_own_name_from_then_on(folder: Path) -> None:
    place = backends.get(OWN)
    assert backends.get(f"{folder}/{OWN}") is place is backends.get("shelf")
    assert backends.spec_of(place) == f"{folder}/{OWN}"
    assert backends.spec_of(backends.get("numpy")) == "numpy"
    assert "shelf" not in backends.names()
    assert place.run(OPS["add"], place.asarray([1.0]), place.asarray([2.0])) == 3


def test_a_backend_that_calls_itself_as_another_does_is_refused(folder: Path) -> None:
    source = (folder / "shelf_backend.py").read_text(encoding="utf-8")
    (folder / "again.py").write_text(source.replace('"shelf"', '"numpy"'), encoding="utf-8")
    with pytest.raises(UserError, match=r"again\.py:ShelfBackend calls itself 'numpy', as another does"):
        backends.get("again.py:ShelfBackend")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("mine.py:Backend", "mine.py cannot be imported: FileNotFoundError: there is no such file"),
        ("no_such_module:Backend", "no_such_module cannot be imported: ModuleNotFoundError"),
        ("shelf_backend.py:Shelf", "has no 'Shelf'; it defines ShelfArray, softmax, softmax_grad, ShelfBackend"),
        ("shelf_backend.py:softmax", "softmax() raised TypeError"),
        ("shelf_backend.py:", "has no ''"),
        ("mine.py", "or name your own as FILE.py:NAME"),
    ],
)
def test_what_is_none_is_one_line(spec: str, said: str, ran: Callable[[str], Ran]) -> None:
    for command in (f"check --backend {spec}", f"ops --backend {spec}", f"compare --backends numpy,{spec}"):
        code, out, err = ran(command)
        assert (code, out) == (2, "") and err.startswith("error: ") and said in err and err.count("\n") == 1
