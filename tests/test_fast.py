"""What `make test-fast` runs: tests of every room, each op on NumPy and Numba, nothing that is slow."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minibert.kernels import OPS
from tests.conftest import SLOW


@pytest.fixture(scope="module")
def chosen(root: Path) -> list[str]:
    """The ids of the tests that are marked fast."""
    command = [sys.executable, "-m", "pytest", "-m", "fast", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def rooms(root: Path) -> Iterator[str]:
    for folder in sorted((root / "tests").iterdir()):
        if any(folder.rglob("test_*.py")):
            yield folder.name


def test_every_room_has_fast_tests(root: Path, chosen: list[str]) -> None:
    assert {room for room in rooms(root) if not any(name.startswith(f"tests/{room}/") for name in chosen)} == set()
    for what in (
        "data/test_tokenizer", "model/test_config", "model/test_checkpoint", "model/test_tensor", "train/test_train",
        "cli/test_cli_errors", "backends/test_backends", "lab/conform/test_check", "test_walls",
    ):  # fmt: skip
        assert any(name.startswith(f"tests/{what}.py::") for name in chosen), what


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_every_op_is_checked(chosen: list[str], backend: str) -> None:
    ids = re.findall(rf"test_backend_meets\[(\w+)-{backend}-float32-follows_formula\]", "\n".join(chosen))
    assert set(ids) == set(OPS)


def test_nothing_slow_is_chosen(chosen: list[str]) -> None:
    assert len(chosen) > 1000
    assert not [name for name in chosen if {name.partition("::")[0], name.partition("[")[0]} & SLOW]
    assert not [name for name in chosen if re.search(r"::test_backend_meets\[\w+-(emulator|cupy)-", name)]


@pytest.mark.parametrize("name", sorted(SLOW))
def test_what_is_slow_is_there(root: Path, name: str) -> None:
    module, _, inside = name.partition("::")
    text = (root / module).read_text(encoding="utf-8")
    assert not inside or re.search(rf"\b{inside}\(", text), f"tests/conftest.py: SLOW names what {module} lacks"
