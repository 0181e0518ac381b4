"""The deterministic mode: the same bits over runs and numbers of threads; without it `numpy` does not give them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bench import infer, step
from bench.timing import frame, harness, sides
from minibert import backends
from minibert.backends import Backend, BackendUnavailable, determinism, deterministic
from minibert.backends.blas import blas_threads, set_blas_threads
from minibert.cli import main
from minibert.data import SHIPPED_TEXT, SHIPPED_VOCABULARY
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import BertConfig
from minibert.model.packing import Packed, pack
from minibert.train.loop import read_state
from minibert.train.optim import AdamW, parameter_groups
from tests.small_steps import batch

pytestmark = pytest.mark.skipif(
    blas_threads() is None, reason="NumPy's BLAS is not the OpenBLAS of its wheel, whose threads can be set"
)
# wide enough that its products are cut among threads, both in forward and backward
WIDE = BertConfig(
    vocab_size=500, hidden_size=396, num_hidden_layers=1, num_attention_heads=4, intermediate_size=524,
    max_position_embeddings=64,
)  # fmt: skip
NARROW = BertConfig(
    vocab_size=301, hidden_size=36, num_hidden_layers=2, num_attention_heads=3, intermediate_size=101,
    max_position_embeddings=64,
)  # fmt: skip
# that OpenBLAS's partition changes the bits of, on its kernels for AVX2 or AVX-512
VARYING = [(37, 500, 101), (333, 777, 111), (64, 300, 300), (200, 1000, 203), (128, 384, 384)]


@contextmanager
def threads(place: Backend, count: int) -> Iterator[None]:
    before, blas = place.num_threads(), blas_threads() or 1
    place.set_num_threads(count)
    try:
        with place.finely_split():
            yield
    finally:
        place.set_num_threads(before)
        if not deterministic():
            set_blas_threads(blas)


def packed(config: BertConfig, lengths: tuple[int, ...]) -> Packed:
    made = batch(config.vocab_size, lengths=lengths)
    return pack(
        config, made.input_ids, token_type_ids=made.token_type_ids, position_ids=made.position_ids,
        labels=made.labels, cu_seqlens=made.cu_seqlens,
    )  # fmt: skip


def bits_of_three_steps(place: Backend, config: BertConfig, inputs: Packed) -> list[tuple[str, bytes]]:
    """Losses, gradients and, in the end, weights of training with dropout."""
    model = BertForMaskedLM(config, place, "float32", seed=1)
    model.train()
    optimizer = AdamW(parameter_groups(model, 0.01), lr=1e-3, max_grad_norm=1.0)
    found = []
    for number in range(3):
        model.step = number
        loss = model(inputs).loss
        found.append((f"loss {number}", place.numpy(loss.data).tobytes()))
        loss.backward()
        found += [(f"gradient {number} {name}", place.numpy(p.grad).tobytes()) for name, p in model.named_parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return found + [(f"weight {name}", value.tobytes()) for name, value in model.state_dict().items()]


@pytest.mark.parametrize(
    ("name", "config", "lengths", "on"),
    [
        ("numba", WIDE, (60, 64, 33, 1, 64) * 3, True),
        ("numba", WIDE, (60, 64, 33, 1, 64) * 3, False),
        ("numba", NARROW, (17, 30, 5, 1, 40), True),
        ("numpy", WIDE, (60, 64, 33), True),
    ],
    ids=["numba, wide", "numba, wide, without the mode", "numba, small", "numpy"],
)
def test_training_steps_have_the_same_bits_on_any_number_of_threads(
    name: str, config: BertConfig, lengths: tuple[int, ...], on: bool
) -> None:
    place, inputs, runs = backends.get(name), packed(config, lengths), []
    with determinism(on):
        for count in (1, 2, 3, 2):
            with threads(place, count):
                runs.append(bits_of_three_steps(place, config, inputs))
    assert len(runs[0]) > 50 and len({value for _, value in runs[0]}) > 50
    for other in runs[1:]:
        assert [part for part, same in zip(runs[0], other, strict=True) if part != same] == []


def test_without_the_mode_the_bits_of_numpy_s_products_hang_on_the_threads() -> None:
    """Else the tests beside this one would show nothing."""
    rng, before = np.random.default_rng(0), blas_threads() or 1
    varied, kept = [], []
    try:
        for m, k, n in VARYING:
            for dtype in (np.float32, np.float64):
                a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
                for on, found in ((False, varied), (True, kept)):
                    with determinism(on):
                        found.append(len({in_bits(a, b, count) for count in (1, 2, 3)}))
    finally:
        set_blas_threads(before)
    assert kept == [1] * len(kept)
    if max(varied) == 1:
        pytest.skip("this OpenBLAS gives the same bits on 1, 2 and 3 threads for every shape that was tried")
    assert max(varied) > 1


def test_without_the_mode_so_do_those_of_its_training_steps() -> None:
    place, inputs, runs = backends.get("numpy"), packed(WIDE, (60, 64, 33)), []
    for count in (1, 2):
        with threads(place, count):
            runs.append(bits_of_three_steps(place, WIDE, inputs))
    if runs[0] == runs[1]:
        pytest.skip("this OpenBLAS gives the same bits on 1 and 2 threads for every product of these steps")
    assert sum(a != b for a, b in zip(*runs, strict=True)) > len(runs[0]) // 2


def in_bits(a: np.ndarray, b: np.ndarray, count: int) -> bytes:
    with threads(backends.get("numpy"), count):
        return (a @ b).tobytes()


def test_blas_has_one_thread_while_the_mode_is_on_and_those_it_was_given_after() -> None:
    place, before = backends.get("numba"), blas_threads() or 1
    ours = place.num_threads()
    try:
        place.set_num_threads(2)
        with determinism():
            assert deterministic() and blas_threads() == 1 and place.num_threads() == 2
            assert "BLAS threads 1, deterministic" in backends.get("numpy").describe()
            place.set_num_threads(3)
            assert blas_threads() == 1 and place.num_threads() == 3
            assert backends.get("numpy").num_threads() == 3
            with determinism(False):
                assert not deterministic() and blas_threads() == 3
            assert deterministic() and blas_threads() == 1
        assert not deterministic() and blas_threads() == 3 and "deterministic" not in backends.get("numpy").describe()
        with pytest.raises(RuntimeError, match="within"), determinism():
            raise RuntimeError("within")
        assert not deterministic()
    finally:
        place.set_num_threads(ours)
        set_blas_threads(before)


def test_another_blas_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minibert.backends.blas.blas_threads", lambda: None)
    with pytest.raises(BackendUnavailable, match=r"needs the OpenBLAS of NumPy's wheel.*pip install"):
        backends.set_deterministic(True)
    assert not deterministic()
    backends.set_deterministic(False)


def test_the_numpy_backend_alone_does_not_need_numba(root: Path) -> None:
    code = (
        "import sys; from minibert import backends; place = backends.get('numpy'); backends.set_deterministic(True);"
        "print(place.describe().endswith('BLAS threads 1, deterministic)'), 'numba' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    assert done.stdout.split() == ["True", "False"], done.stderr


# ------------------------------------------------------------------------------------------------------------ commands


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["minibert", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_a_run_begun_deterministic_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, plain, run = (tmp_path / name for name in ("text.txt", "plain", "run"))
    text.write_text(SHIPPED_TEXT.read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    common = ["--layers", 1, "--hidden", 64, "--tokenizer", SHIPPED_VOCABULARY, "--max-seq-length", 32]
    begin = ["pretrain", text, *common, "--tokens-per-batch", 256, "--steps", 1, "--backend", "numba"]

    assert command(monkeypatch, *begin, "--output", plain) == 0
    assert "deterministic)" not in capsys.readouterr().out and not read_state(plain).options["deterministic"]
    assert command(monkeypatch, "pretrain", "--resume", "--output", plain, "--steps", 2, "--deterministic") == 2
    assert "the run began with deterministic False, got True" in capsys.readouterr().err

    assert command(monkeypatch, *begin, "--output", run, "--deterministic") == 0
    assert "deterministic)" in capsys.readouterr().out and read_state(run).options["deterministic"] is True
    assert not deterministic(), "the mode ends with the command"
    assert command(monkeypatch, "pretrain", "--resume", "--output", run, "--steps", 2) == 0
    assert "deterministic)" in capsys.readouterr().out and read_state(run).options["deterministic"] is True


@pytest.mark.usefixtures("smaller_tiny")
def test_compare_records_the_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "facts.json"
    words = ["compare", "--backends", "numba", "--steps", 2, "--tokens", 64, "--max-seq-length", 32]
    assert command(monkeypatch, *words, "--deterministic", "--json", file) == 0
    facts = json.loads(file.read_text())
    assert facts["config"]["deterministic"] is True and facts["backends"][0]["what"].endswith("deterministic)")
    assert not deterministic()


@pytest.mark.usefixtures("smaller_tiny")
@pytest.mark.parametrize("module", [step, infer], ids=["step", "infer"])
def test_benches_run_in_the_mode_and_record_it(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes, file = [], tmp_path / "facts.json"

    def measure(*given: object) -> dict[str, object]:
        modes.append(deterministic())
        return {}

    def between(
        names: list[str], run: Callable[..., dict[str, object]], notes: object
    ) -> tuple[dict[str, object], dict[str, object]]:
        modes.append(deterministic())
        return {name: run(name, print) for name in names}, {}

    def report(document: dict[str, Any], *others: object) -> int:
        file.write_text(json.dumps({name: document[name] for name in ("settings", "backends")}))
        return 0

    count = backends.get("numba").num_threads()
    monkeypatch.setenv(backends.THREADS, str(count))  # which the command sets: put back after the test
    monkeypatch.setattr(harness, "between_peaks", between)
    monkeypatch.setattr(harness, "add_memory", lambda *given: None)
    monkeypatch.setattr(sides, "report", report)
    monkeypatch.setattr(frame, "measure", measure)
    for given in ({}, {"deterministic": True}):
        options = (infer.Options if module is infer else frame.Options)(config="tiny", threads=count, **given)
        assert frame.run(module.BENCH, options) == 0
        document, on = json.loads(file.read_text()), bool(given)
        assert document["settings"]["deterministic"] is on
        assert document["backends"]["numba"].endswith("deterministic)") is on
        assert set(modes[1:]) == {on} and modes[0] is False, "the peaks are measured without it"
        modes.clear()
    child = {"side": "numba", "measure": next(iter(module.BENCH.measures))}
    task = frame.task_of(module.BENCH, options)
    make = module.one_step if module is step else module.one_pass
    with determinism(False):
        make({**child, "config": task.config.to_dict(), "task": task.given, "backends": []})
        assert deterministic(), "the process that measures memory runs in it too"
