"""Without a package that a command needs: one line that says what to install, exit code 2, and nothing failed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from minibert import backends
from minibert.cli import in_one_line, main
from tests.emulator_device import needs_compiler

KERNEL = "def scale(x, *, factor):\n    return x * x.dtype.type(factor)\n"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Take packages away, as if they had never been installed."""
    find = importlib.util.find_spec

    def take(*packages: str) -> None:
        def find_others(name: str, package: str | None = None) -> ModuleSpec | None:
            return None if name.partition(".")[0] in packages else find(name, package)

        for module in [*packages, *(m for m in sys.modules if m.partition(".")[0] in packages)]:
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setattr(importlib.util, "find_spec", find_others)

    return take


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line of a command that cannot be done."""

    def run(command: str) -> str:
        monkeypatch.setattr(sys, "argv", ["minibert", *command.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert (ended.value.code, printed.out) == (2, ""), printed
        (line,) = printed.err.splitlines()
        return line

    return run


@needs_compiler
@pytest.mark.parametrize(
    "command",
    [
        "check softmax --backend emulator --dtype bfloat16",
        "check softmax --backend emulator --dtype float32,bfloat16",
        "check scale --backend emulator --dtype bfloat16 --kernel mine.py:scale=scale",
        "diff emulator numpy --dtype bfloat16",
        "bisect emulator emulator --dtype bfloat16",
        "compare --backend emulator --dtype bfloat16",
        "watch mine.py:scale=scale --backend emulator --dtype bfloat16 --once",
        "pretrain --output new --backend emulator --dtype bfloat16",
    ],
)
def test_bfloat16_without_ml_dtypes(
    command: str, without: Callable[..., None], said: Callable[..., str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(KERNEL)
    without("ml_dtypes")
    assert said(command) == "error: bfloat16 arrays need ml_dtypes: pip install ml_dtypes"
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["mine.py"]


def test_a_system_without_file_locks(
    without: Callable[..., None], said: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has no fcntl: whoever writes into a folder alone says so before anything is there."""
    monkeypatch.chdir(tmp_path)
    without("fcntl", "resource")
    line = said("pretrain --output new --backend numpy --config tiny")
    assert line == "error: this needs file locks, of Linux or macOS: run it on one of them"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("packages", "command", "advice"),
    [
        ("matplotlib", "compare --report new", "--report needs matplotlib: pip install 'minibert-lab[report]'"),
        ("jinja2", "compare --report new", "--report needs jinja2: pip install 'minibert-lab[report]'"),
        ("cupy", "check --backend cupy", "CuPy is not installed: pip install 'minibert-lab[cuda1"),
        ("cupy", "pretrain --output new --backend cupy", "CuPy is not installed: pip install 'minibert-lab[cuda1"),
        ("numba scipy", "check --backend numba", "pip install numba scipy"),
        ("numba scipy", "diff numba numpy", "pip install numba scipy"),
        ("numba scipy", "watch ROOT/kernels/softmax/cpu.py --once", "pip install numba scipy"),
        ("nvidia", "kernels build", "pip install 'minibert-lab[nvrtc]'"),
    ],
)
def test_a_package_that_a_command_needs(
    packages: str, command: str, advice: str, without: Callable[..., None], said: Callable[..., str],
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backends, "_loaded", {})
    without(*packages.split())
    for module in [name for name in sys.modules if name in backends.BUILT_IN.values()]:
        monkeypatch.delitem(sys.modules, module)
    if packages == "nvidia":
        from minibert.backends.cuda import nvrtc

        monkeypatch.setattr(nvrtc, "_places", lambda: iter(()))
        nvrtc.toolkit.cache_clear()
    assert advice in said(command.replace("ROOT", str(root)))
    assert not list(tmp_path.iterdir())


def test_any_other_package_is_named_in_one_line(said: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    from minibert.cli import tables

    def raises(*given: object, **more: object) -> None:
        raise ModuleNotFoundError("No module named 'llvmlite.ir'", name="llvmlite.ir")

    monkeypatch.setattr(tables, "plain_table", raises)
    assert said("backends") == "error: llvmlite is not installed: pip install llvmlite"


def test_a_module_of_our_own_that_is_missing_is_no_user_s_mistake() -> None:
    with pytest.raises(ModuleNotFoundError):
        in_one_line(ModuleNotFoundError("No module named 'minibert.none'", name="minibert.none"))
