"""`bench.gpu_check` without a GPU: the whole way on the emulator, parts that go wrong, time that runs out, one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import gpu_check, gpu_clock, gpu_correctness, gpu_kernels, gpu_steps, gpu_torch
from bench.gpu_check import Part
from bench.gpu_part import Run, Settings
from bench.gpu_peaks import Peaks
from bench.gpu_report import EMULATED, Outcome, Report, file_name, passed, problems, write_json
from minibert import backends
from minibert.backends import BackendUnavailable
from minibert.backends.cuda import cupy_driver
from minibert.bert import BertForMaskedLM
from minibert.config import BertConfig
from minibert.kernels import OPS
from minibert.kernels.op import BertSize
from minibert.kernels.readings import Cost

SMALL = BertConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=16,
)  # fmt: skip
SIZE = BertSize(2, 8, 32, 2, 64, 96, 3)


def a_report(**changes: Any) -> Report:
    given = {"device": "gpu", "date": "2026-01-02T03:04:05+00:00", "commit": "", "command": "", "budget_s": 60.0}
    return Report("cupy", emulated=False, **{**given, **changes})


def a_run(folder: Path, backend: str = "emulator", **report: Any) -> Run:
    return Run(Settings(backend, tiny=True), folder / "part.json", 60.0, report)


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
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=400)
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
from bench.gpu_part import Failed, Skipped

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

    def run(*names: str, correctness: bool = True, limit: float = 30.0, budget: float = 120.0) -> Report:
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


def test_a_part_that_hangs_is_ended_and_its_figures_kept(odd: Any) -> None:
    hung, good = odd("hangs", "good", limit=3.0).parts
    assert hung.status == "timeout" and "3 s" in hung.reason and hung.figures == {"so_far": 3}
    assert hung.seconds < 15 and good.status == "ok"


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
    said = subprocess.run(["make", "--dry-run", "gpu-check"], cwd=root, capture_output=True, text=True, check=True)
    assert "-m bench.gpu_check" in said.stdout and "pip" not in said.stdout


def test_all_parts_together_keep_to_nine_minutes() -> None:
    assert gpu_check.BUDGET + gpu_check.GRACE < 9 * 60
    others = sum(part.limit_s for part in gpu_check.PARTS if part.name != "steps")
    assert others < gpu_check.BUDGET - 50, "the steps have time even where the parts before take most of theirs"


# ---------------------------------------------------------------------------------------------------- compute-sanitizer


@pytest.mark.parametrize(
    ("script", "outcome", "text"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'; exit 0", "ok", "no errors"),
        ("echo '========= Invalid __global__ write'; echo '========= ERROR SUMMARY: 2 errors'; exit 86", "Failed",
         "2 errors: Invalid __global__ write"),
        ("echo 'Device not supported'; exit 1", "Skipped", "does not run here"),
        ("echo '========= ERROR SUMMARY: 0 errors'; exit 1", "Failed", "exit status 1"),
    ],
)  # fmt: skip
def test_sanitizer(script: str, outcome: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    run = a_run(tmp_path, "cupy")
    if outcome == "ok":
        gpu_correctness.sanitizer(run)
        assert run.figures["tools"] == {"memcheck": text, "racecheck": text}
    else:
        with pytest.raises(getattr(gpu_correctness, outcome), match=text):
            gpu_correctness.sanitizer(run)


def test_no_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_correctness, "PLACES", ())
    with pytest.raises(gpu_correctness.Skipped, match="not found"):
        gpu_correctness.sanitizer(a_run(tmp_path, "cupy"))


# ------------------------------------------------------------------------------------------------------------ the clock


class Device:
    """Plays a GPU with a clock of its own: each piece of work takes 1 ms, and the host is `behind` at first."""

    def __init__(self, behind: int) -> None:
        self.now, self.behind, self.log = 0.0, behind, []
        device = self

        class Event:
            at = 0.0

            def record(self, stream: Any) -> None:
                assert stream == "a stream"
                self.at = device.now

            @property
            def done(self) -> bool:
                device.behind -= 1
                return device.behind >= 0

        self.cuda = SimpleNamespace(Event=Event, get_elapsed_time=lambda start, stop: (stop.at - start.at) * 1e3)
        self.driver = SimpleNamespace(new_stream=lambda: "a stream", memory=lambda: (1 << 20, 1 << 20), on=self.on)

    def on(self, stream: Any) -> Any:
        from contextlib import nullcontext

        return nullcontext()

    def zeros(self, shape: Any, dtype: Any) -> Any:
        return shape

    def run(self, op: Any, *arrays: Any) -> None:
        self.log.append("blocker")

    def synchronize(self) -> None:
        self.log.append("wait")

    def work(self, number: int) -> None:
        self.log.append(number)
        self.now += 1e-3


@pytest.mark.parametrize("behind", [0, 1, 10**6])
def test_events_time_work_behind_enough_blockers(behind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(behind)
    monkeypatch.setitem(sys.modules, "cupy", device)  # type: ignore[arg-type]
    clock = gpu_clock.EventClock(device)
    with clock.running():
        seconds, still_behind = clock.sample(device.work, 3)
    assert seconds == pytest.approx(1e-3)
    assert still_behind == (behind > 10)
    assert clock.blockers == {0: 1, 1: 2}.get(behind, gpu_clock.MOST_BLOCKERS)
    assert device.log[-5 - (clock.blockers > 0) :][-5:] == [0, 1, 2, "wait", "wait"]
    times = gpu_clock.timed(clock, device.work, 5, 1.0)
    assert times.median == pytest.approx(1.0) and times.samples == 5 and times.calls == 1


# ------------------------------------------------------------------------------------------------------- kernels, steps


def test_a_figure_above_the_peak_is_refused() -> None:
    peaks = Peaks(copy_gbps=1000.0, memory_gbps=1100.0, tflops={"float32": 10.0})
    work = Cost(flops=10**6, bytes=10**9)

    def at(ms: float) -> dict[str, Any]:
        return gpu_kernels.shares(OPS["add"], work, gpu_clock.Times(ms, ms, ms, ms, 3, 1, 0), "float32", peaks)

    fast, slow, too_fast = at(1.1), at(2.0), at(0.5)
    assert fast["target_met"] and fast["of_copy"] == pytest.approx(1 / 1.1) and fast["bound_by"] == "bytes"
    assert slow["target_met"] is False and slow["share"] == pytest.approx(1 / 2.2)
    assert too_fast["note"] == "impossible" and too_fast["gbps"] is None and too_fast["share"] is None
    assert "target_met" not in gpu_kernels.shares(
        OPS["matmul"], work, gpu_clock.Times(2.0, 2.0, 2.0, 2.0, 3, 1, 0), "float32", peaks
    )


@pytest.mark.parametrize("name", [name for name in OPS if name.endswith("_grad")])
def test_gradients_are_timed_on_what_their_forward_ops_hand_on(emulator: Any, name: str) -> None:
    """As large as the op's own sample, and the same work."""
    op = OPS[name]
    prepared = gpu_kernels.prepare(emulator, op, SIZE, "float32")
    expected = op.bench(np.random.default_rng(0), SIZE)
    assert [tuple(a.shape) for a in prepared.arrays] == [np.shape(a) for a in expected.arrays]
    assert all(a.device is emulator for a in prepared.arrays)
    assert prepared.work.bytes > 0


def test_tiled_numbers_are_random_and_full() -> None:
    rng = gpu_kernels.Tiled(np.random.PCG64(1))
    large = rng.standard_normal((3, 1 << 20))
    assert large.shape == (3, 1 << 20) and abs(large.std() - 1) < 0.01 and np.all(large[0] != large[1])
    assert rng.standard_normal(7).shape == (7,) and isinstance(float(rng.standard_normal()), float)


def test_flops_are_those_of_the_floors() -> None:
    """Worked out apart: 2.23 TFLOP at B 32, T 128 and 19.3 at B 64, T 512."""
    assert gpu_steps.flops(BertConfig(), 32, 128) == pytest.approx(2.23e12, rel=0.01)
    assert gpu_steps.flops(BertConfig(), 64, 512) == pytest.approx(19.3e12, rel=0.01)


def test_a_contestant_that_cannot_run_is_noted_and_the_others_go_on(
    emulator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_graph(ours: Any) -> float:
        raise MemoryError("no block of 1 bytes")

    monkeypatch.setattr(gpu_steps.Ours, "graph", no_graph)
    run, facts = a_run(tmp_path), {"batch": 2, "length": 8, "mode": "float32", "flops": 10**6}
    group = gpu_steps.Group(run, facts, SMALL, gpu_steps.random_weights(SMALL), None)
    group.measure(None)
    assert facts["results"]["ours, eager"]["ms"] > 0  # type: ignore[index]
    assert "no block" in facts["results"]["ours, graph"]["error"]  # type: ignore[index]
    assert any("no block" in what for what in run.skipped)
    group.close()


# -------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.fixture
def torch_steps() -> Any:
    weights, packed = gpu_steps.random_weights(SMALL), gpu_steps.random_batch(SMALL, 2, 8)

    def make(mode: str = "float32", plain: bool = True) -> gpu_torch.TorchSteps:
        return gpu_torch.TorchSteps(SMALL, weights, packed, 8, mode, "cpu", plain=plain)

    return make


@pytest.mark.parity
@pytest.mark.parametrize("plain", [True, False])
def test_torch_does_the_same_work(torch_steps: Any, plain: bool) -> None:
    model = BertForMaskedLM(SMALL, "numpy", initialise=False)
    model.load_state_dict(gpu_steps.random_weights(SMALL))
    ours = model(gpu_steps.random_batch(SMALL, 2, 8)).loss.item()
    theirs = torch_steps(plain=plain)
    assert theirs.quiet_loss() == pytest.approx(ours, abs=1e-5)
    assert len({id(p) for p in theirs.parameters}) == len(theirs.parameters) == len(dict(model.named_parameters()))


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
def test_torch_learns_eagerly_and_compiled(torch_steps: Any, mode: str) -> None:
    theirs = torch_steps(mode)
    before = theirs.quiet_loss()
    for _ in range(10):
        theirs.step()
    eager = theirs.quiet_loss()
    theirs.compile(backend="eager")
    for _ in range(10):
        theirs.step()
    assert theirs.quiet_loss() < eager < before
