"""`bench.ops` and the pytest-benchmark entry points at small sizes: what they count, judge, refuse and write."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import ops
from bench.peers import torch_formula
from bench.timing import figures, harness, op_timing
from minibert import backends
from minibert.kernels import OPS
from minibert.kernels.op import BertSize
from minibert.lab.measure.peaks import Peaks

ROOT = Path(__file__).resolve().parents[2]
SIZE = BertSize(2, 16, 32, 4, 64, 100, 5)
PEAKS = Peaks(gflops=1.0, product="1 x 1 x 1", fma_gflops=2.0, triad_gbps=4.0, fill_gbps=8.0, cache_bytes=0)
SMALL = ["--batch", "2", "--length", "16", "--hidden", "32", "--heads", "4", "--intermediate", "64",
         "--vocabulary", "100", "--predicted", "5", "--rounds", "3", "--threads", "1"]  # fmt: skip


def silent(text: str) -> None:
    """Progress that nobody reads."""


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command as the shell runs it; its exit status."""
    monkeypatch.setattr(sys, "argv", ["bench.ops", *words])
    with pytest.raises(SystemExit) as exit_:
        harness.run_main(ops.bench)
    return int(exit_.value.code or 0)


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that no machine reaches, and a launch that costs nothing: measuring them takes seconds."""
    beyond = PEAKS._replace(fma_gflops=1e9, triad_gbps=1e9)
    monkeypatch.setattr("minibert.lab.measure.peaks.measure_peaks", lambda dtype="float32": beyond)


def timing(ms: float = 1.0, **given: Any) -> op_timing.Timing:
    seconds = {"median": ms * 1e-3, "p20": ms * 0.9e-3, "p80": ms * 1.1e-3, "all": [ms * 1e-3] * 3}
    facts = {"flops": 10**6, "bytes": 10**6, "memory": 10**6, **given}
    return op_timing.Timing("softmax", "numba", "kernel", seconds, 3, **facts)


# ---------------------------------------------------------------------------------------------------------- the limits


@pytest.mark.parametrize(
    ("work", "launch", "limit", "predicted"),
    [
        ({"flops": 10**6, "bytes": 1000}, 0.0, "arithmetic", 0.5),
        ({"flops": 1000, "bytes": 10**6}, 0.0, "memory", 0.125),
        ({"flops": 1000, "bytes": 1000}, 3e-4, "launch", 0.3),
    ],
)
def test_the_roofline_says_what_limits_and_how_long(
    work: dict[str, int], launch: float, limit: str, predicted: float
) -> None:
    found = timing(1.0, **work).against(PEAKS, launch)
    assert found.limit == limit and found.predicted_ms == pytest.approx(predicted)
    assert found.limit_share == pytest.approx(predicted) and not found.note
    assert found.gflops == pytest.approx(work["flops"] * 1e-6)


@pytest.mark.parametrize(
    ("ms", "cache", "note"),
    [
        (0.51, 0, ""),
        (0.49, 0, "impossible"),  # 2 GFLOP/s and no more
        (0.49, 10**9, "impossible"),  # which no cache excuses
    ],
)
def test_arithmetic_above_the_rate_in_registers_is_impossible(ms: float, cache: int, note: str) -> None:
    found = timing(ms, flops=10**6, bytes=1).against(PEAKS._replace(cache_bytes=cache), 0.0)
    assert found.note == note
    assert (found.gflops is None and found.limit_share is None and found.ratio is None) is (note == "impossible")


@pytest.mark.parametrize(
    ("ms", "cache", "note"),
    [
        (0.126, 0, ""),
        (0.124, 0, "impossible"),  # a megabyte at 8 GB/s takes 0.125 ms
        (0.124, 10**6, "cache"),  # unless all of it was there,
        (0.064, 5 * 10**5, "cache"),  # or half of it,
        (0.062, 5 * 10**5, "impossible"),  # whose other half takes half as long
    ],
)
def test_bandwidth_is_impossible_where_the_cache_does_not_explain_it(ms: float, cache: int, note: str) -> None:
    found = timing(ms, flops=1, bytes=10**6).against(PEAKS._replace(cache_bytes=cache), 0.0)
    assert found.note == note
    assert (found.gbps is None) is (note == "impossible")


def test_an_impossible_time_is_shown_and_written_as_no_figure() -> None:
    found = timing(0.4).against(PEAKS, 0.0)
    cells = ops.row(found)
    assert cells[3:6] == ["-", "-", "-"] and cells[-1] == "[red]impossible[/red]"
    row = {**vars(found), "ms": found.ms}
    document = {"bench": "ops", "settings": {"length": 8}, "threads": 1, "ops": [row]}
    assert figures.figures(document) == []
    assert len(figures.figures({**document, "ops": [{**row, "note": ""}]})) == 1


def test_where_no_peaks_were_measured_nothing_is_predicted() -> None:
    found = timing().against(None, 0.0)
    assert found.predicted_ms is None and found.limit is None and found.gflops == pytest.approx(1.0)


# ----------------------------------------------------------------------------------------------------------- the timing


def test_inputs_are_the_same_for_all_and_new_in_each_round() -> None:
    inputs = op_timing.Inputs(OPS["linear"].bench(np.random.default_rng(0), SIZE), "float32")
    places = [backends.get("numpy"), backends.get("numba")]
    first, second = (inputs.on(place) for place in places)
    before = [*first]
    assert all(np.may_share_memory(a, b) for a, b in zip(first, second, strict=True))
    first[0][...] = 0  # as an op that writes in place does
    inputs.renew()
    for a, b, old, host in zip(first, second, before, inputs.host, strict=True):
        assert np.may_share_memory(a, b) and not np.may_share_memory(a, old)
        assert (a == host).all() and a.ctypes.data % op_timing.CACHE_LINE == 0


def test_columns_before_rows_stay_so() -> None:
    array = np.arange(6.0).reshape(2, 3).T
    assert op_timing.aligned(array).strides == array.strides


@pytest.mark.parametrize("broken", ["before", "after"])
def test_a_wrong_result_is_found_before_the_timing_and_after_it(broken: str) -> None:
    """A kernel that is right on one of the two inputs only: it knows them by their first element."""
    op, place = OPS["tanh"], backends.get("numpy")
    ((seen,), _), ((unseen,), _) = (op.bench(np.random.default_rng(seed), SIZE) for seed in (0, 1))
    wrong_on = np.float32((seen if broken == "before" else unseen).flat[0])
    with place.using({op: lambda x: np.tanh(x) * np.float32(1.01 if x.flat[0] == wrong_on else 1)}):
        rows, problems, _ = op_timing.timings(op, [place], [], SIZE, "float32", 3, silent)
    assert not rows[0].ok and rows[0].bound_share > 1
    assert len(problems) == 1 and problems[0].startswith("tanh on numpy: y[")


def test_what_is_written_in_place_is_judged_on_inputs_that_nothing_wrote() -> None:
    places = [backends.get("numpy"), backends.get("numba")]
    rows, problems, _ = op_timing.timings(OPS["adamw"], places, [], SIZE, "float32", 3, silent)
    assert not problems and all(row.ok and row.seconds["median"] > 0 for row in rows)
    pairs = sorted(a / b for a, b in zip(rows[0].seconds["all"], rows[1].seconds["all"], strict=True))
    assert rows[0].ratio == 1 and rows[1].ratio == pytest.approx(pairs[1])
    assert rows[1].ratio_p20_p80 is not None and pairs[0] <= rows[1].ratio_p20_p80[0] <= rows[1].ratio


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_every_figure_as_json_and_long_csv(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], peaks: None
) -> None:
    json_file, csv_file = tmp_path / "found.json", tmp_path / "found.csv"
    words = ["softmax", "softmax_grad", "--backends", "numpy,numba", *SMALL]
    for _ in range(2):
        assert run(monkeypatch, *words, "--json", str(json_file), "--csv", str(csv_file)) == 0
    said = capsys.readouterr().out
    assert "predicted" in said and "softmax_grad" in said
    found = json.loads(json_file.read_text())
    assert found["ok"] and found["machine"]["cores"] and found["threads"] == 1 and found["launch_s"]["numba"] > 0
    for row in found["ops"]:
        assert row["seconds"]["p20"] <= row["seconds"]["median"] <= row["seconds"]["p80"]
        assert row["limit"] in ("arithmetic", "memory", "launch") and row["predicted_ms"] > 0
        assert row["limit_share"] == pytest.approx(row["predicted_ms"] / row["ms"])
    lines = list(csv.DictReader(csv_file.read_text().splitlines()))
    assert tuple(lines[0]) == figures.COLUMNS
    speed = [line for line in lines if line["metric_name"] == "speed"]
    assert len(speed) == 8 and len(lines) == 16, "two ops, two backends, two runs that add up; speed and memory"
    assert {line["kernel_name"] for line in lines} == {"softmax"}
    assert {line["kernel_operation_mode"] for line in lines} == {"forward", "backward"}
    assert float(speed[-1]["y_value_50"]) == pytest.approx(found["ops"][-1]["ms"])
    assert json.loads(speed[0]["extra_benchmark_config_str"])["size"]["hidden"] == 32
    assert speed[0]["x_name"] == "T" and float(speed[0]["x_value"]) == 16 and speed[0]["liger_version"]


def test_an_impossible_figure_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = PEAKS._replace(gflops=1e-6, fma_gflops=1e-6)
    monkeypatch.setattr("minibert.lab.measure.peaks.measure_peaks", lambda dtype="float32": slow)
    assert run(monkeypatch, "softmax", "--backends", "numpy", *SMALL) == 1
    assert "impossible" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sofmax"], "softmax"),
        (["--dtype", "float16"], "--dtype: expected float32 or float64"),
        (["--hidden", "100", "--heads", "3"], "--hidden"),
        (["--vs", "jax"], "--vs: expected torch"),
        (["--json", "nowhere/found.json"], "nowhere"),
        (["--csv", "pyproject.toml"], "other columns"),
        (["--rounds", "1"], "--rounds"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_without_torch_a_comparison_with_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch_formula, "missing", lambda: "torch is not installed")
    assert run(monkeypatch, "softmax", "--backends", "numpy", "--vs", "torch", *SMALL) == 2
    error = capsys.readouterr().err
    assert "pip install torch" in error and error.count("\n") == 1


@pytest.mark.parity
def test_torch_takes_the_formula_of_every_op_that_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SETTLE", 0.0)
    torch, refused = torch_formula.TorchFormula(1), []
    for op in OPS.values():
        rows, problems, skipped = op_timing.timings(op, [backends.get("numpy")], [torch], SIZE, "float32", 3, silent)
        assert not problems
        assert [row.backend for row in rows] == (["numpy"] if skipped else ["numpy", "torch"])
        refused += [op] if skipped else []
    drawing = [op.bench(np.random.default_rng(0), SIZE).params for op in refused]
    assert all("stream" in params and params.get("rate", 1) for params in drawing), refused
    assert len(refused) < len(OPS) / 4


# ----------------------------------------------------------------------------------------------------- pytest-benchmark


@pytest.mark.skipif(importlib.util.find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed")
def test_pytest_benchmark_times_an_op_and_says_how_near_the_limit_it_is(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    words = ["bench/op_benchmarks.py", "--benchmark-only", f"--benchmark-json={path}", "--benchmark-max-time=0.05"]
    done = pytest_in_a_child(*words, "-k", "[tanh-numba or [clip_scale-numpy or [adamw-numba")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {one["group"]: one for one in json.loads(path.read_text())["benchmarks"]}
    assert set(found) == {"tanh", "clip_scale", "adamw"}
    for one in found.values():
        about = one["extra_info"]
        assert about["flops"] > 0 and about["bytes"] > 0 and about["limit"] in ("arithmetic", "memory", "launch")
        assert (about["limit_share"] is None) is (about["note"] == "impossible")
    assert found["adamw"]["stats"]["iterations"] == 1, "fresh inputs before each round"


def test_without_pytest_benchmark_the_benchmarks_are_skipped_with_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "pytest_benchmark.py").write_text("raise ImportError('as if it were not installed')\n")
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = pytest_in_a_child("bench/op_benchmarks.py", **path)
    assert "pip install 'minibert-lab[bench]'" in done.stdout and "1 skipped" in done.stdout, done.stdout + done.stderr


def pytest_in_a_child(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", *words, "-p", "no:cacheprovider"]
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    env = {**outer, "MINIBERT_NUM_THREADS": "1", **environment}  # under xdist pytest-benchmark times nothing
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_pytest_benchmark_times_no_op_that_is_wrong_at_its_shape() -> None:
    pytest.importorskip("pytest_benchmark")
    from bench.op_benchmarks import test_op

    def wrong(x: np.ndarray, *, factor: float) -> np.ndarray:
        y = x * x.dtype.type(factor)
        y[1000:] = 0
        return y

    with (
        backends.get("numpy").using({OPS["scale"]: wrong}),
        pytest.raises(AssertionError, match=r"y\[1000, 0\]"),
    ):
        test_op(OPS["scale"], "numpy", None)
