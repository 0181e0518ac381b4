"""The documents are true: their examples run, and what they name exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from minibert import backends
from minibert.backends.cuda import nvrtc
from minibert.errors import DISTRIBUTION, pip_install
from minibert.kernels import OPS
from minibert.lab.conform.check import check
from minibert.moved import MOVED


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def files_of(page: Path) -> dict[str, str]:
    """The files that a page gives: path -> source."""
    text = page.read_text(encoding="utf-8")
    return dict(re.findall(r"`(kernels/\w+/[\w.]+)`:\n\n```\w+\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE))


def test_ops_are_added_as_the_pages_say(root: Path, tmp_path: Path) -> None:
    """Both ops of CONTRIBUTING.md and the CUDA kernel of docs/cuda.md, to the letter, in a copy of the tree."""
    if "silu" in OPS:
        pytest.skip("this tree has silu already")
    tree = tmp_path / "minibert"
    leave = shutil.ignore_patterns(".git", ".venv*", "*_cache", "__pycache__", "*.egg-info", "build", "results")
    shutil.copytree(root, tree, symlinks=True, ignore=leave)
    files = files_of(root / "CONTRIBUTING.md") | files_of(root / "docs" / "cuda.md")
    assert len(files) == 6
    for name, source in files.items():
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text(source, encoding="utf-8")
    project = tree / "pyproject.toml"
    for op, after in (("rms_norm", "reduction"), ("silu", "rms_norm")):
        line = '    "minibert.kernels.{}",\n'.format
        project.write_text(project.read_text().replace(line(after), line(after) + line(op)))
    environment = {**os.environ, "PYTHONPATH": str(tree), "MINIBERT_CACHE_DIR": str(tmp_path / "cache")}

    def run(*words: str, **more: str) -> str:
        command = [sys.executable, "-m", *words]
        done = subprocess.run(
            command, cwd=tree, env={**environment, **more}, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
        return done.stdout

    said = run("minibert", "check", "silu", "silu_grad", "rms_norm", "rms_norm_grad", "--backend", "numpy,numba")
    assert "PASS" in said and len(re.findall(r"^ (?:silu|rms_norm).* numba +float32 +kernel", said, re.M)) == 3
    if any(status.name == "emulator" and status.backend for status in backends.available()):
        said = run("minibert", "check", "silu", "--backend", "emulator", "--dtype", "float32,float16,bfloat16")
        assert len(re.findall(r"^ silu +emulator +\w+ +kernel", said, re.M)) == 3
    run("pytest", "-q", "tests/kernels/test_regression.py", "-k", "silu or rms_norm", MINIBERT_REFRESH="1")
    if nvrtc.available() is None:
        run("minibert", "kernels", "build", "--update-budget", "--markdown", "docs/kernels.md")
    run("pytest", "-q", "-p", "no:cacheprovider", "-k", "silu or rms_norm or test_wall or in_the_budget")
    for tool in (("ruff", "check", "kernels"), ("mypy", *(str(tree / name) for name in files if name.endswith(".py")))):
        if importlib.util.find_spec(tool[0]) is not None:
            run(*tool)


def test_the_backend_of_contributing_is_one(root: Path) -> None:
    source = next(b for b in blocks(root / "CONTRIBUTING.md", "python") if "Backend(" in b)
    space: dict[str, object] = {}
    exec(source, space)
    assert all(r.ok for r in check(["softmax"], [space["backend"]], ["float32"]))  # type: ignore[list-item]


PAGES = ("README.md", "CONTRIBUTING.md", "docs/conformance.md", "docs/cuda.md", "docs/emulator.md")


def named_in(page: Path) -> set[str]:
    """Dotted names of ours on a page: imported or used in its Python, or between backquotes in its text."""
    names = set(re.findall(r"`(minibert(?:\.\w+)+)`", page.read_text(encoding="utf-8")))
    for source in blocks(page, "python"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "minibert":
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "minibert"}
            elif isinstance(node, ast.Attribute) and (dotted := ast.unparse(node)).startswith("mb."):
                names |= {found[0] for found in [re.match(r"[\w.]+", f"minibert.{dotted[3:]}")] if found}
    return {name for name in names if "silu" not in name and "rms_norm" not in name}


@pytest.mark.parametrize("page", PAGES)
def test_every_name_that_a_page_names_is_there(root: Path, page: str) -> None:
    names = named_in(root / page)
    assert names
    for name in names:
        assert pkgutil.resolve_name(name) is not None


@pytest.mark.parametrize("former", MOVED)
def test_former_names_of_modules_are_the_same_modules(former: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{former} is {MOVED[former]} now"):
        sys.modules.pop(former, None)
        module = importlib.import_module(former)
    assert module is importlib.import_module(MOVED[former])
    assert module.__spec__ is not None and module.__spec__.name == MOVED[former]


def test_the_readme_shows_what_the_demo_prints(root: Path) -> None:
    text = (root / "README.md").read_text()
    assert "PASS 2" in text and "@@" not in text


def test_the_python_of_the_readme_runs(root: Path, tmp_path: Path) -> None:
    source = "\n".join(blocks(root / "README.md", "python"))
    environment = {**os.environ, "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-c", source], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_files_and_commands_that_documents_name_exist(root: Path, document: str) -> None:
    text = (root / document).read_text()
    named = re.findall(r"`((?:kernels|backends|minibert|tests|bench)/[\w./*-]+\.\w+)`", text)
    missing = [n for n in named if not list(root.glob(n)) and n not in files_of(root / document)]
    assert not missing
    from minibert.cli import app, register_commands

    register_commands()
    commands = {c.name or c.callback.__name__.replace("_", "-") for c in app.registered_commands if c.callback}
    commands |= {group.name for group in app.registered_groups if group.name}
    used = set(re.findall(r"(?:^|`|bin/)minibert (?!is )([a-z-]+)", text, flags=re.MULTILINE))
    assert used
    assert used <= commands


def advising_strangers_code(text: str) -> list[str]:
    """What advises to install `minibert`, which on the package index is somebody else's package."""
    return re.findall(r"minibert\\?\[[a-z][^\]]*\]|\bpip install [^\n`]*?(?<![-./\w])minibert(?![-./\w])", text)


def test_advising_strangers_code_is_seen() -> None:
    assert advising_strangers_code("`pip install 'minibert[cuda12]'` or `'minibert[cuda13]'`") != []
    assert advising_strangers_code("run pip install minibert\nand go on") == ["pip install minibert"]
    assert advising_strangers_code("pip install 'minibert-lab[cuda12]' for `minibert compare`") == []


def test_whatever_is_advised_to_be_installed_is_ours(root: Path) -> None:
    paths = [root / "README.md", root / "CONTRIBUTING.md", root / "Makefile", *(root / "docs").glob("*.md")]
    paths += sources(root, "minibert", "backends", "kernels", "bench", "tests")
    for path in paths:
        if path != Path(__file__):
            assert advising_strangers_code(path.read_text(encoding="utf-8")) == [], path
    assert f"pip install '{DISTRIBUTION}[" in (root / "README.md").read_text(encoding="utf-8")
    assert tomllib.loads((root / "pyproject.toml").read_text())["project"]["name"] == DISTRIBUTION


def test_one_place_writes_what_to_install(root: Path) -> None:
    """Strings of the code, and the reasons of skipped tests; what tests expect to read stands in their own words."""

    def strings(node: ast.AST) -> str:
        return "\n".join(
            one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and type(one.value) is str
        )

    def shown(node: ast.AST) -> bool:
        skips = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("skip")
        return skips or (isinstance(node, ast.keyword) and node.arg == "reason")

    trees = {path: ast.parse(path.read_text()) for path in sources(root, "minibert", "backends", "kernels", "bench")}
    found = [path for path, tree in trees.items() if "pip install" in strings(tree)]
    for path in sources(root, "tests"):
        parts = (node for node in ast.walk(ast.parse(path.read_text())) if shown(node))
        found += [path for node in parts if "pip install" in strings(node)]
    assert found == [root / "minibert" / "errors.py"]
    assert pip_install("[report,bench]", "torch") == "pip install 'minibert-lab[report,bench]' torch"
    assert pip_install("nvidia-cublas==13.*") == "pip install 'nvidia-cublas==13.*'"


def sources(root: Path, *folders: str) -> list[Path]:
    paths = (path for folder in folders for path in (root / folder).rglob("*.py"))
    return sorted(path for path in paths if "__pycache__" not in path.parts)
