"""The wheel: what is in it, that it works where the repository is not, and that others' backends plug into it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import minibert

FOLDERS = {"minibert": "minibert", "backends": "minibert/backends", "kernels": "minibert/kernels"}  # tree -> wheel
TOY_PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "minibert-toy"
version = "0.1"
[project.entry-points."minibert.backends"]
toy = "minibert_toy:backend"
[tool.setuptools]
py-modules = ["minibert_toy"]
"""
TOY_MODULE = """
from minibert.backends import Backend
from minibert.kernels.array_module import numpy_module

backend = Backend("toy", numpy_module)
"""
OFFLINE = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")


def run(*command: str | Path, cwd: Path, path: tuple[Path, ...] = ()) -> Any:
    """Run Python from a folder outside the repository, seeing only the given folders and the libraries."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(words)} in {cwd}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree with its links, so that no older build lends it files."""
    copy = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(root / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    out = tmp_path_factory.mktemp("wheel")
    run("-m", "pip", "wheel", *OFFLINE, "--wheel-dir", out, copy, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", *OFFLINE, "--target", target, wheel, cwd=target)
    return target


def test_the_wheel_holds_every_file_once(wheel: Path, root: Path) -> None:
    names = Counter(name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name)
    assert max(names.values()) == 1
    expected = {
        f"{inside}/{path.relative_to(root / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert set(names) == expected
    assert {"minibert/kernels/op.py", "minibert/backends/__init__.py", "minibert/py.typed"} <= expected


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    read = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert wheel.name.startswith("minibert_lab-") and "\nName: minibert-lab\n" in read["METADATA"]
    assert read["top_level.txt"].split() == ["minibert"]
    assert "minibert = minibert.cli:main" in read["entry_points.txt"]
    assert "MIT License" in read["LICENSE"]
    assert "License-Expression: MIT" in read["METADATA"]
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", read["METADATA"], re.MULTILINE)
    assert sorted(required) == ["lazy-loader", "numba", "numpy", "rich", "safetensors", "scipy", "tokenizers", "typer"]


def test_the_wheel_works_without_the_repository(installed: Path, root: Path, tmp_path: Path) -> None:
    code = """
import sys
import minibert
backend = minibert.backends.get("numpy")
ops = minibert.kernels.OPS
print(len(ops))
print(*sorted(module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "minibert"), sep="\\n")
"""
    count, *modules = run("-c", code, cwd=tmp_path, path=(installed,)).splitlines()
    assert int(count) > 10
    assert len(modules) > 10
    assert [name for name in modules if not name.startswith(f"{installed}{os.sep}")] == []


def test_the_command_line_works_without_the_repository(installed: Path, tmp_path: Path) -> None:
    printed = run("-m", "minibert", "backends", cwd=tmp_path, path=(installed,))
    assert "numpy" in printed
    assert "numba" in printed


def test_a_backend_of_another_distribution_is_found(installed: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "pyproject.toml").write_text(TOY_PROJECT, encoding="utf-8")
    (source / "minibert_toy.py").write_text(TOY_MODULE, encoding="utf-8")
    run("-m", "pip", "install", *OFFLINE, "--target", target, source, cwd=tmp_path)
    code = """
import sys
import numpy as np
import minibert
print(*minibert.backends.names(), "minibert_toy" in sys.modules)
toy, reference = minibert.backends.get("toy"), minibert.backends.get("numpy")
x = np.array([[1.0, 2.0, 4.0]], np.float32)
softmax = minibert.kernels.OPS["softmax"]
print(toy.name, toy is not reference, (toy.run(softmax, x) == reference.run(softmax, x)).all())
"""
    known, ran = run("-c", code, cwd=tmp_path, path=(installed, target)).splitlines()
    assert known.split() == ["numpy", "numba", "cupy", "emulator", "toy", "False"]  # known by name, not yet imported
    assert ran == "toy True True"
    without = "import minibert; print(*minibert.backends.names())"
    assert run("-c", without, cwd=tmp_path, path=(installed,)) == "numpy numba cupy emulator\n"


def test_every_name_of_the_package_is_there_and_is_in_its_stub() -> None:
    stub = ast.parse(Path(minibert.__file__).with_suffix(".pyi").read_text("utf-8"))
    (listed,) = (ast.literal_eval(n.value) for n in stub.body if isinstance(n, ast.Assign))
    assert sorted(listed) == sorted(minibert.__all__)
    assert all(getattr(minibert, name) for name in listed)
