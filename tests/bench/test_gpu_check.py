"""`bench.gpu_check` without a GPU: the whole way on the emulator, parts that go wrong, time that runs out, one line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.gpu_check import run as gpu_check
from bench.gpu_check.part import Settings
from bench.gpu_check.report import EMULATED, Outcome, Report, file_name, passed, problems, write_json
from bench.gpu_check.run import Part
from minibert import backends
from minibert.backends import BackendUnavailable
from minibert.backends.cuda import cupy_driver
from minibert.kernels import OPS


def a_report(**changes: Any) -> Report:
    given = {"device": "gpu", "date": "2026-01-02T03:04:05+00:00", "commit": "", "command": "", "budget_s": 60.0}
    return Report("cupy", emulated=False, **{**given, **changes})


@pytest.fixture(scope="module")
def emulator() -> Any:
    try:
        return backends.get("emulator")
    except BackendUnavailable as reason:
        pytest.skip(str(reason))


# ------------------------------------------------------------------------------------------------------- the whole way


@pytest.fixture(scope="module")
def whole(emulator: Any, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run of everything on the emulator: exit status, output, document."""
    path = tmp_path_factory.mktemp("gpu_check") / "found.json"
    before = sorted((root / "bench" / "results").iterdir())
    command = [sys.executable, "-m", "bench.gpu_check", "--backend", "emulator", "--tiny", "--json", str(path)]
    command += ["--seconds", "1800"]  # however busy the machine
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1800)
    assert sorted((root / "bench" / "results").iterdir()) == before, "an emulated run leaves nothing among results"
    assert path.is_file(), ran.stderr
    return ran, json.loads(path.read_text())


def figures(document: Any, name: str) -> Any:
    return next(part["figures"] for part in document["parts"] if part["name"] == name)


def test_the_whole_way_on_the_emulator(whole: Any) -> None:
    ran, document = whole
    assert list(problems(document)) == []
    assert ran.returncode == 0 and document["ok"], ran.stdout + ran.stderr
    status = {part["name"]: part["status"] for part in document["parts"]}
    assert list(status) == [part.name for part in gpu_check.PARTS]
    left_out = {"compile", "sanitizer", "parity"}  # what needs NVRTC, NVIDIA's tool, or the time of a second suite
    assert {name for name, said in status.items() if said == "skipped"} == left_out
    assert all(status[name] == "ok" for name in status if name not in left_out), status


def test_nothing_emulated_passes_for_gpu_speed(whole: Any) -> None:
    ran, document = whole
    assert document["emulated"] and document["label"] == EMULATED
    titles = [line for line in ran.stdout.splitlines() if line.startswith(("parts", "measured", "kernels", "training"))]
    assert len(titles) == 4 and all(EMULATED.split()[0] in title for title in titles), titles
    assert not any(group.get("times_as_fast") for group in figures(document, "steps")["groups"])
    assert not any("target_met" in row for row in figures(document, "kernels")["rows"])


def test_every_op_is_judged_and_every_kernel_timed(whole: Any) -> None:
    _, document = whole
    found = figures(document, "conformance")
    assert set(found["dtypes"]) == {"float32", "bfloat16", "float16"}
    assert all(set(d["bound_share"]) == set(OPS) and d["failed"] == 0 for d in found["dtypes"].values())
    rows = figures(document, "kernels")["rows"]
    place = backends.get("emulator")
    assert {row["op"] for row in rows} == {op.name for op in OPS.values() if place.by(op) != "formula"}
    assert {row["mode"] for row in rows} == {"float32", "bfloat16", "tf32"}
    assert not [row for row in rows if "error" in row or row["same_bits"] is False]


def test_tiny_training_and_steps_came_to_numbers(whole: Any) -> None:
    _, document = whole
    training = figures(document, "tiny_training")
    for way in ("op by op", "captured graphs"):
        assert training[way]["largest_difference"] <= 1e-4 and training[way]["same_bits_twice"]
    for group in figures(document, "steps")["groups"]:
        for who in ("ours, eager", "ours, graph"):
            assert group["results"][who]["ms"] > 0 and group["results"][who]["peak_memory"] > 0


def test_the_readme_of_results_names_all_there_is(whole: Any, root: Path) -> None:
    text = (root / "bench" / "results" / "README.md").read_text()
    _, document = whole
    names = {*document, *(name for part in document["parts"] for name in part), *(p.name for p in gpu_check.PARTS)}
    names |= {name for row in figures(document, "kernels")["rows"] for name in row} - {"op", "mode", "size", "by"}
    assert not [name for name in sorted(names) if f"`{name}`" not in text]


# ------------------------------------------------------------------------------------------------------ what goes wrong

ODD = """
import os, signal, time
from bench.gpu_check.part import Failed, Skipped

def good(run):
    run.keep(answer=42)

def raises(run):
    run.keep(so_far=1)
    raise RuntimeError("out of the blue")

def fails(run):
    raise Failed("a demand is not met")

def cannot(run):
    raise Skipped("a program is not found")

def dies(run):
    run.keep(so_far=2)
    os.kill(os.getpid(), signal.SIGSEGV)

def leaves(run):
    os._exit(3)

def hangs(run):
    run.keep(so_far=3)
    open(os.environ["GPU_CHECK_TEST_HANGS"], "w").close()
    time.sleep(600)

def looks_back(run):
    on_disk = os.path.exists(os.environ["GPU_CHECK_TEST_REPORT"])
    run.keep(earlier=run.earlier("good")["answer"], on_disk=on_disk)
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs functions of ODD as parts; the report."""
    (tmp_path / "odd_parts.py").write_text(ODD)
    path = tmp_path / "found.json"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("GPU_CHECK_TEST_REPORT", str(path))
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)

    def run(*names: str, correctness: bool = True, limit: float = 600.0, budget: float = 6000.0) -> Report:
        report = a_report(path=path, budget_s=budget)
        parts = [Part(name, name, f"odd_parts:{name}", correctness, limit) for name in names]
        gpu_check.run_parts(parts, Settings(), report)
        assert list(problems(json.loads(path.read_text()))) == []
        return report

    return run


@pytest.mark.parametrize(
    ("name", "status", "reason", "kept"),
    [
        ("raises", "error", "RuntimeError: out of the blue", 1),
        ("fails", "failed", "a demand is not met", None),
        ("cannot", "skipped", "a program is not found", None),
        ("dies", "error", "SIGSEGV", 2),
        ("leaves", "error", "status 3", None),
    ],
)
def test_a_part_that_goes_wrong_is_recorded_and_the_rest_goes_on(
    odd: Any, name: str, status: str, reason: str, kept: int | None
) -> None:
    report = odd("good", name, "looks_back")
    good, wrong, after = report.parts
    assert (good.status, after.status) == ("ok", "ok")
    assert after.figures == {"earlier": 42, "on_disk": True}
    assert wrong.status == status and reason in wrong.reason
    assert wrong.figures.get("so_far") == kept
    assert report.ok == (status == "skipped")


def test_a_part_that_hangs_is_ended_and_its_figures_kept(
    odd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is over when the part says that it hangs, not when a busy machine may still be starting it."""
    hangs = tmp_path / "hangs"
    monkeypatch.setenv("GPU_CHECK_TEST_HANGS", str(hangs))

    class Child(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            while timeout is not None and self.poll() is None:
                if hangs.exists():
                    hangs.unlink()
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.01)
            return super().wait(timeout)

    monkeypatch.setattr(gpu_check.subprocess, "Popen", Child)
    hung, good = odd("hangs", "good", limit=30.0).parts
    assert hung.status == "timeout" and "30 s" in hung.reason and hung.figures == {"so_far": 3}
    assert good.status == "ok", "and the one before was ended, not waited for"


def test_what_the_clock_leaves_no_time_for_is_said(odd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LEAST", 1000.0)
    (speed,) = odd("good", correctness=False, budget=60.0).parts
    assert speed.status == "skipped" and "no time left" in speed.reason and not speed.figures
    report = odd("good", correctness=True, budget=60.0)
    assert report.parts[0].status == "timeout" and not report.ok, "what was not checked has not passed"


def test_verdict() -> None:
    def verdict(*said: tuple[bool, str]) -> bool:
        return passed([Outcome("a", "a", correctness, status) for correctness, status in said])

    assert verdict((True, "ok"), (True, "skipped"), (False, "error"), (False, "timeout"))
    assert not verdict((True, "ok"), (True, "timeout"))
    assert not verdict((True, "error"))
    assert not verdict((True, "ok"), (False, "failed")), "other bits after the timing, say"
    assert not verdict()
    stopped = a_report(parts=[Outcome("a", "a", True, "ok")])
    assert not stopped.document()["ok"], "the run has not come to its end"
    stopped.finished = True
    assert stopped.document()["ok"]


def test_the_schema_is_held(tmp_path: Path) -> None:
    report = a_report(parts=[Outcome("a", "a", True, "ok", figures={"x": np.float64("inf"), "n": np.int64(3)})])
    write_json(tmp_path / "a.json", report.document())
    document = json.loads((tmp_path / "a.json").read_text())
    assert list(problems(document)) == []
    assert document["parts"][0]["figures"] == {"x": None, "n": 3}
    for break_it in (
        lambda d: d.pop("device"), lambda d: d.update(ok="yes"), lambda d: d.update(more=1),
        lambda d: d["parts"][0].update(status="fine"), lambda d: d["parts"][0].pop("seconds"),
        lambda d: d["parts"][0].update(status="error"),
    ):  # fmt: skip
        broken = json.loads(json.dumps(document))
        break_it(broken)
        assert len(list(problems(broken))) == 1
    assert list(problems([])) == ["the document: expected an object, got list"]


def test_file_name() -> None:
    assert file_name("NVIDIA H200", "2026-11-22T01:02:03+00:00") == "nvidia-h200-2026-11-22.json"


# ----------------------------------------------------------------------------------------------------- the command line


def called(*words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check", *words])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    return int(ended.value.code or 0)


def test_without_a_gpu_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> None:
        raise BackendUnavailable("no NVIDIA driver (libcuda.so.1) on this machine")

    monkeypatch.setattr(cupy_driver, "available", none)
    assert called(monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "error: backend 'cupy' cannot run here: no NVIDIA driver (libcuda.so.1) on this machine"
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--backend", "emulator"), "together with --tiny"),
        (("--backend", "numpy", "--tiny"), "expected cupy, or emulator"),
        (("--only", "kernel"), "no part is called 'kernel': choose from machine"),
        (("--json", "/nowhere/at/all.json"), "there is no folder"),
    ],
)
def test_a_mistake_is_one_line(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(*words, monkeypatch=monkeypatch) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_make_gpu_check_installs_nothing(root: Path) -> None:
    said = subprocess.run(
        ["make", "--dry-run", "gpu-check"], cwd=root, capture_output=True, text=True, check=True, timeout=600
    )
    assert "-m bench.gpu_check" in said.stdout and "pip" not in said.stdout


def test_all_parts_together_keep_to_nine_minutes() -> None:
    assert gpu_check.BUDGET + gpu_check.GRACE < 9 * 60
    others = sum(part.limit_s for part in gpu_check.PARTS if part.name != "steps")
    assert others < gpu_check.BUDGET - 50, "the steps have time even where the parts before take most of theirs"
