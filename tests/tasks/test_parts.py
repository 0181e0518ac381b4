"""Fine-tuning where memory runs out: each pass in parts, which draw the dropout of the whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minibert.errors import pip_install
from minibert.train.parts import PARTS, in_memory
from tests.tasks.test_finetune import gradients
from tests.toy_tasks import CONFIG, run_of
from tests.train.test_parts import little_memory

pytest.importorskip("sklearn.metrics", reason=f"needs scikit-learn: {pip_install('[tasks]')}")
pytest.importorskip("seqeval.metrics", reason=f"needs seqeval: {pip_install('[tasks]')}")


@pytest.mark.parametrize("peft", ["", "lora"])
@pytest.mark.parametrize("kind", ["classify", "several", "regress", "tag", "answer"])
def test_a_step_in_parts_is_the_step(kind: str, peft: str, toys: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, per_device_train_batch_size=6, peft=peft)
    runs = [run_of(kind, toys, tmp_path / str(n), "numba", "float64", config) for n in range(2)]
    loss, tokens = in_memory(runs[0])
    expected = gradients(runs[0])
    with little_memory(runs[1], 20), pytest.warns(UserWarning, match="in (2|4|8) parts"):
        assert in_memory(runs[1]) == (pytest.approx(loss, rel=1e-12), tokens)
    assert runs[1].progress[PARTS] > 1
    assert np.linalg.norm(gradients(runs[1]) - expected) < 1e-12 * np.linalg.norm(expected)
    runs[1].progress[PARTS] = 1
    runs[1].model.base_model.seed += 1  # other masks
    in_memory(runs[1])
    assert np.linalg.norm(gradients(runs[1]) - expected) > 1e-3 * np.linalg.norm(expected)


def test_dropout_of_what_is_tuned_cannot_be_cut(toys: Path, tmp_path: Path) -> None:
    run = run_of("classify", toys, tmp_path, config=replace(CONFIG, peft="lora", lora_dropout=0.1))
    with little_memory(run, 20), pytest.raises(MemoryError):
        in_memory(run)
    assert run.progress[PARTS] == 1


@pytest.mark.parametrize("kind", ["classify", "tag", "answer"])
def test_an_evaluation_in_parts_is_the_evaluation(kind: str, toys: Path, tmp_path: Path) -> None:
    run = run_of(kind, toys, tmp_path, "numpy", "float64", replace(CONFIG, tokens_per_batch=200))
    expected = run.evaluate()
    with little_memory(run, 40, training=False), pytest.warns(UserWarning, match="evaluation .* ran out of memory"):
        found = run.evaluate_and_log()
    assert run.eval_parts > 1 == run.progress[PARTS]
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)
