"""The measures of `bench.gpu_check`: compute-sanitizer's words, clocks, kernels' shares, contestants, PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from bench.gpu_check import clock as clocks
from bench.gpu_check import correctness, kernels, peaks, steps, torch_peer
from bench.gpu_check.part import Run, Settings
from bench.gpu_check.peaks import Peaks
from minibert import backends
from minibert.backends import BackendUnavailable
from minibert.backends.cuda import cupy_driver, nvrtc
from minibert.backends.cuda.backend import CudaBackend
from minibert.kernels import OPS
from minibert.kernels.op import BertSize
from minibert.kernels.readings import Cost
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import BertConfig
from tests.column_major import ColumnMajor
from tests.imagined_cupy import FakeCupy

SMALL = BertConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=16,
)  # fmt: skip
SIZE = BertSize(2, 8, 32, 2, 64, 96, 3)


def a_run(folder: Path, backend: str = "emulator") -> Run:
    return Run(Settings(backend, tiny=True), folder / "part.json", 60.0, {})


@pytest.fixture(scope="module")
def emulator() -> Any:
    try:
        return backends.get("emulator")
    except BackendUnavailable as reason:
        pytest.skip(str(reason))


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
        correctness.sanitizer(run)
        assert run.figures["tools"] == {"memcheck": text, "racecheck": text}
    else:
        with pytest.raises(getattr(correctness, outcome), match=text):
            correctness.sanitizer(run)


def test_no_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(correctness, "PLACES", ())
    with pytest.raises(correctness.Skipped, match="not found"):
        correctness.sanitizer(a_run(tmp_path, "cupy"))


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
    clock = clocks.EventClock(device)
    with clock.running():
        seconds, still_behind = clock.sample(device.work, 3)
    assert seconds == pytest.approx(1e-3)
    assert still_behind == (behind > 10)
    assert clock.blockers == {0: 1, 1: 2}.get(behind, clocks.MOST_BLOCKERS)
    assert device.log[-5 - (clock.blockers > 0) :][-5:] == [0, 1, 2, "wait", "wait"]
    times = clocks.timed(clock, device.work, 5, 600.0)
    assert times.median == pytest.approx(1.0) and times.samples == 5 and times.calls == 1


class TimedEvent:
    """CuPy's Event where it keeps the time: `done` once the device came past it."""

    made: ClassVar[list[Any]] = []

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.ptr, self.stream, self.disable_timing, self.done = 5, None, disable_timing, False
        TimedEvent.made.append(self)

    def record(self, stream: Any = None) -> None:
        self.stream = stream


def test_peaks_of_an_imagined_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The driver of a GPU on a CuPy of host memory: what is timed is queued on the clock's own stream, in each mode."""
    cupy = FakeCupy()
    cupy.cuda.Event, cupy.cuda.get_elapsed_time = TimedEvent, lambda start_event, end_event: 2.0
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cupy_driver, "driver_version", lambda: 12040)
    monkeypatch.setattr(nvrtc, "toolkit", lambda newest=None: SimpleNamespace(version=(12, 9), describe=lambda: ""))
    monkeypatch.setattr(nvrtc, "check_architecture", lambda tools, arch: None)
    monkeypatch.setattr(nvrtc, "compile_kernels", lambda *_, **__: SimpleNamespace(image=b"cubin"))
    monkeypatch.setattr(cupy_driver.cublaslt, "load", lambda major: ColumnMajor())
    monkeypatch.setattr(cupy_driver, "check_parameters", lambda function, kernel: None)
    backend = CudaBackend(cupy_driver.CupyDriver())
    monkeypatch.setitem(backends._loaded, "cupy", backend)
    products: list[Any] = []
    monkeypatch.setattr(backend.driver, "multiply", products.append)

    run = a_run(tmp_path, "cupy")
    peaks.peaks(run)
    found = run.figures
    assert found["clock"] == "EventClock"
    assert set(found["bandwidth"]) == {"memcpy", "copy", "read", "fill"}
    assert found["bandwidth"]["memcpy"]["gbps"] == pytest.approx(2 * found["bytes"] / 2e-3 * 1e-9)
    start, stop = (event for event in TimedEvent.made if not event.disable_timing)
    assert start.stream is stop.stream is not None
    copies = [entry for entry in cupy.cuda.runtime.log if entry[:2] == ("memcpyAsync", 3)]
    assert copies and {(size, stream) for _, _, size, stream in copies} == {(found["bytes"], start.stream.ptr)}
    assert {launch[4] for launch in cupy.cuda.driver.launched[-3:]} == {start.stream.ptr}
    assert {(p.dtype.name, p.mode) for p in products} == {
        ("float32", "float32"), ("float32", "tf32"), ("bfloat16", "float32"),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- kernels, steps


def test_a_figure_above_the_peak_is_refused() -> None:
    peaks = Peaks(copy_gbps=1000.0, memory_gbps=1100.0, tflops={"float32": 10.0})
    work = Cost(flops=10**6, bytes=10**9)

    def at(ms: float) -> dict[str, Any]:
        return kernels.shares(OPS["add"], work, clocks.Times(ms, ms, ms, ms, 3, 1, 0), "float32", peaks)

    fast, slow, too_fast = at(1.1), at(2.0), at(0.5)
    assert fast["target_met"] and fast["of_copy"] == pytest.approx(1 / 1.1) and fast["bound_by"] == "bytes"
    assert slow["target_met"] is False and slow["share"] == pytest.approx(1 / 2.2)
    assert too_fast["note"] == "impossible" and too_fast["gbps"] is None and too_fast["share"] is None
    assert "target_met" not in kernels.shares(
        OPS["matmul"], work, clocks.Times(2.0, 2.0, 2.0, 2.0, 3, 1, 0), "float32", peaks
    )


@pytest.mark.parametrize("name", [name for name in OPS if name.endswith("_grad")])
def test_gradients_are_timed_on_what_their_forward_ops_hand_on(emulator: Any, name: str) -> None:
    """As large as the op's own sample, and the same work."""
    op = OPS[name]
    prepared = kernels.prepare(emulator, op, SIZE, "float32")
    expected = op.bench(np.random.default_rng(0), SIZE)
    assert [tuple(a.shape) for a in prepared.arrays] == [np.shape(a) for a in expected.arrays]
    assert all(a.device is emulator for a in prepared.arrays)
    assert prepared.work.bytes > 0


def test_tiled_numbers_are_random_and_full() -> None:
    rng = kernels.Tiled(np.random.PCG64(1))
    large = rng.standard_normal((3, 1 << 20))
    assert large.shape == (3, 1 << 20) and abs(large.std() - 1) < 0.01 and np.all(large[0] != large[1])
    assert rng.standard_normal(7).shape == (7,) and isinstance(float(rng.standard_normal()), float)


def test_flops_are_those_of_the_floors() -> None:
    """Worked out apart: 2.23 TFLOP at B 32, T 128 and 19.3 at B 64, T 512."""
    assert steps.flops(BertConfig(), 32, 128) == pytest.approx(2.23e12, rel=0.01)
    assert steps.flops(BertConfig(), 64, 512) == pytest.approx(19.3e12, rel=0.01)


def test_a_contestant_that_cannot_run_is_noted_and_the_others_go_on(
    emulator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_graph(ours: Any) -> float:
        raise MemoryError("no block of 1 bytes")

    monkeypatch.setattr(steps.Ours, "graph", no_graph)
    run, facts = a_run(tmp_path), {"batch": 2, "length": 8, "mode": "float32", "flops": 10**6}
    group = steps.Group(run, facts, SMALL, steps.random_weights(SMALL), None)
    group.measure(None)
    assert facts["results"]["ours, eager"]["ms"] > 0  # type: ignore[index]
    assert "no block" in facts["results"]["ours, graph"]["error"]  # type: ignore[index]
    assert any("no block" in what for what in run.skipped)
    group.close()


# -------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.fixture
def torch_steps() -> Any:
    weights, packed = steps.random_weights(SMALL), steps.random_batch(SMALL, 2, 8)

    def make(mode: str = "float32", plain: bool = True) -> torch_peer.TorchSteps:
        return torch_peer.TorchSteps(SMALL, weights, packed, 8, mode, "cpu", plain=plain)

    return make


@pytest.mark.parity
@pytest.mark.parametrize("plain", [True, False])
def test_torch_does_the_same_work(torch_steps: Any, plain: bool) -> None:
    model = BertForMaskedLM(SMALL, "numpy", initialise=False)
    model.load_state_dict(steps.random_weights(SMALL))
    ours = model(steps.random_batch(SMALL, 2, 8)).loss.item()
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
