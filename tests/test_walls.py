"""The walls of the house: what may import what, what ships, and what a bare `import minibert` leaves alone.

Each wall is a function from a tree to the list of its breaches. It is run on the repository, where the list must be
empty, and on a small bad tree, where it must name the breach.
"""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PACKAGES = {"minibert": "minibert", "minibert.backends": "backends", "minibert.kernels": "kernels"}  # name -> folder
FOLDERS = (*PACKAGES.values(), "tests", "bench")

# The tower inside minibert/: a room imports from its own floor and from those below it. `__init__` is the public face.
TOWER = """
    __main__
    cli
    page  conformance
    lab/compare
    lab/measure
    lab/lockstep
    lab/conform
    __init__  moved
    tasks
    train
    tuning
    data
    model
    assets  errors
"""
FLOOR = {room: height for height, floor in enumerate(reversed(TOWER.split("\n"))) for room in floor.split()}

# What each folder may import besides the standard library and itself.
ALLOWED = {
    "kernels": {"numpy", "scipy.special"},
    "backends": {"numpy", "scipy", "numba", "minibert.kernels", "minibert.errors"},
    "minibert": {
        *("numpy", "scipy", "tokenizers", "safetensors", "rich", "typer", "lazy_loader"),
        *("minibert.kernels", "minibert.backends"),
    },
}
# kernels/*/cpu.py and kernels/cpu/ are compiled by Numba; nothing else in kernels/ knows it.
ALLOWED_IN_CPU_FILES = {"numba", "llvmlite"}
# The pytest plugin is made of pytest's classes; nothing else in minibert/ knows pytest.
ALLOWED_IN_PLUGIN = {"minibert/conformance.py": {"pytest"}}
# Optional libraries: imported inside the function that uses them.
ALLOWED_LAZILY = {
    "kernels": set(),
    "backends": {"cupy", "cupyx"},
    "minibert": {
        *("torch", "transformers", "matplotlib", "jinja2", "markupsafe", "pynvml", "sklearn", "seqeval", "optuna"),
        "wandb",
    },
}

LONGEST_FILE = 450
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
TEXT = {".py", ".cu", ".cuh", ".h", ".toml", ".md", ".cfg", ".yml", ".yaml", ".sh", ""}


class Import(NamedTuple):
    """One imported name: the line it stands on, what it names, and whether it waits until a function is called."""

    line: int
    name: str
    lazy: bool


def files(tree: Path, *folders: str) -> Iterator[Path]:
    """The files of some folders of a tree, in order; links and caches are left out."""
    for folder in folders:
        for path in sorted((tree / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def sources(tree: Path, *folders: str) -> Iterator[tuple[Path, str, ast.Module]]:
    """Each Python file of some folders: its path, the path as printed, and its syntax tree."""
    for path in files(tree, *folders):
        if path.suffix == ".py":
            yield path, path.relative_to(tree).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: Path, module: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """Every import under a node. `from minibert import nn` names `minibert.model.nn` where that is a module."""
    for node in ast.iter_child_nodes(module):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(node.lineno, inner if is_module(tree, inner) else node.module, lazy)
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(tree, node, lazy or function)


def is_module(tree: Path, name: str) -> bool:
    """Whether a dotted name is a module: of the tree where it is ours, else of scipy (`from scipy import special`)."""
    if name.startswith("scipy."):
        return name.count(".") == 1
    for package in sorted(PACKAGES, key=len, reverse=True):
        if name == package or name.startswith(package + "."):
            path = tree / PACKAGES[package] / name[len(package) + 1 :].replace(".", "/")
            return path.is_dir() or path.with_suffix(".py").is_file()
    return False


def within(name: str, allowed: set[str]) -> bool:
    """Whether a dotted name is one of some modules or lies inside one."""
    return any(name == module or name.startswith(module + ".") for module in allowed)


def room(name: str) -> str:
    """The room of minibert/ that a dotted name belongs to: a line of TOWER, where it is one."""
    parts = [*name.split(".")[1:3], "", ""]
    return f"lab/{parts[1] or '__init__'}" if parts[0] == "lab" else parts[0] or "__init__"


# The walls


def wall_folders(tree: Path) -> list[str]:
    """kernels <- backends <- minibert, and each folder with its own few libraries."""
    breaches = []
    for package, folder in PACKAGES.items():
        for path, where, module in sources(tree, folder):
            allowed = ALLOWED[folder] | {package if folder != "minibert" else "minibert"}
            if folder == "kernels" and (path.name == "cpu.py" or path.parent.name == "cpu"):
                allowed = allowed | ALLOWED_IN_CPU_FILES
            allowed = allowed | ALLOWED_IN_PLUGIN.get(where, set())
            for line, name, lazy in imports(tree, module):
                if name.split(".")[0] in sys.stdlib_module_names or within(name, allowed):
                    continue
                if within(name, ALLOWED_LAZILY[folder]):
                    if not lazy:
                        breaches.append(f"{where}:{line} imports the optional {name} outside a function")
                else:
                    breaches.append(f"{where}:{line} may not import {name}")
    return breaches


def wall_tower(tree: Path) -> list[str]:
    """Inside minibert/ nothing imports upward, not even inside a function."""
    breaches = []
    for path, where, module in sources(tree, "minibert"):
        if where == "minibert/lab/__init__.py":
            continue  # it only says what is in the rooms inside
        here = room(".".join(path.relative_to(tree).with_suffix("").parts))
        if here not in FLOOR:
            breaches.append(f"{where} is in no room: give {here!r} a floor in TOWER of tests/test_walls.py, or move it")
            continue
        for line, name, _ in imports(tree, module):
            there = room(name)
            if name.split(".")[0] != "minibert" or there in ("kernels", "backends"):
                continue
            if FLOOR.get(there, -1) > FLOOR[here]:
                breaches.append(f"{where}:{line} imports upward: {here} <- {there}")
    return breaches


def wall_cycles(tree: Path) -> list[str]:
    """No two modules import each other when they are loaded."""
    graph: dict[str, set[str]] = {}
    for package, folder in PACKAGES.items():
        for path, _, module in sources(tree, folder):
            inner = path.relative_to(tree / folder).with_suffix("").parts
            name = ".".join((package, *inner)).removesuffix(".__init__")
            found = {target.name for target in imports(tree, module) if not target.lazy}
            graph[name] = {target for target in found if is_module(tree, target) and target != name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["modules import each other: " + " <- ".join(error.args[1])]
    return []


def wall_absolute(tree: Path) -> list[str]:
    """Imports are absolute, and never by the bare name of a folder that is part of minibert."""
    breaches = []
    for _, where, module in sources(tree, *FOLDERS):
        for node in ast.walk(module):
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                breaches.append(f"{where}:{node.lineno} imports relatively: from {'.' * node.level}{node.module or ''}")
        for line, name, _ in imports(tree, module):
            if name.split(".")[0] in ("kernels", "backends"):
                breaches.append(f"{where}:{line} imports {name}: say minibert.{name}")
    return breaches


def wall_packages(tree: Path) -> list[str]:
    """pyproject.toml lists every folder that ships, no other, and has a pattern for every file that is not Python."""
    tools = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    shipped: dict[str, list[str]] = {}
    for package, folder in PACKAGES.items():
        for path in files(tree, folder):
            inner = path.relative_to(tree / folder).parent.parts
            shipped.setdefault(".".join((package, *inner)), []).append(path.name)
    breaches = [f'add the line "{name}", to packages' for name in sorted(shipped.keys() - set(tools["packages"]))]
    breaches += [f'remove "{name}" from packages' for name in sorted(set(tools["packages"]) - shipped.keys())]
    patterns: dict[str, list[str]] = tools.get("package-data", {})
    for package, names in sorted(shipped.items()):
        known = ["*.py", *patterns.get("*", []), *patterns.get(package, [])]
        for name in names:
            if not any(fnmatch.fnmatch(name, pattern) for pattern in known):
                breaches.append(f"{package}: {name} would not ship: add its pattern to package-data")
    return breaches


def wall_signs(tree: Path) -> list[str]:
    """Each folder of modules says at its door what is in it."""
    folders = {path.parent for path, _, _ in sources(tree, *PACKAGES.values())}
    doors = [folder / "__init__.py" for folder in sorted(folders)]
    signed = [door for door in doors if door.is_file() and ast.get_docstring(ast.parse(door.read_text()))]
    return [f"{door.relative_to(tree)}: say what is in the folder" for door in doors if door not in signed]


def wall_finished(tree: Path) -> list[str]:
    """No file says that it is unfinished, and none is too long to read."""
    breaches = []
    top = [path for path in sorted(tree.iterdir()) if path.is_file()]
    for path in (*top, *files(tree, *FOLDERS, ".ci")):
        if path.suffix not in TEXT or path.name.startswith("."):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        where = path.relative_to(tree).as_posix()
        breaches += [
            f"{where}:{n} says {found[0]}" for n, line in enumerate(lines, 1) if (found := UNFINISHED.search(line))
        ]
        if path.suffix == ".py" and len(lines) > LONGEST_FILE:
            breaches.append(f"{where} has {len(lines)} lines, over {LONGEST_FILE}")
    return breaches


WALLS = (wall_folders, wall_tower, wall_cycles, wall_absolute, wall_packages, wall_signs, wall_finished)
Wall = Callable[[Path], list[str]]

PYPROJECT = """
[tool.setuptools]
packages = ["minibert", "minibert.backends", "minibert.kernels", "minibert.kernels.cpu", "minibert.model"]
[tool.setuptools.package-data]
"*" = ["*.cu"]
"""
# A tree that stands: every wall is silent on it.
GOOD = {
    "pyproject.toml": PYPROJECT,
    "kernels/__init__.py": "'The op set.'\nimport math\nimport numpy as np\nfrom scipy import special",
    "kernels/cpu/__init__.py": "'What families share.'",
    "kernels/softmax.cu": "",
    "kernels/cpu/math.py": "from numba import njit",
    "backends/__init__.py": "'Where ops run.'\nfrom minibert.kernels.cpu import math\ndef gpu():\n    import cupy",
    "minibert/__init__.py": "'The public face.'\nfrom minibert.model.tensor import Tensor",
    "minibert/model/__init__.py": "'The model.'",
    "minibert/errors.py": "",
    "minibert/model/tensor.py": "from minibert import backends, errors\nimport minibert.kernels",
    "minibert/model/nn.py": "from minibert.model.tensor import Tensor",
}
# The same tree with one file changed: the wall that must break, and what it must say.
BAD: list[tuple[Wall, str, str, str]] = [
    (wall_folders, "kernels/a.py", "import minibert.backends", "kernels/a.py:1 may not import minibert.backends"),
    (wall_folders, "kernels/a.py", "from minibert import backends", "kernels/a.py:1 may not import minibert.backends"),
    (wall_folders, "kernels/a.py", "from minibert.errors import E", "kernels/a.py:1 may not import minibert.errors"),
    (wall_folders, "kernels/a.py", "import numba", "kernels/a.py:1 may not import numba"),
    (wall_folders, "kernels/a.py", "from scipy import linalg", "kernels/a.py:1 may not import scipy.linalg"),
    (wall_folders, "kernels/cpu.py", "def f():\n    import cupy", "kernels/cpu.py:2 may not import cupy"),
    (
        wall_folders,
        "backends/a.py",
        "from minibert.model.nn import x",
        "backends/a.py:1 may not import minibert.model.nn",
    ),
    (wall_folders, "backends/a.py", "import cupy", "backends/a.py:1 imports the optional cupy outside a function"),
    (
        wall_folders,
        "minibert/model/nn.py",
        "try:\n    import torch\nexcept ImportError: pass",
        "nn.py:2 imports the optional torch",
    ),
    (wall_folders, "minibert/model/nn.py", "import pytest", "minibert/model/nn.py:1 may not import pytest"),
    (wall_folders, "minibert/model/nn.py", "import requests", "minibert/model/nn.py:1 may not import requests"),
    (wall_tower, "minibert/model/nn.py", "from minibert.train import optim", "nn.py:1 imports upward: model <- train"),
    (wall_tower, "minibert/model/nn.py", "def f():\n    from minibert.data import x", "imports upward: model <- data"),
    (wall_tower, "minibert/model/nn.py", "import minibert", "minibert/model/nn.py:1 imports upward: model <- __init__"),
    (wall_tower, "minibert/lab/conform/a.py", "import minibert.lab.compare", "upward: lab/conform <- lab/compare"),
    (wall_tower, "minibert/new.py", "", "minibert/new.py is in no room: give 'new' a floor in TOWER"),
    (wall_tower, "minibert/lab/new/a.py", "", "minibert/lab/new/a.py is in no room: give 'lab/new' a floor"),
    (wall_cycles, "kernels/cpu/math.py", "import minibert.backends", "minibert.backends"),
    (
        wall_absolute,
        "minibert/model/nn.py",
        "from . import tensor",
        "minibert/model/nn.py:1 imports relatively: from .",
    ),
    (wall_absolute, "tests/test_a.py", "from kernels.op import Op", "say minibert.kernels.op"),
    (wall_packages, "kernels/softmax/cpu.py", "", 'add the line "minibert.kernels.softmax", to packages'),
    (
        wall_packages,
        "pyproject.toml",
        PYPROJECT.replace('"minibert",', '"minibert", "minibert.old",'),
        'remove "minibert.old"',
    ),
    (wall_packages, "minibert/table.csv", "", "minibert: table.csv would not ship"),
    (wall_signs, "minibert/model/__init__.py", "import numpy", "minibert/model/__init__.py: say what is in the folder"),
    (wall_signs, "minibert/new/a.py", "", "minibert/new/__init__.py: say what is in the folder"),
    (wall_finished, "bench/ops.py", "# TO" + "DO: time it", "bench/ops.py:1 says TO" + "DO"),
    (wall_finished, "NOTES.md", "FIX" + "ME", "NOTES.md:1 says FIX" + "ME"),
    (wall_finished, "tests/test_a.py", "\n" * 451, "tests/test_a.py has 451 lines"),
]


def build(tree: Path, contents: dict[str, str]) -> Path:
    """Write a small tree, with the links that a checkout has."""
    for name, text in contents.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text, encoding="utf-8")
    for folder in ("kernels", "backends"):
        (tree / "minibert" / folder).symlink_to(f"../{folder}", target_is_directory=True)
    return tree


@pytest.mark.parametrize("wall", WALLS)
def test_wall_stands(wall: Wall, root: Path) -> None:
    breaches = wall(root)
    assert not breaches, "\n".join([wall.__doc__ or "", *breaches])


@pytest.mark.parametrize("wall", WALLS)
def test_wall_is_silent_on_a_good_tree(wall: Wall, tmp_path: Path) -> None:
    assert wall(build(tmp_path, GOOD)) == []


@pytest.mark.parametrize(("wall", "name", "text", "message"), BAD)
def test_wall_breaks_on_a_bad_tree(wall: Wall, name: str, text: str, message: str, tmp_path: Path) -> None:
    breaches = wall(build(tmp_path, {**GOOD, name: text}))
    assert len(breaches) == 1
    assert message in breaches[0]


def test_the_walls_look_at_the_repository(root: Path) -> None:
    """They would stand on an empty folder too."""
    seen = {where: [i.name for i in imports(root, module)] for _, where, module in sources(root, *PACKAGES.values())}
    assert len(seen) > 20
    assert "minibert.kernels.philox" in seen["kernels/dropout/__init__.py"]


def python(code: str, folder: Path) -> Any:
    """Run a line of Python from a folder, in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("code", "uninvited"),
    [
        ("import minibert", "cupy torch transformers matplotlib onnx numba pytest"),
        ("import minibert; minibert.backends.get('numpy')", "cupy torch transformers matplotlib onnx numba"),
        ("import minibert; minibert.backends.get('numba')", "cupy torch transformers matplotlib onnx"),
    ],
)
def test_optional_libraries_are_not_imported_uninvited(code: str, uninvited: str, root: Path) -> None:
    done = python(f"{code}\nimport sys; print(*set({uninvited.split()}) & set(sys.modules))", root)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_an_uninvited_import_would_be_seen(root: Path) -> None:
    assert python("import numba, sys; print('numba' in sys.modules)", root).stdout == "True\n"


@pytest.mark.parametrize("code", ["from kernels import OPS", "import kernels.op", "import backends"])
def test_bare_name_is_refused(code: str, root: Path) -> None:
    """In the repository's folder they are found by that name too: it would make a second registry."""
    done = python(code, root)
    package = f"minibert.{code.split()[1].split('.')[0]}"
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said == f"ImportError: this folder is the package `{package}`: import it by that name"


@pytest.mark.parity
def test_transformers_works_in_the_repository(root: Path) -> None:
    """It imports whatever is called `kernels`, to ask for the version of the library of that name."""
    done = python("from transformers import BertModel; import sys; print('minibert' in sys.modules)", root)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
