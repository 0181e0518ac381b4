"""Training on the emulator, op by op and by graphs, in 32 and 16 bits: like NumPy, repeatable, resumed to the bit."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from minibert import backends
from minibert.backends import BackendUnavailable
from minibert.backends.base import dtype_of
from minibert.data import SHIPPED_TEXT, read_documents, train_tokenizer
from minibert.errors import UserError
from minibert.kernels.readings.bounded import PRECISIONS
from minibert.model import bert
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import BertConfig
from minibert.model.nn import Parameter, Place
from minibert.model.packing import Packed, pack
from minibert.train.config import TrainingConfig
from minibert.train.graphed import GraphedSteps
from minibert.train.guard import NonFiniteError
from minibert.train.loop import LOG, read_state
from minibert.train.optim import AdamW
from minibert.train.trainer import Data, Trainer, prepare
from tests import planted
from tests.children import child

TINY = BertConfig(
    vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=32,
)  # fmt: skip
CONFIG = TrainingConfig(
    max_steps=10, tokens_per_batch=64, max_seq_length=32, warmup_steps=3, learning_rate=2e-3, eval_tokens=64,
    logging_steps=5, eval_steps=10, save_steps=4, max_grad_norm=0.5,
)  # fmt: skip
INFINITE = "bert.encoder.layer.1.output.dense.weight"


class Run(NamedTuple):
    losses: list[float]
    norms: list[float]
    trainer: Trainer


@pytest.fixture(scope="module")
def data() -> Data:
    documents = read_documents(SHIPPED_TEXT)[:2]
    return prepare(documents, train_tokenizer(documents, TINY.vocab_size), CONFIG)


@pytest.fixture(scope="module")
def emulator() -> Any:
    pytest.importorskip("ml_dtypes")
    try:
        return backends.get("emulator")
    except BackendUnavailable as reason:
        pytest.skip(str(reason))


MakeTrainer = Callable[..., Trainer]


@pytest.fixture(scope="module")
def trainer(data: Data, emulator: Any, tmp_path_factory: pytest.TempPathFactory) -> MakeTrainer:
    def make(
        backend: Any = emulator, dtype: str = "float32", graph: bool = False, folder: Path | None = None
    ) -> Trainer:
        model = BertForMaskedLM(TINY, backend, dtype, CONFIG.seed)
        output = folder or tmp_path_factory.mktemp("run")
        return Trainer(model, data, replace(CONFIG, graph=graph), output)

    return make


def trained(run: Trainer) -> Run:
    steps = [record for kind, record in run.run() if kind == "step"]
    return Run([s["loss"] for s in steps], [s["grad_norm"] for s in steps], run)


@pytest.fixture(scope="module")
def whole(trainer: MakeTrainer) -> Callable[..., Run]:
    """Runs of all ten steps, each made once."""
    made: dict[tuple[Any, ...], Run] = {}

    def get(dtype: str = "float32", graph: bool = False) -> Run:
        if (dtype, graph) not in made:
            made[dtype, graph] = trained(trainer(dtype=dtype, graph=graph))
        return made[dtype, graph]

    return get


@pytest.fixture(scope="module")
def by_numpy(trainer: MakeTrainer) -> Run:
    run = trained(trainer("numpy"))
    assert len(run.losses) == 10 and max(run.norms) > CONFIG.max_grad_norm, "clipping is at work"
    return run


def assert_same_state(a: Trainer, b: Trainer) -> None:
    for one, other in ((a.model, b.model), (a.optimizer, b.optimizer)):
        states = one.state_dict(), other.state_dict()
        assert states[0].keys() == states[1].keys()
        for name, values in states[0].items():
            np.testing.assert_array_equal(values, states[1][name], err_msg=name)


# Losses.


@pytest.mark.parametrize("graph", [False, True])
def test_ten_steps_follow_numpy(by_numpy: Run, whole: Callable[..., Run], graph: bool) -> None:
    """Two layers, dropout, clipping, AdamW."""
    run = whole(graph=graph)
    np.testing.assert_allclose(run.losses, by_numpy.losses, rtol=0, atol=1e-4)
    np.testing.assert_allclose(run.norms, by_numpy.norms, rtol=1e-4)
    if graph:
        steps = run.trainer.graphed
        assert steps is not None and steps.replays == 10 - len(steps.recorded) > 0


@pytest.mark.parametrize("graph", [False, True])
def test_two_runs_are_bit_identical(whole: Callable[..., Run], trainer: MakeTrainer, graph: bool) -> None:
    first, second = whole(graph=graph), trained(trainer(graph=graph))
    assert first.losses == second.losses and first.norms == second.norms
    assert_same_state(first.trainer, second.trainer)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("graph", [False, True])
def test_16_bits_are_close(by_numpy: Run, whole: Callable[..., Run], dtype: str, graph: bool) -> None:
    """Logits, about 1 in size, are off by a few roundoffs of what is stored; a loss by twice as much at most."""
    run = whole(dtype, graph)
    difference = np.abs(np.subtract(run.losses, by_numpy.losses))
    assert 0 < difference.max() < 4 * PRECISIONS[dtype].roundoff
    for group in run.trainer.optimizer.groups:
        backend = group.params[0].backend
        assert group.param.dtype.name == group.grad.dtype.name == dtype
        assert group.master.dtype == group.exp_avg.dtype == group.exp_avg_sq.dtype == np.float32
        rounded = backend.numpy(group.master).astype(dtype_of(dtype))
        np.testing.assert_array_equal(backend.numpy(group.param).astype(float), rounded.astype(float))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_steps_below_a_roundoff_add_up(emulator: Any, dtype: str) -> None:
    """In the masters: the weights themselves would stay where they are for good."""
    weight = Parameter((64,), "ones", Place(emulator, dtype))
    weight.initialise(0, "weight", 1.0)
    lr = float(PRECISIONS[dtype].roundoff) / 16
    optimizer, seen = AdamW([weight], lr=lr, weight_decay=0.0), []
    for _ in range(40):
        weight.grad = emulator.asarray(np.ones(64), dtype=weight.dtype)
        optimizer.step()
        seen.append(float(weight.numpy()[7]))
    assert seen[2] == 1 and seen[-1] == pytest.approx(1 - 40 * lr, rel=0, abs=2 * PRECISIONS[dtype].roundoff)
    assert seen[-1] < 1 and sorted(seen, reverse=True) == seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_loaded_stay(emulator: Any, dtype: str) -> None:
    """Where the optimiser is there already, with weights of its own in float32."""
    model = BertForMaskedLM(TINY, emulator, dtype, seed=0)
    optimizer = AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    loaded = BertForMaskedLM(TINY, emulator, dtype, seed=1).state_dict()
    model.load_state_dict(loaded)
    ids = np.arange(24).reshape(2, 12) + 5
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for name, values in model.state_dict().items():
        np.testing.assert_array_equal(values.astype(float), loaded[name].astype(float), err_msg=name)


# Graphs.


def batches(shapes: list[list[int]]) -> Iterator[Packed]:
    rng = np.random.default_rng(0)
    for lengths in shapes:
        ids = rng.integers(5, TINY.vocab_size, sum(lengths))
        labels = np.where(rng.random(len(ids)) < 0.2, ids, -100)
        labels[0] = 7
        yield pack(TINY, ids, cu_seqlens=np.cumsum([0, *lengths]), labels=labels)


def stepwise(backend: Any, shapes: list[list[int]], graph: bool) -> tuple[list[float], GraphedSteps]:
    """Steps of GraphedSteps; without `graph` it never sees a shape twice, so that all runs op by op."""
    model = BertForMaskedLM(TINY, backend, seed=3).train()
    optimizer = AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    steps, losses = GraphedSteps(model, optimizer, 64), []
    for number, packed in enumerate(batches(shapes)):
        if not graph:
            steps.recorded.clear()
        optimizer.lr = 1e-3 * (number + 1) / len(shapes)
        loss, square_norm, recorded = steps.gradients(packed, number)
        losses.append(float(backend.numpy(loss)))
        optimizer.check_norm(square_norm)
        steps.update(recorded, square_norm)
    return losses, steps


def test_replays_have_the_bits_of_single_ops(emulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """New shapes in between, a pool that is trimmed, other lengths within a shape, learning rates that change."""
    monkeypatch.setattr(bert, "HEAD_ROWS", 2)  # a graph has the head whole
    a, also_a, b = [24, 20, 12], [10, 24, 22], [30, 17]
    shapes = [a, b, also_a, a, b, also_a, b, a]
    single, _ = stepwise(emulator, shapes, graph=False)
    replayed, steps = stepwise(emulator, shapes, graph=True)
    assert replayed == single
    assert [shape.longest for shape in steps.recorded] == [24, 30] and steps.replays == 6


def test_graphs_share_their_memory() -> None:
    """That of every further shape of batch is hardly more than the results that are held."""
    emulator = planted.emulator()  # of its own: with a graph that another test left alive they would share too

    def taken(shapes: list[list[int]]) -> int:
        gc.collect()
        emulator.pool.trim()
        before = emulator.driver.memory()[0]
        _, steps = stepwise(emulator, shapes, graph=True)
        emulator.pool.trim()
        assert len(steps.recorded) == len(set(map(max, shapes))) and steps.replays == len(steps.recorded)
        return before - emulator.driver.memory()[0]

    one, three = taken([[24, 20]] * 2), taken([[24, 20]] * 2 + [[30, 17]] * 2 + [[12, 20]] * 2)
    assert one < three < 1.1 * one


def test_other_backends_have_no_graphs(trainer: MakeTrainer) -> None:
    with pytest.raises(UserError, match="--graph: backend numpy has no graphs; expected cupy or emulator"):
        trainer("numpy", graph=True)


@pytest.mark.parametrize(("dtype", "graph"), [("float32", False), ("float32", True), ("bfloat16", True)])
def test_a_step_that_is_not_finite_updates_nothing(trainer: MakeTrainer, dtype: str, graph: bool) -> None:
    """And once its cause is mended, the run goes on as if nothing had been."""
    run, undisturbed = (trainer(dtype=dtype, graph=graph) for _ in range(2))
    for each in (run, undisturbed):
        for _ in range(3):
            each.train_step()
    weight = dict(run.model.named_parameters())[INFINITE].data
    kept = weight.copy()
    weight[2, 5] = np.inf
    with pytest.raises(NonFiniteError) as caught:
        run.train_step()
    message = str(caught.value)
    assert message.startswith("step 4: the loss is nan: first in op linear (call ") and "\n" not in message
    assert "its input weight was not finite before. Nothing was updated" in message
    weight[...] = kept
    assert run.step == run.optimizer.step_count == 3
    assert_same_state(run, undisturbed)
    assert run.train_step()["loss"] == undisturbed.train_step()["loss"]
    assert_same_state(run, undisturbed)


@pytest.mark.parametrize("graph", [False, True])
def test_memory_does_not_grow(trainer: MakeTrainer, emulator: Any, graph: bool) -> None:
    gc.collect()
    before = emulator.pool.used
    run = trainer(graph=graph)
    held = []
    for _ in range(8):
        run.train_step()
        gc.collect()
        emulator.pool.trim()
        held.append((emulator.pool.used, emulator.driver.memory()[0]))
    assert len(set(held[3:])) == 1, held
    del run
    gc.collect()
    assert emulator.pool.used == before


# State.


@pytest.mark.parametrize(("dtype", "graph"), [("float32", True), ("bfloat16", False), ("bfloat16", True)])
def test_resumed_to_the_bit(
    whole: Callable[..., Run], trainer: MakeTrainer, tmp_path: Path, dtype: str, graph: bool
) -> None:
    expected = whole(dtype, graph)
    cut, losses = trainer(dtype=dtype, graph=graph, folder=tmp_path), []
    for kind, record in cut.run():
        if kind == "step":
            losses.append(record["loss"])
            cut.stop = record["step"] == 6
    resumed = trainer(dtype=dtype, graph=graph, folder=tmp_path)
    resumed.resume(read_state(tmp_path))
    assert losses + trained(resumed).losses == expected.losses
    assert_same_state(resumed, expected.trainer)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_saved_loads_elsewhere(whole: Callable[..., Run], emulator: Any, dtype: str) -> None:
    run = whole(dtype, True).trainer
    stored = run.model.state_dict()
    assert {str(values.dtype) for values in stored.values()} == {dtype}
    assert json.loads((run.output / "config.json").read_text(encoding="utf-8"))["dtype"] == dtype
    elsewhere = BertForMaskedLM.from_pretrained(run.output, "numpy")
    here = BertForMaskedLM.from_pretrained(run.output, emulator, dtype)
    narrow = BertForMaskedLM.from_pretrained(run.output, emulator, "bfloat16")
    for name, values in stored.items():
        np.testing.assert_array_equal(elsewhere.state_dict()[name], values.astype(np.float32), err_msg=name)
        np.testing.assert_array_equal(here.state_dict()[name].astype(float), values.astype(float), err_msg=name)
    ids = np.arange(24).reshape(2, 12) + 5
    logits = elsewhere(ids).logits.numpy()
    for model, roundoff in ((here, PRECISIONS[dtype].roundoff), (narrow, PRECISIONS["bfloat16"].roundoff)):
        got = model(ids).logits.numpy().astype(np.float64)
        assert np.abs(got - logits).max() < 64 * roundoff * np.abs(logits).max()


# The command.


def test_pretrain_by_graphs_is_interrupted_and_resumed(emulator: Any, tmp_path: Path, root: Path) -> None:
    """By Ctrl-C as a terminal sends it: to the emulator's process as well."""
    text, output = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(SHIPPED_TEXT.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    minibert, environment = [sys.executable, "-m", "minibert", "pretrain"], {**os.environ, "PYTHONPATH": str(root)}
    words = [
        str(text), "--backend", "emulator", "--graph", "--layers", "1", "--hidden", "64", "--vocab-size", "200",
        "--tokens-per-batch", "64", "--max-seq-length", "32", "--log-every", "1", "--eval-every", "1000",
        "--steps", "500",
    ]  # fmt: skip
    command = [*minibert, *words, "--output", str(output)]
    with child(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not (output / LOG).is_file() or len((output / LOG).read_text(encoding="utf-8").splitlines()) < 5:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, err) == (130, ""), out + err
    stopped = read_state(output).progress["step"]
    assert 0 < stopped < 500 and f"stopped after step {stopped} of 500, and saved" in out
    again = [*minibert, "--output", str(output), "--resume", "--steps", str(stopped + 2)]
    finished = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=600)
    assert (finished.returncode, finished.stderr) == (0, ""), finished.stdout
    lines = [json.loads(line) for line in (output / LOG).read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, stopped + 3))
    assert read_state(output).config.graph
