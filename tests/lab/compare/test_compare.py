"""`minibert compare` as a person runs it: what it prints and writes, and that a wrong kernel is caught and named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import minibert as mb
from minibert import backends
from minibert.cli import main
from minibert.data import SHIPPED_VOCABULARY
from minibert.kernels import OPS
from minibert.lab.compare import records

pytestmark = pytest.mark.usefixtures("smaller_tiny")
SMALL = ["--config", "tiny", "--tokens", "200", "--max-seq-length", "48", "--steps", "3"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["minibert", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def facts(smaller_tiny: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one small comparison wrote."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minibert.lab.measure.peaks.ROUNDS", 2)  # they need not be the best
        files = ["--json", str(folder / "facts.json"), "--markdown", str(folder / "page.md")]
        assert run(patch, "compare", *SMALL, *files) == 0
    return json.loads((folder / "facts.json").read_text()) | {"page": (folder / "page.md").read_text()}


def test_the_json_holds_the_facts(facts: dict[str, Any]) -> None:
    names = [b["name"] for b in facts["backends"]]
    assert names[:2] == ["numpy", "numba"]
    assert facts["ok"] is True
    assert {"system", "processor", "cores", "python"} <= set(facts["machine"])
    keys = ["op", "backend", "by", "calls", "ms", "gflops", "gbps", "ulp_max", "err_over_us", "bound_share", "ok"]
    assert all(set(keys) <= set(row) for row in facts["ops"])
    assert all(
        set(["stage", "backend", "ms_per_sample", "ms_per_token", "peak_bytes"]) <= set(row) for row in facts["stages"]
    )
    for name in names:
        assert {row["stage"] for row in facts["stages"] if row["backend"] == name} == set(records.STAGES)
        assert len(facts["loss"][name]) == 3


def test_every_op_of_the_step_is_judged_and_timed_on_every_backend(facts: dict[str, Any]) -> None:
    per_backend = [{r["op"] for r in facts["ops"] if r["backend"] == b} for b in facts["loss"]]
    assert all(ops == per_backend[0] for ops in per_backend)
    assert {
        "attention",
        "attention_grad",
        "linear_gelu",
        "linear_cross_entropy",
        "adamw",
        "square_norm",
    } <= per_backend[0]
    for row in facts["ops"]:
        assert row["judged"] > 0, row
        assert row["ok"], row
        assert row["bound_share"] <= 1, row
        assert row["ms"] > 0, row
    for name in facts["loss"]:
        assert sum(r["share"] for r in facts["ops"] if r["backend"] == name) < 1


def test_the_losses_agree_and_fall(facts: dict[str, Any]) -> None:
    assert facts["distance"]["numpy"] == {"loss": 0.0, "weights": 0.0}
    assert facts["distance"]["numba"]["loss"] < 1e-5
    assert 0 < facts["distance"]["numba"]["weights"] < 1e-3
    for losses in facts["loss"].values():
        assert losses[-1] < losses[0]


def test_the_page_shows_the_same_rows(facts: dict[str, Any]) -> None:
    page = facts["page"]
    for title in ("Speed", "Error", "Stages", "Loss after each step"):
        assert f"## {title}" in page
    assert all(f"| {row['op']} |" in page for row in facts["ops"])
    assert "PASS" in page
    assert "[green]" not in page


WRONG = """
import numpy as np

calls = 0

def late(g, x, approximate="none"):
    global calls
    calls += 1
    return right(g, x, approximate) * np.float32(1 if calls < 7 else 3)

def flat(g, x, approximate="none"):
    return right(g, x, approximate).reshape(-1)

def softmax(x):
    return x

def nan(a, b):
    return a * b * np.float32("nan")

def off(g, x, approximate="none"):
    from minibert.kernels.activation import gelu_grad
    from minibert.kernels.array_module import numpy_module
    return gelu_grad.formula(numpy_module, g, x, approximate=approximate) * np.float32(1.001)

def right(g, x, approximate="none"):
    from minibert.kernels.activation import gelu_grad
    from minibert.kernels.array_module import numpy_module
    return gelu_grad.formula(numpy_module, g, x, approximate=approximate)
"""


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(WRONG)
    return path


def test_a_kernel_that_is_off_fails_and_is_named(
    kernels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "compare", *SMALL, "--kernel", f"{kernels}:off=gelu_grad") == 1
    assert "FAIL gelu_grad on numba: dx[" in " ".join(capsys.readouterr().out.split())
    assert backends.get("numba").kernel(OPS["gelu_grad"]).__name__ == "gelu_grad", "the kernel is put back"


def test_a_kernel_that_goes_wrong_later_is_caught(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "compare", *SMALL, "--kernel", f"{kernels}:late=gelu_grad") == 1


def test_a_kernel_that_breaks_training_is_reported_all_the_same(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "facts.json"
    assert run(monkeypatch, "compare", *SMALL, "--kernel", f"{kernels}:nan=mul", "--json", str(path)) == 1
    assert "FAIL mul on numba: y" in " ".join(capsys.readouterr().out.split())
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [row["op"] for row in found["ops"] if not row["ok"]] == ["mul"]


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("flat=gelu_grad", "gelu_grad: expected results of shapes [(3, 7)], got [(21,)]"),
        ("softmax=softmax", "no step calls softmax, so it was not tried"),
        ("nan=gelu_grad", "raised TypeError"),
    ],
)
def test_pretraining_refuses_a_kernel_that_cannot_be_tried(
    kernels: Path, tmp_path: Path, kernel: str, expected: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = [
        "--output",
        str(tmp_path / "out"),
        "--config",
        "tiny",
        "--steps",
        "2",
        "--tokenizer",
        str(SHIPPED_VOCABULARY),
    ]
    assert run(monkeypatch, "pretrain", *output, "--kernel", f"{kernels}:{kernel}") == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert expected in err[-1] and err[-1].startswith("error: ")


def test_a_kernel_of_ones_own_that_is_right_passes(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "compare", *SMALL, "--kernel", f"{kernels}:right=gelu_grad") == 0
    assert run(monkeypatch, "check", "gelu_grad", "--backend", "numba", "--kernel", f"{kernels}:right=gelu_grad") == 0


def test_check_catches_it_too(
    kernels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "check", "--backend", "numba", "--kernel", f"{kernels}:off=gelu_grad") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "FAIL gelu_grad on numba in float32 fails follows_formula" in out
    assert "minibert check gelu_grad --backend numba" in out


def test_a_checkpoint_is_compared_with_its_own_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = mb.BertConfig(
        vocab_size=8000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=48,
    )  # fmt: skip
    mb.BertForMaskedLM(config, backend="numpy", seed=5).save_pretrained(tmp_path, [SHIPPED_VOCABULARY])
    arguments = ["compare", "--config", str(tmp_path), "--tokens", "100", "--max-seq-length", "48", "--steps", "2"]
    assert run(monkeypatch, *arguments) == 0
    out = " ".join(capsys.readouterr().out.split())  # lines break where the folder's name lets them
    assert "L1 C32 H2 V8000" in out
    assert "BLAS threads" in out


def test_float64_and_one_backend_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("minibert.lab.measure.quiet.Load.disturbance", lambda *_: {"why": ["a test says so"]})
    assert run(monkeypatch, "compare", *SMALL, "--backends", "numpy", "--dtype", "float64") == 0
    out = capsys.readouterr().out
    assert "float64" in out and "the machine was not quiet: a test says so. Measure again" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["compare", "--config", "huge"],
            "--config: expected tiny, mini, minilm, small, medium, base or a checkpoint's folder",
        ),
        (["compare", "--backends", "numpy,tpu"], "no backend is called 'tpu': choose one of numpy, numba"),
        (["compare", "--backends", "numpy,numpy"], "--backend: expected names such as numpy,numba, each once"),
        (
            ["compare", "--dtype", "int8"],
            "--dtype: backend numpy has arrays of float32, float64, float16, bfloat16: not 'int8'",
        ),
        (["compare", "--text", "nowhere.txt"], "nowhere.txt"),
        (["compare", "--kernel", "softmax"], "--kernel: expected FILE.py:FUNCTION=OP"),
        (["compare", "--kernel", "nowhere.py:f=softmax"], "--kernel: there is no file nowhere.py"),
        (["compare", "--kernel", "nowhere.py:f=softmx"], "did you mean 'softmax'?"),
        (["compare", "--json", "no/such/folder/x.json"], "there is no folder"),
        (["compare", "--max-seq-length", "600"], "the model has 512 positions"),
        (["compare", "--steps", "1"], "--steps"),
        (["check", "sofmax"], "did you mean 'softmax'?"),
        (["ops", "sofmax"], "did you mean 'softmax'?"),
        (["backend"], "No such command"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err.strip()
    assert expected in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_tables_of_backends_and_ops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "backends") == 0
    assert "numba" in capsys.readouterr().out
    assert run(monkeypatch, "ops") == 0
    out = capsys.readouterr().out
    assert all(op in out for op in OPS)
    assert run(monkeypatch, "ops", "softmax") == 0
    assert "xp.exp(x - x.max" in capsys.readouterr().out
