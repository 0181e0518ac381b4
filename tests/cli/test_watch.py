"""`minibert watch`: a look at a kernel each time that it is saved."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from minibert import backends
from minibert.cli.watch import line, ops_of, resolve
from minibert.errors import UserError
from minibert.kernels.elementwise import scale
from minibert.lab.measure.watching import SIZE, SMALL, look
from tests.children import child

GOOD = "def scale(x, *, factor):\n    return x * x.dtype.type(factor)\n"
SLIGHTLY_WRONG = GOOD.replace("type(factor)", "type(factor * 1.001)")
BROKEN = GOOD.replace("return", "retrun")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


def minibert(*words: str, folder: Path, root: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "minibert", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_one_look_says_right_how_wrong_and_how_fast(root: Path) -> None:
    done = minibert("watch", "kernels/elementwise/cpu.py", "--once", folder=root, root=root)
    assert done.returncode == 0, done.stderr
    first, *looks = done.stdout.splitlines()
    assert "add, mul, scale, where on numba" in first
    assert len(looks) == 4
    assert all(" ok " in look and " ms" in look and "of the bound" in look for look in looks)
    assert "gradient exact" in looks[2]


@needs_compiler
def test_a_cuda_kernel_is_looked_at_on_the_emulator(root: Path) -> None:
    done = minibert("watch", "kernels/dropout/gpu.cu", "--once", "--dtype", "bfloat16", folder=root, root=root)
    assert done.returncode == 0, done.stderr
    look = done.stdout.splitlines()[1]
    assert "dropout (kernel" in look and "sectors, 100% of them needed" in look and " ms" not in look


def read_until(stream: IO[str], *words: str) -> str:
    for text in stream:
        if all(word in text for word in words):
            return text
    raise AssertionError(f"the watch ended before it said {words}")


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    yield path


def save(path: Path, text: str) -> None:
    """As editors do: written beside it, and put in its place."""
    beside = path.with_suffix(".new")
    beside.write_text(text)
    os.replace(beside, path)


def test_each_save_is_looked_at_until_an_interrupt(kernel: Path, root: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "minibert", "watch", "mine.py:scale=scale", "--backend", "numpy"]
    with child(command, cwd=kernel.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as watch:
        assert watch.stdout is not None
        read_until(watch.stdout, " ok ", "scale")
        save(kernel, SLIGHTLY_WRONG)
        read_until(watch.stdout, "FAIL", "follows_formula")
        save(kernel, BROKEN)
        read_until(watch.stdout, "FAIL", "mine.py")
        save(kernel, GOOD)
        assert "%)" in read_until(watch.stdout, " ok ", "scale")  # against the last one that was right
        watch.send_signal(signal.SIGINT)
        assert watch.wait() == 130


def test_a_failure_is_the_exit_status_of_a_single_look(kernel: Path, root: Path) -> None:
    kernel.write_text(SLIGHTLY_WRONG)
    done = minibert("watch", "mine.py:scale=scale", "--backend", "numpy", "--once", folder=kernel.parent, root=root)
    assert done.returncode == 1
    assert "FAIL scale after 2 checks" in done.stdout and "expected" in done.stdout
    assert done.stdout.rstrip().endswith("--backend numpy --dtype float32 --seed 0 --kernel mine.py:scale=scale")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.py", "there is no such file"),
        ("mine.py", "say which op it is of"),
        ("mine.py=scale", "expected FILE.py:FUNCTION=OP"),
        ("mine.py:scale=scaled", "no op is called 'scaled'"),
        ("mine.py:nosuch=scale", "^mine.py has no function 'nosuch'; it has scale$"),
    ],
)
def test_what_cannot_be_watched_is_told(
    given: str, message: str, kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(kernel.parent)
    with pytest.raises(UserError, match=message):
        resolve([given], "numpy")


def test_a_file_that_does_not_run_yet_is_watched(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kernel.parent)
    kernel.write_text(BROKEN)
    assert resolve(["mine.py:scale=scale"], "numpy").ops == ["scale"]


def test_files_of_the_package_know_their_ops(root: Path) -> None:
    assert ops_of(root / "kernels" / "softmax" / "gpu.cu") == ["softmax", "softmax_grad"]
    assert ops_of(root / "kernels" / "softmax" / "cpu.py") == ["softmax", "softmax_grad"]


def zeroes_the_last(y: np.ndarray) -> np.ndarray:
    y[..., -1] = 0
    return y


@pytest.mark.parametrize("fault", ["at the size that is timed alone", "after some calls"])
def test_what_is_timed_is_judged(fault: str) -> None:
    numpy, timed = backends.get("numpy"), SIZE.tokens * SIZE.hidden
    calls = 0

    def kernel(x: np.ndarray, *, factor: float) -> np.ndarray:
        nonlocal calls
        calls += x.size == timed
        y = x * x.dtype.type(factor)
        return zeroes_the_last(y) if x.size == timed and (fault.startswith("at") or calls > 3) else y

    with numpy.using({scale: kernel}):
        looked = look(scale, numpy, None)
    assert not looked.ok and looked.seconds is None
    assert looked.message.startswith("scale on numpy is wrong where it is timed: part in a step (shapes (1024, 384)")
    assert (", call " in looked.message) == fault.startswith("after")
    assert look(scale, numpy, None).ok


@needs_compiler
def test_what_is_counted_on_the_emulator_is_judged() -> None:
    emulator = backends.get("emulator")

    def kernel(x: Any, *, factor: float) -> Any:
        y = emulator.numpy(x) * np.float32(factor)
        return emulator.asarray(zeroes_the_last(y) if y.shape == (SMALL.tokens, SMALL.hidden) else y)

    with emulator.using({scale: kernel}):
        looked = look(scale, emulator, None)
    assert not looked.ok and "is wrong where it is timed" in looked.message and looked.sectors is None


def test_a_change_is_shown_and_no_share_is_above_the_limit() -> None:
    now = {
        "op": "add", "by": "kernel", "ok": True, "message": "", "checks": 7, "ulp_max": 0.5, "bound_share": 1.0,
        "gradient": "", "seconds": 2e-3, "limit_share": 1.5, "sectors": None, "ideal_sectors": None,
    }  # fmt: skip
    shown = line(now, {**now, "seconds": 1e-3})
    assert "2.000 ms (+100%)" in shown and "fit a cache" in shown and "150%" not in shown
