"""What other runs recorded, on the report page: with machine, day and load; what is none of ours is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.gpu_check.report import Outcome, Report
from minibert.errors import UserError, pip_install
from minibert.model.checkpoint import write_arrays
from minibert.page import read_recorded
from tests.page_facts import TIME, Page, minibert, small_facts, written

pytest.importorskip("matplotlib", reason=f"the page is drawn with matplotlib: {pip_install('[report]')}")
pytest.importorskip("jinja2", reason=f"the page is laid out with jinja2: {pip_install('[report]')}")


def test_a_recorded_comparison_is_labelled(tmp_path: Path) -> None:
    facts = small_facts(ulps=False)
    facts["machine"] = {"processor": "Another CPU", "cores": 64}
    facts["date"] = "2026-01-02T03:04:05+00:00"
    (tmp_path / "theirs.json").write_text(json.dumps(facts))
    recorded = read_recorded(tmp_path / "theirs.json")
    assert (recorded.name, recorded.kind) == ("theirs.json", "compare")
    said = Page(written(tmp_path, small_facts(ulps=False), recorded)).said["recorded"]
    assert "Another CPU, 64 cores" in said
    assert "2026-01-02 03:04 UTC" in said
    assert "theirs.json" in said
    assert "The same work as on this page" in said


def test_a_trace_is_read(tmp_path: Path) -> None:
    trace = tmp_path / "numpy.safetensors"
    assert minibert("diff", "numpy", "--tokens", "40", "--max-seq-length", "16", "--record", str(trace)) == 0
    recorded = read_recorded(trace)
    assert recorded.kind == "trace"
    said = Page(written(tmp_path, small_facts(figures=False), recorded)).said["recorded"]
    calls = len(recorded.facts["calls"])
    assert f"{calls} calls of ops" in said
    assert str(recorded.facts["facts"]["machine"]["processor"]) in said


def gpu_check(emulated: bool) -> dict[str, Any]:
    """A document as `make gpu-check` writes it, of a device that does not exist."""
    report = Report(
        "emulator", "Synthetic GPU", "2026-03-04T05:06:07+00:00", "abc1234", "make gpu-check", 500.0, emulated
    )
    host = {"host": {"processor": "Synthetic CPU", "cores": 3}, "backend": "a synthetic driver"}
    share = {"checks": 102, "inputs": 501, "failed": 0, "largest_bound_share": 0.5, "of": "add", "bound_share": {}}
    row = {"op": "gelu", "mode": "float32", "size": "B 8, T 128", "ms": 0.0432, "share": 0.87, "bound_by": "bytes"}
    step = {"ms": 12.3, "tokens_per_s": 81234.0, "mfu": 0.41, "peak_memory": 1e9}
    group = {"batch": 8, "length": 128, "mode": "bfloat16", "results": {"ours, graph": step}}
    figures: dict[str, dict[str, Any]] = {
        "machine": host, "conformance": {"dtypes": {"float32": share}}, "kernels": {"rows": [row]},
        "steps": {"groups": [group]},
    }  # fmt: skip
    report.parts = [Outcome(name, f"the part {name}", True, "ok", figures=f) for name, f in figures.items()]
    report.ok = True
    document: dict[str, Any] = json.loads(json.dumps(report.document()))
    return document


@pytest.mark.parametrize("emulated", [True, False])
def test_a_gpu_check_shows_times_of_a_gpu_alone(emulated: bool, tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(gpu_check(emulated)))
    recorded = read_recorded(tmp_path / "gpu.json")
    assert recorded.kind == "gpu-check"
    said = Page(written(tmp_path, small_facts(figures=False), recorded)).said["recorded"]
    assert "Synthetic GPU on Synthetic CPU, 3 cores" in said and "2026-03-04 05:06 UTC" in said
    assert "the part conformance" in said and "50.0%" in said
    assert ("plays another machine: no times" in said) is emulated
    for time in ("12.3 ms", "81,234", "41.0%", "43.2 µs", "87.0%"):
        assert (time in said) is not emulated
    assert bool(TIME.search(said)) is not emulated


SIDES = {
    "numba": {"median": 0.002, "p20": 0.0019, "p80": 0.0021, "all": [0.002, 0.0019, 0.0021]},
    "torch": {"median": 0.004, "p20": 0.004, "p80": 0.005, "all": [0.004, 0.0038, 0.0063]},
    "onnxruntime": {"median": 0.003, "p20": 0.003, "p80": 0.003},
}
MEASURE = {"what": "packed: real text", "refused": "", "impossible": [], "seconds": SIDES, "peak_bytes": {"numba": 5e6}}
ABOUT = {
    "machine": {"processor": "Synthetic CPU", "cores": 3, "load": 2.25}, "date": "2026-02-03T04:05:06Z", "ok": True,
    "peaks": {},
}  # fmt: skip
BENCHES: dict[str, dict[str, Any]] = {
    "bench.step": {**ABOUT, "settings": {"config": "tiny"}, "measures": {"packed": MEASURE}},
    "bench.infer": {**ABOUT, "settings": {"config": "tiny", "logits": False}, "measures": {"packed": MEASURE}},
    "bench.ops": {**ABOUT, "settings": {"batch": 8}, "ops": [{"op": "gelu", "backend": "numba", "ms": 2.0}]},
    "bench.scaling": {
        **ABOUT,
        "scaling": {
            "what": "synthetic",
            "axes": {
                "batch": {
                    "sizes": [1, 2, 4], "unit": "sequences",
                    "backends": {"numba": {"seconds": [2e-3, None, 3e-3], "p20": [2e-3] * 3, "p80": [3e-3] * 3}},
                    "crossovers": [],
                }
            },
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", BENCHES)
def test_documents_of_the_benches_are_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(BENCHES[kind]))
    recorded = read_recorded(tmp_path / "bench.json")
    assert recorded.kind == kind
    page = written(tmp_path, small_facts(figures=False), recorded)
    said = Page(page).said["recorded"]
    assert "Synthetic CPU, 3 cores" in said and "2026-02-03 04:05 UTC" in said
    assert "Measured at load 2.25 on 3 cores." in said
    if "measures" in BENCHES[kind]:
        ratios = re.findall(r"\d ms\s+(\S+(?: \([\d.]+ to [\d.]+\))?)", said)
        assert ratios == ["–", "2.00× (2.00 to 2.60)", "–"], "none without the times of each turn"
    assert ('id="figure-r0-scaling-0"' if kind == "bench.scaling" else "2.00 ms") in page


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "{", "cannot be read"),
        ("a.json", "[1, 2]", "got another"),
        ("a.json", '{"ops": []}', "got another"),
        ("a.safetensors", "nothing", "a.safetensors"),
        ("gone.json", None, "there is no such file"),
    ],
)
def test_another_file_is_refused_in_one_line(name: str, content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said) as error:
        read_recorded(tmp_path / name)
    assert "\n" not in str(error.value)


def test_weights_are_no_trace(tmp_path: Path) -> None:
    write_arrays(tmp_path / "model.safetensors", {"w": np.zeros(3, np.float32)}, {})
    with pytest.raises(UserError, match="another safetensors file"):
        read_recorded(tmp_path / "model.safetensors")
