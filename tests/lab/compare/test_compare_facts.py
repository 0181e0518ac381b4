"""What a comparison writes down for a report: limits, histograms, memory, energy, cost; and `compare --report`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from math import ceil, log2
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minibert.backends import Backend
from minibert.backends.cuda.backend import CudaBackend
from minibert.cli import main
from minibert.cli.compare import NEEDED
from minibert.cli.report import markdown, verdict
from minibert.errors import UserError
from minibert.kernels import OPS
from minibert.kernels.array_module import numpy_module
from minibert.lab.compare.compare import compare
from minibert.lab.compare.facts import BROKE_DOWN, NO_METER, PLAYED, facts
from minibert.lab.compare.records import STAGES, TRAINING, Comparison, Extras
from minibert.lab.measure.energy import Counter, Meter, Source
from minibert.lab.measure.peaks import Peaks
from minibert.lab.measure.prices import Prices
from minibert.lab.measure.roofline import CACHE, IMPOSSIBLE
from minibert.lab.measure.roofline import LAUNCH as LAUNCHED
from tests.small_steps import NUMBA, NUMPY, TINY, maker, tiny_batch

pytestmark = pytest.mark.usefixtures("smaller_tiny")
PEAKS = Peaks(gflops=40.0, product="m", fma_gflops=50.0, triad_gbps=8.0, fill_gbps=10.0, cache_bytes=1 << 20)
LAUNCH = 1e-6
BEGAN = datetime.now(UTC).replace(microsecond=0)


class Played(Backend):
    """It plays another machine, on NumPy's arrays."""

    emulated = True


def compared(places: list[Backend], extras: Extras | None, **settings: Any) -> Comparison:
    return compare(lambda backend: maker(TINY)(backend, "float32"), tiny_batch, places, 3, extras=extras, **settings)


def written(found: Comparison, prices: Prices | None = None) -> dict[str, Any]:
    """The facts, as they come back from a file of JSON."""
    return json.loads(json.dumps(facts(found, {"name": "tiny"}, {"cores": 1}, prices), allow_nan=False))


def ticking(*each: float) -> Meter:
    """A counter that goes on by so many joules from one reading to the next, in turn."""

    def read() -> int:
        read.value += round(each[read.calls % len(each)] * 1000)  # type: ignore[attr-defined]
        read.calls += 1  # type: ignore[attr-defined]
        return read.value  # type: ignore[attr-defined,no-any-return]

    read.value = read.calls = 0  # type: ignore[attr-defined]
    return Meter(Source((Counter("played", read, 1e-3),)))


@pytest.fixture(scope="module")
def quick_peaks() -> Iterator[list[str]]:
    """Peaks that take no time to measure; of which dtype they were asked for."""
    asked: list[str] = []

    def peaks(dtype: str) -> Peaks:
        asked.append(dtype)
        return PEAKS

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minibert.lab.measure.peaks.measure_peaks", peaks)
        patch.setattr("minibert.lab.measure.peaks.launch_seconds", lambda backend: LAUNCH)
        yield asked


@pytest.fixture(scope="module")
def found(quick_peaks: list[str]) -> Comparison:
    """Two backends of the CPU and one that plays another machine."""
    return compared([NUMPY, NUMBA, Played("played", numpy_module)], Extras(meter=ticking(2.0)))


@pytest.fixture(scope="module")
def document(found: Comparison) -> dict[str, Any]:
    return written(found, Prices("USD", {"numba": 3.6}, per_kwh=None))


def test_when_and_with_what_it_was_measured(document: dict[str, Any]) -> None:
    assert BEGAN <= datetime.fromisoformat(document["date"]) <= datetime.now(UTC)
    assert document["versions"]["numpy"] == np.__version__ and "minibert" in document["versions"]
    assert document["emulated"] == ["played"]
    assert document["scaling"] is None


def test_the_limit_of_an_op_follows_from_its_work_and_the_peaks(document: dict[str, Any]) -> None:
    limits = set()
    for row in document["ops"]:
        if row["backend"] == "played":
            assert row["predicted_ms"] is row["limit"] is row["limit_share"] is None
            continue
        times = {"arithmetic": row["flops"] / 50e9, "memory": row["bytes"] / 10e9, "launch": row["calls"] * LAUNCH}
        assert row["predicted_ms"] == pytest.approx(max(times.values()) * 1e3)
        assert times[row["limit"]] == max(times.values())
        limits.add(row["limit"])
        if row["note"] == IMPOSSIBLE:
            assert row["limit_share"] is row["gflops"] is row["gbps"] is None, "no figure is made of it"
            continue
        assert row["limit_share"] == pytest.approx(row["predicted_ms"] / row["ms"])
        assert (row["note"] in (CACHE, LAUNCHED)) is (row["limit_share"] > 1)
    assert {"memory", "launch"} <= limits
    assert document["peaks"]["numba"] == {**PEAKS._asdict(), "launch_s": LAUNCH}
    assert document["peaks"]["played"] is None


def test_every_timed_step_is_there(document: dict[str, Any]) -> None:
    for row in [*document["ops"], *document["stages"]]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
    for row in document["ops"]:
        assert row["ms"] == pytest.approx(np.median(row["seconds"]) * 1e3)


def test_the_histogram_is_of_the_judged_calls(document: dict[str, Any], found: Comparison) -> None:
    reference = {row["op"]: sum(row["ulps"].values()) for row in document["ops"] if row["backend"] == "numpy"}
    for row in document["ops"]:
        assert sum(row["ulps"].values()) == reference[row["op"]], "as many elements on each backend"
        powers = [int(name[2:]) for name in row["ulps"] if name.startswith("2^")]
        assert powers == sorted(powers), "in the order of a figure's axis"
        largest = row["ulp_max"]
        assert (max(powers) == min(max(ceil(log2(largest)), -3), 24)) if largest else not powers
    weights = sum(w.size for w in found.runs[0].weights.values())
    # every weight, and its two moments, in one judged call of the first step and one after the last
    assert reference["adamw"] == 3 * weights * 2


def test_memory_is_followed_over_one_training_step(document: dict[str, Any]) -> None:
    calls = {name: sum(r["calls"] for r in document["ops"] if r["backend"] == name) for name in document["loss"]}
    for name, moments in document["memory"].items():
        assert len(moments) == calls[name], "a point at each call's end"
        assert list(dict.fromkeys(stage for _, _, stage, _ in moments)) == list(TRAINING)
        assert all(a[0] <= b[0] for a, b in pairwise(moments))
        kept = {stage: [live for _, live, at, _ in moments if at == stage] for stage in TRAINING}
        assert kept["forward"][-1] > 3 * kept["forward"][0] > 0, "activations gather"
        assert moments[-1][1] < max(kept["forward"]), "and are gone after the step"
        peak = next(r["peak_bytes"] for r in document["stages"] if (r["stage"], r["backend"]) == ("forward", name))
        assert max(kept["forward"]) <= 1.2 * peak
        if name == "numpy":  # in so small a model, what numba's products pack into outweighs all else
            assert 0.3 * peak < max(kept["forward"])


def test_live_memory_falls_as_well_as_it_rises() -> None:
    with NUMPY.live_memory() as live:
        assert live() < 10_000
        kept = np.ones(1_000_000)
        assert 8_000_000 <= live() < 8_100_000
        del kept
        assert live() < 10_000


def test_a_ratio_is_of_steps_that_took_turns_and_has_its_spread(document: dict[str, Any], found: Comparison) -> None:
    seconds = {(r["backend"], r["stage"]): np.array(r["seconds"]) for r in document["stages"]}
    numpy, numba = (sum(seconds[name, stage] for stage in TRAINING) for name in ("numpy", "numba"))
    assert document["speed"] == {
        "numba": dict(zip(("p20", "median", "p80"), np.percentile(numpy / numba, [20, 50, 80]), strict=True)),
        "played": None,
    }
    for row in (*document["stages"], *document["ops"]):
        if row["backend"] == "numba":
            assert row["ratio"]["p20"] <= row["ratio"]["median"] <= row["ratio"]["p80"]
        else:
            assert row["ratio"] is None
    assert set(document["disturbance"]) == {"load", "others", "cores", "why"}
    quiet = replace(found, disturbance={"load": 0.1, "others": 0.02, "cores": 2, "why": []})
    speed = document["speed"]["numba"]
    said = f"numba {speed['median']:.2f}x numpy (p20 {speed['p20']:.2f}, p80 {speed['p80']:.2f}); load 0.10 on 2 cores"
    assert said in verdict(quiet)
    table, *_ = (line for line in markdown(quiet, {"name": "", "summary": ""}, {}).splitlines() if "x numpy |" in line)
    assert "| x numpy | p20 | p80 |" in table
    assert "not quiet" not in markdown(quiet, {"name": "", "summary": ""}, {})
    busy = replace(found, disturbance={"load": 3.0, "others": 1.5, "cores": 2, "why": ["a test says so"]})
    assert "the machine was not quiet: a test says so." in markdown(busy, {"name": "", "summary": ""}, {})


def test_joules_are_means_over_the_timed_steps(document: dict[str, Any]) -> None:
    """The counter went on by two joules between any two readings: one before and one after each stage."""
    joules = {(row["backend"], row["stage"]): row["energy_j"] for row in document["stages"]}
    for name in ("numpy", "numba"):
        assert all(joules[name, stage] == pytest.approx(2.0) for stage in STAGES)
        assert document["energy"]["joules_per_step"][name] == pytest.approx(10.0), "six readings: five times two"
    assert all(joules["played", stage] is None for stage in STAGES)
    assert document["energy"]["joules_per_step"]["played"] is None
    assert document["energy"]["source"] == "played" and document["energy"]["why"] == f"played: {PLAYED}"


def test_cost_follows_from_the_time(document: dict[str, Any], found: Comparison) -> None:
    cost, tokens = document["cost"], len(found.batch.input_ids)
    rows = [row for row in document["stages"] if row["backend"] == "numba"]
    step = sum(np.median(row["seconds"]) for row in rows if row["stage"] in TRAINING)
    assert cost["numba"]["per_million_tokens"] == pytest.approx(step * 1e-3 / tokens * 1e6)
    inference = next(row for row in rows if row["stage"] == "inference")
    assert cost["numba"]["inference_per_million_tokens"] == pytest.approx(inference["ms_per_token"])
    assert cost["numba"]["currency"] == "USD" and "3.6 USD an hour" in cost["numba"]["basis"]
    assert cost["numpy"] == {"unavailable": "the price file has no [per_hour] numpy"}
    assert cost["played"] == {"unavailable": PLAYED}


def test_energy_has_its_price(found: Comparison) -> None:
    cost = written(found, Prices("USD", {}, per_kwh=0.36))["cost"]
    assert cost["numpy"]["per_million_tokens"] == pytest.approx(10 * 1e-7 / len(found.batch.input_ids) * 1e6)
    assert cost["numpy"]["inference_per_million_tokens"] == pytest.approx(2 * 1e-7 / len(found.batch.input_ids) * 1e6)


def test_without_extras_nothing_more_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        pytest.fail("this takes time, and nobody asked for it")

    monkeypatch.setattr("minibert.lab.measure.peaks.measure_peaks", refuse)
    monkeypatch.setattr("minibert.lab.measure.peaks.launch_seconds", refuse)
    monkeypatch.setattr(type(NUMPY), "live_memory", refuse)
    document = written(compared([NUMPY], None))
    assert document["peaks"] == {"numpy": None} and document["memory"] == {}
    assert document["energy"] == {"source": None, "why": NO_METER, "joules_per_step": {"numpy": None}}
    assert document["cost"] == {"numpy": {"unavailable": "no --prices FILE"}}
    assert all(row["predicted_ms"] is row["limit"] is None and row["ms"] > 0 for row in document["ops"])


def test_a_counter_too_coarse_for_a_stage_tells_of_the_step(quick_peaks: list[str]) -> None:
    """Of ten readings a step, two to a stage, only the one after the backward pass has moved."""
    document = written(compared([NUMPY], Extras(meter=ticking(0, 0, 0, 0, 0, 3.0, 0, 0, 0, 0))))
    assert {row["stage"]: row["energy_j"] for row in document["stages"]} == {
        "preprocess": None, "forward": None, "backward": 3.0, "optimiser": None, "inference": None,
    }  # fmt: skip
    assert document["energy"]["joules_per_step"] == {"numpy": 3.0} and document["energy"]["why"] == ""
    once = written(compared([NUMPY], Extras(meter=ticking(*[1.0] * 9, 0, *[0] * 10))))
    assert once["energy"]["joules_per_step"] == {"numpy": None}, "in one step of two it did not move"
    still = written(compared([NUMPY], Extras(meter=ticking(0))), Prices("USD", {}, per_kwh=1.0))
    assert "its steps are coarser" in still["energy"]["why"]
    assert "its steps are coarser" in still["cost"]["numpy"]["unavailable"]


def test_a_wrong_op_that_breaks_training_leaves_facts(quick_peaks: list[str]) -> None:
    def nan(*arrays: Any, **params: Any) -> Any:
        return arrays[0] * arrays[1] * np.float32("nan")

    found = compared([NUMPY, NUMBA], Extras(meter=ticking(1.0)), kernels={OPS["mul"]: nan})
    document = written(found, Prices("USD", {"numba": 1.0}))
    assert not found.timed and not document["ok"] and document["stages"] == [] and document["memory"] == {}
    wrong = next(row for row in document["ops"] if (row["op"], row["backend"]) == ("mul", "numba"))
    assert wrong["ulps"]["not finite"] > 0 and wrong["ms"] is None and wrong["seconds"] == []
    assert document["energy"]["why"] == BROKE_DOWN
    assert document["cost"]["numba"] == {"unavailable": BROKE_DOWN}


def test_live_memory_of_a_device_is_that_of_its_pool() -> None:
    device = SimpleNamespace(pool=SimpleNamespace(used=1000))
    with CudaBackend.live_memory(device) as live:  # type: ignore[arg-type]
        device.pool.used = 5000
        assert live() == 4000
        device.pool.used = 1000
        assert live() == 0


# -------------------------------------------------------------------------------------------------- compare --report

SMALL = ["--config", "tiny", "--tokens", "100", "--max-seq-length", "32", "--steps", "2"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["minibert", "compare", *SMALL, *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture
def laboratory(monkeypatch: pytest.MonkeyPatch, quick_peaks: list[str]) -> SimpleNamespace:
    """The page and the crossovers, played: what they were called with."""
    seen = SimpleNamespace(measured=[], pages=[], kernels=[], refuses="", dtypes=quick_peaks)
    quick_peaks.clear()

    def measure(
        places: list[Backend], axes: Mapping[str, Any], base: Any, rounds: int, progress: Callable[[str], None]
    ) -> dict[str, Any]:
        progress("batch")
        seen.measured.append(([place.name for place in places], base.threads))
        seen.kernels = [place.kernel(OPS["gelu_grad"]) for place in places]
        if seen.refuses:
            raise UserError(seen.refuses)
        return {"what": "work", "axes": {}}

    def write_page(folder: Path, document: Mapping[str, Any], others: list[Any]) -> Path:
        (folder / "index.html").write_text("a page")
        seen.pages.append((folder, document, others))
        return folder / "index.html"

    def read_recorded(path: Path) -> str:
        if not path.is_file():
            raise UserError(f"--with: there is no file {path}")
        return path.name

    monkeypatch.setattr("minibert.lab.measure.scaling.measure", measure)
    page = SimpleNamespace(write_page=write_page, read_recorded=read_recorded)
    monkeypatch.setitem(sys.modules, "minibert.page", page)
    monkeypatch.setattr("minibert.cli.compare.NEEDED", ("json",))
    return seen


def test_a_report_is_a_folder_with_a_page_and_its_facts(
    laboratory: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, older = tmp_path / "a" / "b", tmp_path / "older.json"
    older.write_text("{}")
    (tmp_path / "prices.toml").write_text('currency = "USD"\n[per_hour]\nnumba = 1\n')
    more = ["--with", str(older), "--with", str(older), "--prices", str(tmp_path / "prices.toml")]
    threads = NUMBA.num_threads()
    assert run(monkeypatch, "--backends", "numpy,numba", "--report", str(folder), *more) == 0
    ((where, document, others),) = laboratory.pages
    assert where == folder and others == ["older.json", "older.json"]
    assert json.loads((folder / "facts.json").read_text()) == json.loads(json.dumps(document))
    assert (
        document["scaling"] == {"what": "work, in float32", "axes": {}}
        and document["cost"]["numba"]["currency"] == "USD"
    )
    assert laboratory.measured == [(["numpy", "numba"], threads)] and laboratory.dtypes == ["float32"] * 2
    last = capsys.readouterr().out.splitlines()[-1]
    pattern = r" \(peaks [\d.]+ s, memory over time [\d.]+ s, crossovers [\d.]+ s, page [\d.]+ s\)"
    assert re.fullmatch(re.escape(f"report: {folder / 'index.html'}") + pattern, last)


@pytest.mark.parametrize("place", ["numpy", "numba"])
def test_one_backend_and_float64_have_reports_too(
    laboratory: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    assert run(monkeypatch, "--backends", place, "--dtype", "float64", "--report", str(tmp_path)) == 0
    assert laboratory.dtypes == ["float64"] * 2, "peaks are those of the arrays' dtype, before and after"
    ((_, document, _),) = laboratory.pages
    assert document["peaks"][place] and all(row["limit"] for row in document["ops"])


def test_a_wrong_op_has_a_report_and_no_crossovers(
    laboratory: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def nan(a, b):\n    return a * b * a.dtype.type('nan')\n")
    kernel = ["--kernel", f"{tmp_path / 'mine.py'}:nan=mul"]
    assert run(monkeypatch, "--backends", "numpy,numba", "--report", str(tmp_path / "report"), *kernel) == 1
    ((_, document, _),) = laboratory.pages
    assert document["ok"] is False and document["scaling"] is None and laboratory.measured == []


RIGHT = """
def right(g, x, approximate="none"):
    from minibert.kernels.activation import gelu_grad
    from minibert.kernels.array_module import numpy_module
    return gelu_grad.formula(numpy_module, g, x, approximate=approximate)
"""


def test_crossovers_are_those_of_a_kernel_of_ones_own(
    laboratory: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(RIGHT)
    laboratory.refuses = "it does not take 64 rows"
    kernel = ["--kernel", f"{tmp_path / 'mine.py'}:right=gelu_grad"]
    assert run(monkeypatch, "--backends", "numpy,numba", "--report", str(tmp_path / "report"), *kernel) == 0
    reference, tried = laboratory.kernels
    assert reference is None and tried.spec.endswith("right=gelu_grad")
    ((_, document, _),) = laboratory.pages
    assert document["scaling"] is None and "no crossovers: it does not take 64 rows" in capsys.readouterr().err


def test_json_alone_needs_no_page_and_measures_no_crossovers(
    laboratory: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minibert.cli.compare.NEEDED", ("no_such_library",))
    assert run(monkeypatch, "--backends", "numpy", "--json", str(tmp_path / "facts.json")) == 0
    assert json.loads((tmp_path / "facts.json").read_text())["peaks"]["numpy"]["gflops"] == PEAKS.gflops
    assert laboratory.measured == laboratory.pages == [] and "report:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--report", "FOLDER/file"], "file is a file: name a folder"),
        (["--report", "FOLDER/file/inside"], "inside cannot be made: Not a directory"),
        (["--report", "FOLDER/taken"], "index.html is a folder: name a file"),
        (["--report", "FOLDER/new", "--with", "FOLDER/nowhere"], "there is no file"),
        (["--report", "FOLDER/new", "--prices", "FOLDER/nowhere"], "--prices: there is no file"),
        (["--with", "FOLDER/file"], "--with: puts a result on a page: name the page's folder by --report"),
        (["--prices", "FOLDER/file"], "--prices: costs are shown by --report DIR and --json FILE"),
        (["--report", "FOLDER/new", "--backends", "numpy,tpu"], "no backend is called 'tpu'"),
    ],
)
def test_mistakes_are_refused_before_the_work(
    laboratory: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], expected: str,
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "index.html").mkdir(parents=True)
    monkeypatch.setattr("minibert.cli.compare.compare", lambda *_, **__: pytest.fail("the work has begun"))
    assert run(monkeypatch, *(word.replace("FOLDER", str(tmp_path)) for word in arguments)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and expected in line
    assert not (tmp_path / "new").exists(), "a mistake leaves no folder behind"


def test_a_page_without_its_libraries_says_what_to_install(
    laboratory: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minibert.cli.compare.NEEDED", ("json", "no_such_library"))
    assert run(monkeypatch, "--report", str(tmp_path / "new")) == 2
    assert "--report needs no_such_library: pip install 'minibert-lab[report]'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--backends", "numpy,numba"], 0),
        (["--backends", "numpy", "--dtype", "float64"], 0),
        (["--backends", "numpy,numba", "--kernel", "FOLDER/mine.py:nan=mul"], 1),
    ],
)
def test_the_page_is_made_of_what_was_found(
    quick_peaks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int
) -> None:
    """The page itself, with two sizes of one axis: a step of training that broke down has one too."""
    for library in NEEDED:
        pytest.importorskip(library)
    monkeypatch.setattr("minibert.lab.measure.scaling.QUICK_AXES", {"hidden": (64, 128)})
    (tmp_path / "mine.py").write_text("def nan(a, b):\n    return a * b * a.dtype.type('nan')\n")
    words = [word.replace("FOLDER", str(tmp_path)) for word in arguments]
    assert run(monkeypatch, *words, "--report", str(tmp_path / "report")) == status
    page = (tmp_path / "report" / "index.html").read_text()
    document = json.loads((tmp_path / "report" / "facts.json").read_text())
    assert "<svg" in page and all(row["op"] in page for row in document["ops"])
    assert (document["scaling"] is not None) == (status == 0)
    if status == 0:
        assert list(document["scaling"]["axes"]["hidden"]["backends"]) == list(document["loss"])
