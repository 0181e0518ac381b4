"""`bench.compare`: what is a change and what is noise, which files it takes, and what it refuses."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import compare
from bench.timing import figures, harness
from minibert.errors import UserError

ABOUT = {
    "machine": {"processor": "one", "cores": 2, "load": 0.1}, "versions": {"minibert": "1", "numpy": "2.4"},
    "threads": 2, "backends": {"numba": "Numba 1 (2 threads)"}, "date": "2026-01-02T03:04:05Z",
}  # fmt: skip


def spread(median: float, width: float = 0.01) -> dict[str, float]:
    return {"median": median, "p20": median * (1 - width), "p80": median * (1 + width)}


def ops_document(seconds: float = 1.0, width: float = 0.01, **changed: Any) -> dict[str, Any]:
    row = {"op": "softmax_grad", "backend": "numba", "note": "", "ok": True, "peak_bytes": None}
    settings = {"size": {"batch": 8}, "length": 128, "dtype": "float32", "rounds": 21}
    return {
        "bench": "ops",
        **ABOUT,
        "settings": settings,
        "ops": [{**row, "seconds": spread(seconds, width)}],
        **changed,
    }


def step_document(seconds: float = 1.0, memory: int | None = 10**6, **changed: Any) -> dict[str, Any]:
    facts = {
        "refused": "", "impossible": ["torch"], "seconds": {"numba": spread(seconds), "torch": spread(1e-9)},
        "peak_bytes": {"numba": memory, "torch": None},
    }  # fmt: skip
    refused = {"refused": "they do not do the same work"}
    measures = {"packed": facts, "same_work": refused}
    return {"bench": "step", **ABOUT, "settings": {"length": 128}, "measures": measures, **changed}


def scaling_document(seconds: float = 1.0) -> dict[str, Any]:
    numba = {"seconds": [seconds, 2.0], "p20": [seconds, 2.0], "p80": [seconds, 2.0], "impossible": []}
    axes = {"batch": {"sizes": [1, 2], "unit": "sequences", "backends": {"numba": numba}, "crossovers": []}}
    return {**ABOUT, "scaling": {"what": "a step", "work": "step", "model": {}, "base": {"batch": 8}, "axes": axes}}


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, old: Any, new: Any, *words: str) -> int:
    """The command on two documents; its exit status."""
    paths = [folder / "old.json", folder / "new.json"]
    for path, document in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(document))
    monkeypatch.setattr(sys, "argv", ["bench.compare", *map(str, paths), *words])
    with pytest.raises(SystemExit) as exit_:
        harness.run_main(compare.bench)
    return int(exit_.value.code or 0)


# ----------------------------------------------------------------------------------------------------------- the noise


def test_rounds_of_one_machine_agree_and_a_change_beyond_them_is_found() -> None:
    """Two runs whose rounds are drawn alike differ by less than their noise; 1.5 times as long is more."""
    rng = np.random.default_rng(0)

    def figure(scale: float) -> figures.Figure:
        p20, median, p80 = np.percentile(scale * rng.normal(1.0, 0.05, 21), [20, 50, 80])
        return figures.Figure("softmax", "numba", "forward", "speed", "ms", "T", "", 1, median, p20, p80)

    same = [compare.Change(figure(1.0), figure(1.0)).verdict for _ in range(200)]
    slower = [compare.Change(figure(1.0), figure(1.5)).verdict for _ in range(200)]
    assert same.count("within noise") >= 199
    assert slower.count("slower") >= 195


@pytest.mark.parametrize(
    ("new", "width", "verdict"),
    [
        (1.09, 0.02, "within noise"),  # 3 sqrt(2) 0.02 / 0.84 = 10 %
        (1.11, 0.02, "slower"),
        (0.89, 0.02, "faster"),
        (1.11, 0.03, "within noise"),
        (1.06, 0.0, "slower"),
        (1.04, 0.0, "within noise"),  # what placement in memory does is in no run's own spread
    ],
)
def test_a_change_beyond_three_standard_deviations_is_one(new: float, width: float, verdict: str) -> None:
    (found,), lacking = compare.changes(ops_document(1.0, width), ops_document(new, width))
    assert found.verdict == verdict and not lacking
    assert found.change == pytest.approx(new - 1)


def test_the_farther_of_the_two_percentiles_counts() -> None:
    figure = figures.Figure("a", "b", "full", "speed", "ms", "T", "", 1, median=1.0, p20=0.99, p80=1.2)
    assert compare.deviation(figure) == pytest.approx(0.2 / compare.OF_A_ROUND)


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("make", [ops_document, step_document, scaling_document])
def test_every_bench_is_compared(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, make(1.0), make(2.0)) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].startswith("the same machine") and "+100.0%" in said and "1 slower" in said
    assert "torch" not in said and "same_work" not in said, "impossible, and refused"


@pytest.mark.parametrize(
    ("new", "words", "status"),
    [
        (1.2, [], 0),
        (1.2, ["--fail-slower", "10"], 1),
        (1.2, ["--fail-slower", "30"], 0),
        (1.04, ["--fail-slower", "1"], 0),  # within the noise
        (0.5, ["--fail-slower", "0"], 0),
    ],
)
def test_it_fails_only_where_asked_to_and_beyond_the_noise(
    new: float, words: list[str], status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(monkeypatch, tmp_path, ops_document(1.0), ops_document(new), *words) == status


def test_another_machine_is_said_first_and_its_load_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy.deepcopy(ops_document())
    other["machine"] |= {"processor": "two", "load": 3.0}
    other["versions"]["numpy"] = "2.5"
    assert run(monkeypatch, tmp_path, ops_document(), other) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "DIFFERENT MACHINES OR VERSIONS: processor one -> two; numpy 2.4 -> 2.5"


def test_memory_is_compared_and_what_one_file_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, step_document(memory=10**6), step_document(memory=2 * 10**6)) == 0
    assert "more" in capsys.readouterr().out
    assert run(monkeypatch, tmp_path, step_document(memory=None), step_document()) == 0
    assert "only in NEW: step_packed numba full memory" in capsys.readouterr().out


def test_more_rounds_are_the_same_setting() -> None:
    other = ops_document()
    other["settings"] = {**other["settings"], "rounds": 5}
    compare.refuse_other_settings(ops_document(), other)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (ops_document(settings={"size": {"batch": 4}, "length": 128, "dtype": "float32"}), "size.batch is 8 in OLD, 4"),
        (ops_document(threads=1), "threads is 2 in OLD, 1 in NEW"),
        (step_document(), "got bench.ops and bench.step"),
        ({"ops": []}, "new.json: expected what bench.ops --json"),
        ([1], "expected what bench.ops"),
        ({"bench": "ops"}, "lacks something (KeyError('settings')"),
    ],
)
def test_a_mistake_is_one_line(
    new: Any, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, ops_document(), new) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("content", [None, "no json"])
def test_a_file_that_cannot_be_read_is_one_line(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"found\.json") as error:
        compare.read(path)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------- long CSV


@pytest.mark.parametrize(
    ("document", "name", "mode", "x"),
    [
        (ops_document(), "softmax", "backward", ("T", "128")),
        (step_document(), "step_packed", "full", ("T", "128")),
        (scaling_document(), "scaling_batch", "full", ("batch", "1")),
    ],
)
def test_rows_are_in_liger_kernels_columns(document: Any, name: str, mode: str, x: tuple[str, str]) -> None:
    first = dict(zip(figures.COLUMNS, figures.rows(document)[0], strict=True))
    assert (first["kernel_name"], first["kernel_operation_mode"], first["kernel_provider"]) == (name, mode, "numba")
    assert (first["x_name"], first["x_value"]) == x
    assert float(first["y_value_50"]) == 1000 and first["metric_unit"] == "ms"
    assert first["gpu_name"] == "one" and first["timestamp"] == "2026-01-02 03:04:05"
    assert json.loads(first["extra_benchmark_config_str"])


def test_a_file_with_other_columns_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="other columns"):
        figures.add_to_csv(path, ops_document())
    assert path.read_text() == "a,b\n1,2\n"
