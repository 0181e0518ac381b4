"""N steps are k steps, a stop, and N - k steps after `--resume`: the same bits in weights, moments, log and model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.errors import pip_install
from minibert.tasks.finetune import FineTuning, FineTuningConfig
from minibert.train.checkpoint import read_state
from minibert.train.config import OptimizationConfig, TrainingConfig
from minibert.train.loop import Loop
from minibert.train.trainer import Data, Trainer
from minibert.tuning import AdaLoraConfig, LoraConfig
from tests.tiny_runs import result, tiny_data, trainer
from tests.toy_tasks import CONFIG, run_of

pytest.importorskip("sklearn.metrics", reason=f"needs scikit-learn: {pip_install('[tasks]')}")

HERE = {status.name for status in backends.available() if status.backend}
# Dropout is on in all of them, masks are drawn, and every setting that enters a step is in one of them.
PRETRAINING: dict[str, dict[str, Any]] = {
    "plain": {},
    "passes that are summed, whole words": {"gradient_accumulation_steps": 3, "whole_word_mask": True},
    "layers that are computed again, no warm-up": {"checkpoint_activations": True, "warmup_steps": 0},
    "lora": {"peft": LoraConfig(r=2, lora_dropout=0.2)},
    "adalora": {"peft": AdaLoraConfig(init_r=4, target_r=2, total_step=6, tfinal=1, lora_dropout=0.1)},
}
# On the emulator, where a step is slow, those with a state of their own: in 16 bits weights are kept in 32 as well.
PLACES = [
    *((backend, "float32", what) for backend in ("numpy", "numba") for what in PRETRAINING),
    ("numpy", "float64", "plain"), ("emulator", "float32", "plain"), ("emulator", "bfloat16", "lora"),
    ("emulator", "float16", "passes that are summed, whole words"), ("numba", "bfloat16", "plain"),
    ("numpy", "float16", "lora"),
]  # fmt: skip
FINE_TUNING: dict[str, tuple[str, dict[str, Any]]] = {
    "passes that are summed, shuffled each epoch": ("regress", {}),
    "early stopping": ("classify", {"early_stopping_patience": 1, "learning_rate": 0.05, "num_train_epochs": 9}),
    "lora": ("tag", {"peft": "lora", "lora_dropout": 0.1, "class_weights": "balanced"}),
    "layers that are frozen, or learn less": ("answer", {"freeze": "embeddings", "layerwise_lr_decay": 0.5}),
}


@pytest.fixture(scope="module")
def tiny() -> Data:
    return tiny_data()


def compare(begin: Callable[[Path], Loop], folder: Path, kind: type[OptimizationConfig], steps: list[int]) -> Loop:
    """Stop a run after each of these steps; resumed at last, it must be as one that was left alone, which is given."""
    whole = begin(folder / "whole")
    list(whole.run())
    for number, step in enumerate(steps):
        run = begin(folder / "stopped")
        if number:
            run.resume(read_state(folder / "stopped", kind))
        for _ in run.run():
            run.stop = run.step >= step
        assert run.step == step
    last = begin(folder / "stopped")
    last.resume(read_state(folder / "stopped", kind))
    list(last.run())
    assert whole.step == last.step > steps[-1]
    assert result(folder / "stopped", kind) == result(folder / "whole", kind)
    return whole


@pytest.mark.parametrize(("backend", "dtype", "what"), PLACES)
def test_pretraining(backend: str, dtype: str, what: str, tiny: Data, tmp_path: Path) -> None:
    if backend not in HERE:
        pytest.skip(f"{backend} does not run here")
    settings = {"max_steps": 6, "logging_steps": 4, "eval_steps": 3, "save_steps": 4, **PRETRAINING[what]}
    whole = compare(
        lambda folder: trainer(tiny, folder, backend, dtype, **settings), tmp_path, TrainingConfig, [1, 5]
    )  # fmt: skip
    assert whole.step == 6


@pytest.mark.parametrize("what", FINE_TUNING)
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_fine_tuning(backend: str, what: str, toys: Path, tmp_path: Path) -> None:
    task, changes = FINE_TUNING[what]
    settings = {"num_train_epochs": 3, "logging_steps": 4, "save_steps": 3, **changes}
    config = replace(CONFIG, **settings)
    whole = compare(
        lambda folder: run_of(task, toys, folder, backend, config=config), tmp_path, FineTuningConfig, [2, 7]
    )  # fmt: skip
    assert isinstance(whole, FineTuning)
    assert whole.ended_early == (what == "early stopping")


@pytest.mark.parametrize(
    ("before", "after", "dtype", "apart"),
    [
        ("numpy", "numba", "float64", 1e-11),
        ("numba", "numpy", "float64", 1e-11),
        ("numba", "emulator", "float32", 1e-3),
    ],
)
def test_another_backend_goes_on_up_to_rounding(
    before: str, after: str, dtype: str, apart: float, tiny: Data, tmp_path: Path
) -> None:
    """Batches, masks and dropout are the same: with others, two steps would go elsewhere altogether."""
    if {before, after} - HERE:
        pytest.skip(f"{before} and {after} do not both run here")

    def begun(folder: Path, backend: str) -> Trainer:
        return trainer(tiny, tmp_path / folder, backend, dtype, max_steps=4, save_steps=2)

    def weights(run: Loop) -> np.ndarray:
        return np.concatenate([array.ravel() for array in run.model.state_dict().values()]).astype(np.float64)

    straight = begun(Path("straight"), before)
    for _ in straight.run():
        pass
    run = begun(Path("moved"), before)
    for _ in run.run():
        run.stop = run.step >= 2
    at_stop = weights(run)
    moved = begun(Path("moved"), after)
    moved.resume(read_state(tmp_path / "moved"))
    for _ in moved.run():
        pass
    found, expected = weights(moved) - at_stop, weights(straight) - at_stop
    assert moved.step == 4 and np.linalg.norm(found - expected) < apart * np.linalg.norm(expected)
