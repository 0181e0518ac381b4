"""What memory a run takes is told before it: within 15 % of what is measured, and refused with what would fit.

Some configurations are small and always tried; `MINIBERT_ALL_MEMORY=1 pytest tests/train/test_memory.py -s` tries all
of them and prints the worst.
"""

from __future__ import annotations

import os
import shlex
import sys
import threading
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from minibert import backends
from minibert.cli import running
from minibert.data import SHIPPED_TEXT, read_documents, train_tokenizer
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import NAMED, BertConfig, ElectraConfig
from minibert.model.electra import ElectraForMaskedLM, ElectraForPreTraining
from minibert.train import saving
from minibert.train.config import TrainingConfig
from minibert.train.memory import Memory, Passes, available, available_to_process, parameters_of, predict, smaller
from minibert.train.trainer import Data, Trainer, prepare
from tests.idle_device import idle_backend
from tests.toy_tasks import FILES, command, make

ALLOWED = 0.15


class Run(NamedTuple):
    """What is trained, for two steps, evaluated and saved; `saving`: after the first too, in the second.

    Backend "idle" is the host side of cupy and of the emulator on a device that computes nothing.
    """

    backend: str
    layers: int
    channels: int
    inner: int
    vocabulary: int
    tokens: int
    recompute: bool = False
    dtype: str = "float32"
    saving: bool = False
    graph: bool = False  # for six steps, so that graphs are replayed


SMALL = [
    Run("numpy", 2, 64, 256, 500, 1024),
    Run("numpy", 1, 128, 256, 3000, 512),
    Run("numpy", 1, 128, 256, 3000, 512, saving=True),
    Run("numpy", 4, 64, 256, 500, 1024, recompute=True),
    Run("numba", 2, 64, 256, 500, 1024),
    Run("numba", 2, 64, 256, 500, 1024, dtype="bfloat16"),
    Run("numpy", 2, 64, 256, 500, 1024, dtype="float16"),
    Run("emulator", 1, 64, 128, 300, 256),
    Run("idle", 2, 64, 256, 500, 1024, dtype="bfloat16", saving=True),
    Run("idle", 2, 64, 256, 500, 1024, graph=True),
]
ALL = [
    *SMALL,
    Run("numba", 4, 128, 512, 1000, 1024),
    Run("numba", 2, 256, 1024, 8000, 1024),
    Run("numba", 2, 256, 1024, 8000, 1024, saving=True),
    Run("numba", 6, 64, 256, 1000, 4096),
    Run("numba", 4, 128, 512, 1000, 2048, recompute=True),
    Run("numba", 2, 128, 512, 1000, 2048, dtype="float64"),
    Run("numpy", 2, 256, 1024, 8000, 1024),
    Run("numpy", 6, 64, 256, 1000, 4096),
    Run("numpy", 2, 128, 512, 1000, 2048, dtype="float64"),
    *(
        shape._replace(backend=backend, dtype="bfloat16")
        for shape in (
            Run("", 4, 128, 512, 1000, 1024),
            Run("", 2, 256, 1024, 8000, 1024),
            Run("", 2, 256, 1024, 8000, 1024, saving=True),
            Run("", 6, 64, 256, 1000, 4096),
            Run("", 4, 128, 512, 1000, 2048, recompute=True),
        )
        for backend in ("numba", "numpy")
    ),
    Run("emulator", 2, 64, 256, 500, 512, dtype="bfloat16"),
    Run("emulator", 3, 64, 256, 500, 512, recompute=True, dtype="float16"),
    *(
        shape._replace(dtype=dtype, recompute=recompute)
        for shape in (
            Run("idle", 4, 128, 512, 1000, 2048),
            Run("idle", 4, 256, 1024, 500, 2048),
            Run("idle", 2, 256, 1024, 8000, 1024),
            Run("idle", 6, 64, 256, 1000, 4096),
            Run("idle", 12, 384, 1536, 8000, 4096),
            Run("idle", 12, 768, 3072, 8000, 4096),
            Run("idle", 4, 768, 3072, 8000, 256),
        )
        for dtype in ("float32", "bfloat16")
        for recompute in (False, True)
    ),
    Run("idle", 2, 256, 1024, 8000, 1024, dtype="float16", saving=True),
    Run("idle", 4, 256, 1024, 500, 2048, dtype="bfloat16", graph=True),
    Run("idle", 2, 256, 1024, 8000, 1024, graph=True),
]
CHOSEN = ALL if os.environ.get("MINIBERT_ALL_MEMORY") else SMALL


@cache
def data(vocabulary: int, tokens: int) -> Data:
    documents = read_documents(SHIPPED_TEXT)[: 12 if vocabulary > 5000 else 4]
    return prepare(documents, train_tokenizer(documents, vocabulary), config(tokens))


def config(tokens: int, recompute: bool = False, saving: bool = False, graph: bool = False) -> TrainingConfig:
    steps = 6 if graph else 2
    return TrainingConfig(
        max_steps=steps, tokens_per_batch=tokens, max_seq_length=128, eval_tokens=tokens,
        checkpoint_activations=recompute, save_steps=1 if saving else steps, graph=graph,
    )  # fmt: skip


def place_of(run: Run) -> Any:
    try:
        return idle_backend() if run.backend == "idle" else backends.get(run.backend)
    except backends.BackendUnavailable as error:
        pytest.skip(str(error))


def trainer(run: Run, folder: Path, place: Any) -> Trainer:
    text = data(run.vocabulary, run.tokens)
    bert = BertConfig(
        vocab_size=text.tokenizer.get_vocab_size(), hidden_size=run.channels, num_hidden_layers=run.layers,
        num_attention_heads=run.channels // 64, intermediate_size=run.inner, max_position_embeddings=128,
    )  # fmt: skip
    chosen = config(run.tokens, run.recompute, run.saving, run.graph)
    return Trainer(BertForMaskedLM(bert, place, run.dtype), text, chosen, folder)


def predicted(run: Run, made: Trainer) -> Memory:
    bert, masked = made.model.config, round(0.15 * run.tokens)
    passes = Passes(run.tokens, 1, masked, run.recompute, run.tokens, run.saving, run.graph)
    memory = predict(bert, passes, made.model.backend.name, run.dtype, parameters_of(bert))
    assert memory is not None
    return memory


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("run", CHOSEN, ids=lambda run: "-".join(map(str, run)))
def test_prediction_is_near_what_is_measured(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on = threading.Event()
    written = saving.write_checkpoint

    def held(output: Path, step: int, fill: Callable[[Path], Any]) -> Path:
        """What is written after the first step is not done before the second."""
        path = written(output, step, fill)
        assert step != 1 or on.wait(60)
        return path

    monkeypatch.setattr(saving, "write_checkpoint", held)
    data(run.vocabulary, run.tokens)
    place, on_device = place_of(run), run.backend in ("emulator", "idle")
    small = run._replace(tokens=256) if run.backend == "numpy" else run
    if not on_device:  # where modules and compiled code are not counted anyway
        list(trainer(small._replace(saving=False), tmp_path / "loaded", place).run())
    with place.peak_memory() as peak:
        made = trainer(run, tmp_path / "run", place)
        if not on_device:
            tracemalloc.reset_peak()
        for kind, record in made.run():
            if (kind, record["step"]) == ("step", 2):
                on.set()
        measured = peak()
    if run.graph:
        assert made.graphed is not None and made.graphed.replays
        measured += place.graph_pool.peak
    memory = predicted(run, made)
    off = memory.total / measured - 1
    print(
        f"{' '.join(map(str, run))}: predicted {memory.total / 1e6:.1f} MB, measured {measured / 1e6:.1f}, {off:+.1%}"
    )
    assert abs(off) < ALLOWED


@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_parameters_are_counted_before_there_are_any(name: str) -> None:
    bert, electra = NAMED[name], ElectraConfig.like(NAMED[name])
    for kind, one in ((BertForMaskedLM, bert), (ElectraForMaskedLM, electra), (ElectraForPreTraining, electra)):
        counted = kind(one, "numpy", initialise=False).num_parameters()
        assert parameters_of(one) == pytest.approx(counted, rel=0.02 if kind is not ElectraForPreTraining else 0.05)


def test_shorter_passes_come_before_recomputation() -> None:
    most = 300

    def fits(tried: Passes) -> bool:
        return tried.tokens // (4 if tried.recompute else 1) <= most

    assert smaller(Passes(1024, 2, 100), 200, fits) == Passes(256, 8, 25)
    assert smaller(Passes(1024, 2, 100), 512, fits) == Passes(1024, 2, 100, recompute=True)
    assert smaller(Passes(1024), 512, lambda tried: False) is None


def test_a_backend_that_nobody_has_counted_is_left_alone() -> None:
    assert predict(NAMED["tiny"], Passes(10), "mine", "float32", 10) is None


@pytest.mark.parametrize("dtype, recompute", [("float32", False), ("bfloat16", False), ("float16", True)])
def test_a_device_with_as_much_as_was_told_is_enough(dtype: str, recompute: bool, tmp_path: Path) -> None:
    """With a sixteenth more, for what sizes of blocks are rounded up."""
    run = Run("idle", 4, 128, 512, 1000, 2048, recompute, dtype)
    told = predicted(run, trainer(run, tmp_path / "told", idle_backend())).total
    list(trainer(run, tmp_path / "enough", idle_backend(told * 17 // 16)).run())
    with pytest.warns(UserWarning, match="step 1 ran out of memory: from here on .* in [24] parts"):
        list(trainer(run, tmp_path / "less", idle_backend(told * 3 // 4)).run())


def test_what_a_device_has_is_what_is_free_and_what_its_pool_holds() -> None:
    place = idle_backend(10_000_000)
    assert available(place) == 10_000_000
    kept, gone = place.empty((1_000_000,), "uint8"), place.empty((3_000_000,), "uint8")
    del gone  # its block stays
    assert place.driver.memory()[0] < 6_100_000 and available(place) == 10_000_000, kept
    assert available(backends.get("numpy")) == pytest.approx(available_to_process(), rel=0.5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system is asked on Linux")
def test_a_limit_of_the_process_counts() -> None:
    import resource

    free, before = available_to_process(), resource.getrlimit(resource.RLIMIT_AS)
    assert free is not None and free > 0
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 50_000_000, before[1]))
    try:
        limited = available_to_process()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert limited is not None and 0 < limited <= 50_000_000


def refused(
    free: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> list[str]:
    """The flags that are advised to a command that does not fit."""
    with monkeypatch.context() as patch:
        patch.setattr(running, "available", lambda place: free)
        assert command(patch, *arguments) == 2
    return advised(free, capsys)


def advised(free: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    *table, said = capsys.readouterr().err.splitlines()
    assert said.startswith("error: the run would take about ") and f"{free / 1e6:.1f} MB are free" in said, said
    assert ["together", said.split()[6]] in [row.split() for row in table], (table, said)
    return shlex.split(said.partition("the same updates fit with ")[2])


def test_commands_refuse_and_say_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toys = make(tmp_path, monkeypatch)
    capsys.readouterr()
    model = ["--layers", 1, "--hidden", 64, "--steps", 1, "--backend", "numpy", "--max-seq-length", 32,
             "--document-separator", "line", "--vocab-size", 200]  # fmt: skip
    for objective in ("mlm", "rtd"):
        output = tmp_path / objective
        run = ["pretrain", toys / "text.txt", "--output", output, *model, "--objective", objective]
        flags = refused(15_000_000, monkeypatch, capsys, *run, "--tokens-per-batch", 4096)
        assert flags[0] == "--tokens-per-batch" and int(flags[1]) * int(flags[3]) == 4096, flags
        assert not output.exists(), "nothing was begun"
        assert refused(1000, monkeypatch, capsys, *run) == []
        monkeypatch.setattr(running, "available", lambda place: 15_000_000)
        assert command(monkeypatch, *run, *flags) == 0
        capsys.readouterr()
    run = ["finetune", "classify", "--model", toys / "model", "--train", toys / FILES["classify"], "--backend", "numpy",
           "--num-train-epochs", 1, "--output", tmp_path / "tuned"]  # fmt: skip
    flags = refused(1_900_000, monkeypatch, capsys, *run, "--per-device-train-batch-size", 32)
    assert flags[0] == "--per-device-train-batch-size" and int(flags[1]) * int(flags[3]) == 32, flags
    monkeypatch.setattr(running, "available", lambda place: 1_900_000)
    assert command(monkeypatch, *run, *flags) == 0


def test_a_run_too_large_for_its_device_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toys = make(tmp_path, monkeypatch)
    capsys.readouterr()
    run = ["pretrain", toys / "text.txt", "--output", tmp_path / "run", "--layers", 2, "--hidden", 64, "--steps", 1,
           "--backend", "emulator", "--max-seq-length", 32, "--document-separator", "line", "--vocab-size", 200,
           "--dtype", "bfloat16", "--tokens-per-batch", 4096]  # fmt: skip
    emulator = place_of(Run("emulator", 1, 1, 1, 1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(emulator.driver, "total", 12_000_000)
        assert command(patch, *run) == 2
        flags = advised(emulator.device_memory(), capsys)
    assert flags[0] == "--tokens-per-batch" and int(flags[1]) * int(flags[3]) == 4096, flags
    assert not (tmp_path / "run").exists(), "nothing was begun"
    monkeypatch.setitem(backends._loaded, "emulator", idle_backend(13_000_000))
    assert command(monkeypatch, *run, *flags) == 0
    assert "in 2 parts" not in capsys.readouterr().err
    tune = ["finetune", "classify", "--model", toys / "model", "--train", toys / FILES["classify"], "--backend",
            "emulator", "--num-train-epochs", 1, "--output", tmp_path / "tuned"]  # fmt: skip
    monkeypatch.setitem(backends._loaded, "emulator", idle_backend(1_300_000))
    assert command(monkeypatch, *tune, "--per-device-train-batch-size", 32) == 2
    flags = advised(1_300_000, capsys)
    assert flags[0] == "--per-device-train-batch-size" and int(flags[1]) * int(flags[3]) == 32, flags
