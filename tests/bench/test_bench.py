"""`bench.step` and `bench.infer` at tiny sizes: what they count, in what order they time, what they refuse."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest

from bench import infer, step
from bench.peers import onnx_bert as onnx_peer
from bench.peers import torch_bert as torch_peer
from bench.timing import batches, harness, sides
from minibert import backends
from minibert.errors import UserError
from minibert.kernels.cpu.jit import KERNEL_FLAGS, OPTIONS
from minibert.kernels.cpu.threads import run_rows
from minibert.kernels.readings import cost
from minibert.lab.measure import peaks as machine_peaks
from minibert.lab.measure.peaks import Peaks
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import BertConfig
from minibert.model.tensor import no_grad

SMALL = BertConfig(
    vocab_size=8000, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=64,
)  # fmt: skip
PEAKS = Peaks(gflops=1e9, product="1 x 1 x 1", fma_gflops=0.0, triad_gbps=1.0, fill_gbps=1.0, cache_bytes=0)
STEP, INFER = step.Task(SMALL, 2, 16, 1), infer.Task(SMALL, 2, 16, 1)


@pytest.fixture
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's peak takes seconds to measure; here nothing hangs on it."""
    monkeypatch.setattr("minibert.lab.measure.peaks.measure_peaks", lambda: PEAKS)


def silent(text: str) -> None:
    """Progress that nobody reads."""


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command as the shell runs it; its exit status."""
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as exit_:
        harness.run_main(module.bench)
    return int(exit_.value.code or 0)


# --------------------------------------------------------------------------------------------------------- the batches


def test_on_the_same_work_every_position_has_a_loss() -> None:
    (same,), (masked,) = (STEP.batches(name, 0) for name in ("same_work", "masked_head"))
    assert same.predicted == 32 and masked.predicted == 5
    assert same.packed.targets is not None and (same.packed.targets >= 0).all()
    assert same.real.all() and (np.diff(same.packed.cu_seqlens) == 16).all()


@pytest.mark.parametrize("kind", batches.SEQUENCES)
def test_packed_and_padded_text_are_the_same_tokens(kind: str) -> None:
    found = batches.text_batches(SMALL, 4, 32, 5, seed=3, kind=kind)
    lengths = np.concatenate([b.lengths for b in found])
    assert len(found) == 5 and lengths.min() < lengths.max() <= 32
    for batch in found:
        assert batch.padded["input_ids"].shape == (4, batch.lengths.max()), "padded to the longest and no further"
        assert (batch.padded["input_ids"][batch.real] == batch.packed.input_ids).all()
        assert (batch.padded["labels"][batch.real] == batch.packed.labels).all() and batch.predicted > 0
        assert (batch.padded["labels"][~batch.real] < 0).all()
    about = sides.described(found)
    assert about["padding"] == pytest.approx(1 - lengths.sum() / sum(b.real.size for b in found))
    assert about["mean_length"] == pytest.approx(lengths.mean())
    assert [b.packed.input_ids.tolist() for b in found] != [
        b.packed.input_ids.tolist() for b in batches.text_batches(SMALL, 4, 32, 5, seed=4, kind=kind)
    ]


def test_flops_are_those_of_the_products_that_run() -> None:
    """Counted in the door, on sequences of unequal length: dense products and the two products of attention."""
    batch, *_ = batches.text_batches(SMALL, 4, 32, 1, seed=3, kind="sentences")
    model = BertForMaskedLM(SMALL, "numpy").eval()
    counted = 0

    def count(op: Any, arrays: Any, params: Any, call: Any) -> Any:
        nonlocal counted
        if op.name in ("linear", "linear_gelu"):
            counted += 2 * arrays[0].shape[0] * arrays[1].size
        elif op.name == "attention":
            counted += sum(4 * int(n) ** 2 * SMALL.hidden_size for n in batch.lengths)
            assert cost(op, *arrays, **params).flops > 0
        return call()

    with no_grad(), model.place.backend.watched_by(count):
        model(batch.packed._replace(labels=None)).logits  # noqa: B018  computed when asked for
    assert counted == batches.work(SMALL, batch, padded=False, head="every")
    assert batches.work(SMALL, batch, padded=True, head="every") > counted
    assert batches.work(SMALL, batch, padded=False, head="no") < counted


# --------------------------------------------------------------------------------------------------------- the harness


def test_contestants_take_turns_and_the_warm_up_is_apart() -> None:
    calls: list[str] = []
    pair = [harness.Contestant(name, lambda name=name: calls.append(name), 1) for name in "AB"]  # type: ignore[misc]
    harness.interleaved(pair, 4, silent)
    warm = 1 + harness.WARM_UP
    assert calls == ["A"] * warm + ["B"] * warm + ["A", "B"] * 4
    assert all(len(one.seconds) == 4 for one in pair)


def test_a_quick_call_is_repeated_until_a_turn_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []  # of a millisecond each, by a clock that nothing else moves
    clock = SimpleNamespace(perf_counter=lambda: len(calls) / 1000, sleep=lambda seconds: None)
    monkeypatch.setattr(harness, "time", clock)
    one = harness.Contestant("A", lambda: calls.append(1), 1, steps=2, shortest=0.0195)
    harness.interleaved([one], 3, silent)
    assert one.repeats == 20 and len(calls) == 1 + harness.WARM_UP + 3 * (1 + 20)
    assert one.seconds == pytest.approx([0.0005] * 3), "seconds are of one step"


def facts_of(ours: list[float], theirs: list[float], flops: int = 10**9) -> dict[str, Any]:
    pair = [harness.Contestant("numba", silent, flops), harness.Contestant("torch", silent, flops)]  # type: ignore[arg-type]
    pair[0].seconds, pair[1].seconds = ours, theirs
    return harness.compared(pair, ["numba"])


def test_the_ratio_is_theirs_over_ours_of_turns_taken_in_pairs() -> None:
    facts = facts_of([1.0, 2.0, 9.0], [6.0, 4.0, 5.0])
    assert facts["ratio"] == {"numba": {"torch": 2.0}}
    low, high = facts["ratio_p20_p80"]["numba"]["torch"]
    assert low < 2.0 < high
    assert facts["seconds"]["numba"]["all"] == [1.0, 2.0, 9.0] and facts["seconds"]["numba"]["median"] == 2.0


def test_what_is_above_the_peak_is_called_impossible_and_gives_no_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of([0.25] * 3, [2.0] * 3)
    harness.shares(facts, PEAKS._replace(gflops=1.0, fma_gflops=2.0))
    assert facts["share_of_product"] == {"numba": 4.0, "torch": 0.5}, "which may be above 1: NumPy is not the limit"
    assert facts["share_of_peak"] == {"numba": 2.0, "torch": 0.25} and facts["impossible"] == ["numba"]
    assert facts["ratio"] == {"numba": {"torch": None}}
    rows = [list(column.cells) for column in sides.table({**facts, "peak_bytes": {}}, ["torch"]).columns]
    assert [column[0] for column in rows[1:5]] == ["-", "-", "-", ""] and "impossible" in str(rows[-1][0])
    assert rows[1][1] == "2000.0"


def test_the_peak_is_of_vector_instructions_that_all_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what was computed and by the code, not by how fast: that hangs on what else the machine does."""
    backends.get("numba")
    seen: list[Any] = []

    def in_a_second(call: Any) -> float:
        call()
        return 1.0

    def noted(kernel: Any, count: int, *arrays: Any, grain: int) -> None:
        run_rows(kernel, count, *arrays, grain=grain)
        seen.append((count, *arrays))

    monkeypatch.setattr(machine_peaks, "best_seconds", in_a_second)
    monkeypatch.setattr(machine_peaks, "run_rows", noted)
    monkeypatch.setattr(machine_peaks, "num_threads", lambda: 2)
    rate = machine_peaks.fma_gflops()
    ((threads, values, out, factors),) = seen
    multiply_adds = machine_peaks.PASSES * machine_peaks.CHAINS * machine_peaks.LINKS
    assert threads == 2 and rate == pytest.approx(2 * values.size * multiply_adds * 1e-9)
    v, y, done = float(values[0, 0]), 0.0, 0
    c = [float(factor) for factor in factors]
    for _ in range(machine_peaks.PASSES):
        starts, y = (y, v, c[0], c[1], c[2], c[3], c[4], c[5]), 0.0
        for start, factor in zip(starts, c, strict=True):
            for _ in range(machine_peaks.LINKS):
                start, done = start * v + factor, done + 1
            y += start
    assert done == multiply_adds and out == pytest.approx(y, rel=1e-5)
    if platform.machine() == "x86_64":
        anew = numba.njit(fastmath=KERNEL_FLAGS, **OPTIONS)(machine_peaks.chains.py_func)  # type: ignore[attr-defined]
        row = np.zeros((1, 64), np.float32)
        anew(row, row.copy(), (np.float32(0.1),) * machine_peaks.CHAINS, 0, 1)
        (assembly,) = anew.inspect_asm().values()
        packed = re.findall(r"vfn?m(?:add|sub)\w+ps\t", assembly)
        assert len(packed) >= machine_peaks.CHAINS * machine_peaks.LINKS, "none of the multiply-adds was left out"


def test_figures_that_should_agree_are_compared_relatively() -> None:
    assert harness.apart({"numba": [10.0, 2.0], "torch": [10.009, 2.0]}, 1e-3) == ""
    assert "they do not do the same work" in harness.apart({"numba": [10.0, 2.0], "torch": [10.0, 2.1]}, 1e-3)
    assert harness.apart({"numba": [1.0], "torch": [float("nan")]}, 1e-3)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read as Linux shows it")
def test_peak_memory_is_that_of_a_process_of_its_own() -> None:
    grown, why = harness.peak_bytes("tests.bench.test_bench:hold", {"threads": 1, "config": {}, "megabytes": 200})
    assert grown is not None, why
    assert 195e6 < grown < 240e6, "the 200 that a step holds; not the 400 that making it took"
    nothing, why = harness.peak_bytes("tests.bench.test_bench:fail", {"threads": 1, "config": {}})
    assert nothing is None and "not measured" in why and "no such luck" in why


def hold(spec: dict[str, Any]) -> Any:
    """In the child: a step that holds so many megabytes, made by holding twice as many; but 1 while it warms up."""
    megabytes = 1 if spec["config"] else spec["megabytes"]
    np.ones((2 * megabytes, 1_000_000), np.uint8).sum()
    return lambda: np.ones((megabytes, 1_000_000), np.uint8).sum()


def fail(spec: dict[str, Any]) -> Any:
    raise RuntimeError("no such luck")


# -------------------------------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize("module", [step, infer])
def test_a_run_without_opponents_writes_every_measure(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_peaks: None
) -> None:
    monkeypatch.setattr(harness, "named_config", lambda name, length: SMALL)
    path = tmp_path / "found.json"
    words = ["--batch", "2", "--length", "16", "--backends", "numpy,numba", "--rounds", "3", "--threads", "1"]
    assert run(module, monkeypatch, *words, "--no-memory", "--json", str(path)) == 0
    said = capsys.readouterr().out
    assert all(what.split(":")[0] in said for what in module.MEASURES.values()) and "op calls" in said
    found = json.loads(path.read_text())
    assert found["ok"] and found["threads"] == 1 and found["machine"]["cores"] and found["versions"]["numpy"]
    assert list(found["measures"]) == list(module.MEASURES)
    for facts in found["measures"].values():
        assert set(facts["seconds"]) == {"numpy", "numba"} == set(facts["share_of_peak"])
        assert all(len(taken["all"]) == 3 and taken["median"] > 0 for taken in facts["seconds"].values())
        assert facts["peak_bytes"] == {"numpy": None, "numba": None} and not facts["refused"]
        assert facts["overhead"]["numba"]["ops"] > 10
        assert facts["overhead"]["numba"]["seconds"] > 0


def test_sides_that_do_not_do_the_same_work_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick_peaks: None
) -> None:
    monkeypatch.setattr(harness, "named_config", lambda name, length: SMALL)
    right = step.OurTraining.quiet

    def lazy(ours: Any, packed: Any, update: bool = False) -> tuple[float, float]:
        loss, norm = right(ours, packed, update)
        return loss, norm * (1.01 if ours.name == "numba" else 1.0)

    monkeypatch.setattr(step.OurTraining, "quiet", lazy)
    words = ["--batch", "2", "--length", "8", "--backends", "numpy,numba", "--rounds", "3", "--measures", "masked_head"]
    assert run(step, monkeypatch, *words) == 1
    said = capsys.readouterr().out
    assert "refused" in said and "numba gives" in said and "of peak" not in said


def test_outputs_that_are_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = infer.OurInference.run
    monkeypatch.setattr(
        infer.OurInference, "run", lambda ours, packed: right(ours, packed) * (1.01 if ours.name == "numba" else 1)
    )
    facts = infer.measure("dense", INFER, ["numpy", "numba"], [], 3, silent)
    assert "numba" in facts["refused"] and "seconds" not in facts


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (step, ["--config", "huge"], "--config: expected tiny, mini, minilm"),
        (infer, ["--config", "tiny", "--length", "513"], "512 positions"),
        (step, ["--vs", "jax"], "--vs: expected torch, torch.bf16, torch.compile, numba.float32, each once"),
        (infer, ["--vs", "torch,torch"], "each once"),
        (step, ["--measures", "all"], "--measures: expected same_work, masked_head, packed"),
        (infer, ["--sequences", "long"], "--sequences: expected filled or sentences"),
        (step, ["--backends", "tpu"], "no backend is called 'tpu'"),
        (step, ["--backends", "emulator"], "no backend of the CPU"),
        (infer, ["--rounds", "2"], "--rounds"),
        (step, ["--json", "nowhere/found.json"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(
    module: Any, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "emulator" in words and not any(s.name == "emulator" and s.backend for s in backends.available()):
        pytest.skip("the emulator does not run here")
    assert run(module, monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_without_torch_a_comparison_with_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch_peer, "missing", lambda: "torch is not installed")
    assert run(step, monkeypatch, "--vs", "torch") == 2
    assert "pip install 'minibert-lab[parity]'" in capsys.readouterr().err


def test_an_opponent_that_cannot_run_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_peer, "missing", lambda: "onnxruntime not installed")
    facts = infer.measure("dense", INFER, ["numpy"], ["onnxruntime"], 3, silent)
    assert facts["skipped"] == {"onnxruntime": "UserError: onnxruntime not installed"}
    assert list(facts["seconds"]) == ["numpy"] and facts["ratio"] == {"numpy": {}}


def test_the_shipped_text_needs_its_vocabulary() -> None:
    with pytest.raises(UserError, match="needs a vocabulary of 8000, got 100"):
        batches.text_batches(BertConfig(vocab_size=100), 2, 16, 1, 0, "filled")


# -------------------------------------------------------------------------------------------------------------- others


@pytest.mark.parity
@pytest.mark.parametrize("name", list(step.MEASURES))
def test_torch_does_the_same_training_step(name: str) -> None:
    facts = step.measure(name, STEP, ["numpy"], ["torch"], 3, silent)
    assert not facts["refused"] and not facts["skipped"]
    for when in ("without_dropout", "fresh_without_dropout"):
        for key, value in facts[when]["numpy"].items():
            assert facts[when]["torch"][key] == pytest.approx(value, rel=1e-4), (when, key)
    same = facts["flops"]["torch"] == facts["flops"]["numpy"]
    assert same is (name == "same_work"), "torch has more to do on masked rows and on padding"
    assert facts["ratio"]["numpy"]["torch"] > 0


@pytest.mark.parity
@pytest.mark.parametrize("name", list(step.MEASURES))
def test_the_plain_torch_model_does_the_same_work_as_transformers(name: str) -> None:
    weights = batches.random_weights(SMALL)
    (batch, *_) = STEP.batches(name, 0)
    plain, full = (torch_peer.TorchTraining(SMALL, weights, 1, plain=p) for p in (True, False))
    assert plain.quiet(plain.prepare(batch)) == pytest.approx(full.quiet(full.prepare(batch)), rel=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("name", list(infer.MEASURES))
def test_torch_and_onnxruntime_give_the_same_outputs(name: str, logits: bool) -> None:
    opponents = ["torch", *([] if importlib.util.find_spec("onnxruntime") is None else ["onnxruntime"])]
    facts = infer.measure(name, infer.Task(SMALL, 2, 16, 1, logits=logits), ["numpy"], opponents, 3, silent)
    assert not facts["refused"] and not facts["skipped"]
    assert set(facts["apart"]["after"]) == set(opponents) and max(facts["apart"]["after"].values()) < 1e-5
    if "onnxruntime" in opponents:
        assert f"{SMALL.num_hidden_layers} Attention" in facts["libraries"]["onnxruntime"]


@pytest.mark.parity
def test_sides_in_fewer_bits_are_near_and_have_no_share_of_the_peak_of_float32() -> None:
    opponents = ["torch", "torch.bf16"]
    if importlib.util.find_spec("onnxruntime") is not None:
        opponents += ["onnxruntime", "onnxruntime.int8"]
    task = infer.Task(SMALL, 2, 16, 1, int8=True)
    facts = infer.measure("dense", task, ["numba"], opponents, 3, silent)
    assert not facts["refused"] and not facts["skipped"]
    assert "12 linear layers in int8" in facts["libraries"]["numba"]
    assert set(facts["fewer_bits"]) == {"numba"} | {name for name in opponents if name.endswith(("bf16", "int8"))}
    assert 1e-4 < max(facts["apart"]["after"].values()) < infer.NEAR
    harness.shares(facts, PEAKS)
    assert set(facts["share_of_peak"]) == {name for name in ("torch", "onnxruntime") if name in opponents}


def test_int8_is_said_and_near_floats() -> None:
    task = infer.Task(SMALL, 2, 16, 1, int8=True)
    facts = infer.measure("dense", task, ["numpy", "numba"], [], 3, silent)
    assert not facts["refused"] and facts["fewer_bits"] == ["numpy", "numba"]
    assert all("linear layers in int8 (" in library for library in facts["libraries"].values())
