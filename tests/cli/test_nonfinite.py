"""A run that comes to NaN ends with what it takes to see it again; no checkpoint and no line of the log holds one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.kernels.array_module import numpy_module
from minibert.kernels.linear import linear_gelu
from minibert.model.checkpoint import read_arrays
from minibert.tasks.finetune import FineTuningConfig
from minibert.train.checkpoint import read_state
from minibert.train.config import TrainingConfig
from minibert.train.log import LOG
from tests.toy_tasks import FILES, command, make


def broken(x: np.ndarray, w: np.ndarray, b: np.ndarray, **params: Any) -> tuple[np.ndarray, ...]:
    """Right as long as no bias was learned: until the first update."""
    out, *rest = linear_gelu.formula(numpy_module, x, w, b, **params)
    out = np.array(out)
    out[1, 3] = np.nan if b.any() else out[1, 3]
    return (out, *rest)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as cli:
        return make(tmp_path_factory.mktemp("toys"), cli)


def ends(output: Path, said: str, kind: Any, step: int) -> list[str]:
    """Check what such a run leaves; gives the words of the line to paste."""
    assert len(said.splitlines()) == 1 and said.startswith(f"error: step {step}: "), said
    assert "first in op linear_gelu (call " in said and "element [1, 3] of output y" in said, said
    state = read_state(output, kind)
    assert state.progress["step"] == step - 1
    for arrays in (state.arrays, read_arrays(output / "model.safetensors")[0]):
        assert all(np.isfinite(array).all() for array in arrays.values())
    for line in (output / LOG).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    words = shlex.split(said.partition("To see it again: ")[2])
    assert words[:5] == ["minibert", "diff", "numpy", "numpy", "--again"], said
    assert Path(words[5]) == output / f"nonfinite-{step}"
    return words


def sees_it_again(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: object
) -> None:
    assert command(monkeypatch, *words[1:], *more) == 1
    shown = capsys.readouterr().out
    assert "linear_gelu" in shown.splitlines()[0] and "[1, 3]" in shown.splitlines()[0], shown


@pytest.mark.parametrize("objective", ["mlm", "rtd"])
def test_pretraining(
    objective: str, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a kernel of one's own, which is named in the line; the second pass of two fails."""
    (tmp_path / "mine.py").write_text("from tests.cli.test_nonfinite import broken\n")
    run = [toys / "text.txt", "--output", tmp_path / "run", "--layers", 1, "--hidden", 64, "--steps", 3,
           "--tokens-per-batch", 128, "--max-seq-length", 32, "--gradient-accumulation-steps", 2, "--backend", "numpy",
           "--vocab-size", 200, "--save-every", 1, "--objective", objective, "--document-separator", "line",
           "--kernel", f"{tmp_path / 'mine.py'}:broken=linear_gelu"]  # fmt: skip
    assert command(monkeypatch, "pretrain", *run) == 1
    words = ends(tmp_path / "run", capsys.readouterr().err, TrainingConfig, 2)
    assert words[6:] == ["--kernel", f"{tmp_path / 'mine.py'}:broken=linear_gelu"]
    sees_it_again(words, monkeypatch, capsys)


@pytest.mark.parametrize("kind", ["classify", "tag", "regress", "answer"])
def test_fine_tuning(
    kind: str, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, backend = tmp_path / "run", backends.get("numpy")
    run = ["--model", toys / "model", "--train", toys / FILES[kind], "--output", output, "--backend", "numpy",
           "--num-train-epochs", 1, "--save-steps", 1]  # fmt: skip
    with backend.using({linear_gelu: broken}):
        assert command(monkeypatch, "finetune", kind, *run) == 1
        words = ends(output, capsys.readouterr().err, FineTuningConfig, 2)
        sees_it_again(words, monkeypatch, capsys)
    assert command(monkeypatch, *words[1:]) == 0, "the step is sound where the kernel is"


def test_a_folder_that_holds_no_step(toys: Path, refused: Callable[..., str]) -> None:
    assert "batch.safetensors" in refused("diff", "numpy", "numpy", "--again", toys / "model")
    assert "leave out --step" in refused("diff", "numpy", "numpy", "--again", toys / "model", "--steps", 2)
