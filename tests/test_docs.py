"""The documents are true: their examples run, and what they name exists."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minibert.kernels import OPS
from minibert.lab.conform.check import check


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_the_op_and_the_kernel_of_contributing_pass_every_check(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    op_source, kernel_source, *_ = blocks(root / "CONTRIBUTING.md", "python")
    package = tmp_path / "silu"
    package.mkdir()
    (package / "__init__.py").write_text(op_source)
    (package / "cpu.py").write_text(kernel_source)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("silu", "silu_grad"):
        assert name not in OPS
    try:
        importlib.import_module("silu")
        results = list(check(["silu", "silu_grad"], ["numpy", "numba"]))
        assert {r.by for r in results if r.op == "silu" and r.backend == "numba"} == {"kernel"}
        assert not [r.message for r in results if not r.ok]
    finally:
        for name in ("silu", "silu_grad"):
            OPS.pop(name, None)
        for name in [n for n in sys.modules if n.partition(".")[0] == "silu"]:
            del sys.modules[name]


def test_the_backend_of_contributing_is_one(root: Path) -> None:
    source = next(b for b in blocks(root / "CONTRIBUTING.md", "python") if "Backend(" in b)
    space: dict[str, object] = {}
    exec(source, space)
    assert all(r.ok for r in check(["softmax"], [space["backend"]], ["float32"]))  # type: ignore[list-item]


def test_the_readme_shows_what_the_demo_prints(root: Path) -> None:
    text = (root / "README.md").read_text()
    assert "PASS 2" in text and "@@" not in text


def test_the_python_of_the_readme_runs(root: Path, tmp_path: Path) -> None:
    source = "\n".join(blocks(root / "README.md", "python"))
    environment = {**os.environ, "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-c", source], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_files_and_commands_that_documents_name_exist(root: Path, document: str) -> None:
    text = (root / document).read_text()
    named = re.findall(r"`((?:kernels|backends|minibert|tests|bench)/[\w./*-]+\.\w+)`", text)
    missing = [n for n in named if not list(root.glob(n)) and "silu" not in n]
    assert not missing
    from minibert.cli import app, bisect, build, check, compare, diff, pretrain, tables, tokenizer, watch  # noqa: F401

    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    commands |= {group.name for group in app.registered_groups if group.name}
    used = set(re.findall(r"(?:^|`|bin/)minibert (?!is )([a-z]+)", text, flags=re.MULTILINE))
    assert used
    assert used <= commands
