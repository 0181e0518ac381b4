"""Runs of fine-tuning: one that stopped goes on with the same bits, the best model is kept, early stopping."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.errors import UserError, pip_install
from minibert.model.checkpoint import read_arrays
from minibert.tasks.finetune import FineTuningConfig
from minibert.train.checkpoint import STATE, checkpoints, read_state
from tests.stopped_calls import failing
from tests.toy_tasks import CONFIG, SHORT, run_of, scripted, state_file, stopping, the_log, weights

pytest.importorskip("sklearn.metrics", reason=f"needs scikit-learn: {pip_install('[tasks]')}")
pytest.importorskip("seqeval.metrics", reason=f"needs seqeval: {pip_install('[tasks]')}")

# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.fixture(scope="module", params=["numpy", "numba"])
def straight(request: pytest.FixtureRequest, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("straight") / "run"
    run = run_of("regress", toys, folder, request.param, config=SHORT)
    assert run.model.config.hidden_dropout_prob > 0
    assert [record["step"] for kind, record in run.run() if kind == "step"] == list(range(1, 7))
    return request.param, folder


@pytest.mark.parametrize("step", range(7))
def test_a_run_stopped_at_any_step_goes_on_as_if_it_had_not(
    step: int, straight: tuple[str, Path], toys: Path, tmp_path: Path
) -> None:
    backend, folder = straight
    first = run_of("regress", toys, tmp_path / "run", backend, config=SHORT)
    list(stopping(first, step))
    assert first.step == step
    second = run_of("regress", toys, tmp_path / "run", backend, config=SHORT)
    second.resume(read_state(tmp_path / "run", FineTuningConfig))
    list(second.run())
    for place in (state_file, lambda output: output / "model.safetensors"):
        (one, _), (other, _) = (read_arrays(place(each)) for each in (folder, tmp_path / "run"))
        assert one.keys() == other.keys()
        assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    assert the_log(folder) == the_log(tmp_path / "run")


def test_other_examples_are_not_gone_on_with(toys: Path, tmp_path: Path) -> None:
    list(stopping(run_of("regress", toys, tmp_path / "run", config=SHORT), 1))
    other = run_of("regress", toys, tmp_path / "run", config=SHORT)
    other.validation = replace(other.validation, targets=1 + np.asarray(other.validation.targets))
    with pytest.raises(UserError, match="not those this run began with"):
        other.resume(read_state(tmp_path / "run", FineTuningConfig))


# ------------------------------------------------------------------------------------------------------ the best model


@pytest.mark.parametrize(
    ("script", "changes", "kept", "end"),
    [
        ([(0.1, 1), (0.5, 1), (0.7, 1), (0.6, 1)], {}, [0, 1, 2], 3),
        ([(0.9, 1), (0.5, 1), (0.6, 1), (0.5, 1)], {}, [0, 1, 2], 3),  # what an untrained head guesses is no result
        ([(0.5, 1), (0.5, 1), (0.5, 0.8), (0.5, 0.9)], {}, [0, 1, 2], 3),  # the same accuracy: the lower loss
        ([(None, 1), (None, 1), (None, 0.8), (None, None)], {}, [0, 1, 2], 3),
        ([(0.5, 1), (0.6, 0.5), (0.7, 0.6), (0.8, 0.7)], {"metric_for_best_model": "eval_loss"}, [0, 1], 3),
        ([(0.5, 1), (0.6, 0.5), (0.7, 0.6), (0.8, 0.7)], {"metric_for_best_model": "loss"}, [0, 1], 3),
        ([(0.5, 1), (0.6, 0.5), (0.7, 0.4)], {"metric_for_best_model": "matthews_correlation"}, [0, 1, 2], 2),
        ([(0.5, 1), (0.6, 1), (0.5, 1), (0.7, 1), (0.5, 1), (0.6, 1), (1, 1)],
         {"early_stopping_patience": 2}, [0, 1, 3], 5),
    ],
)  # fmt: skip
def test_the_best_model_is_at_the_top_not_the_last(
    script: Any, changes: Any, kept: list[int], end: int, toys: Path, tmp_path: Path
) -> None:
    run = scripted(toys, tmp_path / "run", script, **changes)
    at_step = {record["step"]: run.model.state_dict() for kind, record in run.run() if kind == "eval"}
    assert (run.kept, run.step, run.progress["best"]["step"]) == (kept, end, kept[-1])
    best, last = at_step[kept[-1]], at_step[end]
    top = weights(tmp_path / "run")
    assert all(np.array_equal(best[name], array) for name, array in top.items())
    assert kept[-1] == end or any(not np.array_equal(last[name], array) for name, array in top.items())
    assert run.ended_early == ("early_stopping_patience" in changes)


def test_a_run_that_ended_early_goes_on_only_with_more_patience(toys: Path, tmp_path: Path) -> None:
    script = [(0.5, 1), (0.6, 1), (0.5, 1), (0.5, 1), (0.5, 1), (0.9, 1)]
    for patience, stop, end in ((2, 2, 2), (2, 9, 3), (2, 9, 3), (4, 9, 5)):
        run = scripted(toys, tmp_path / "run", script, early_stopping_patience=patience)
        if (tmp_path / "run").exists():
            run.resume(read_state(tmp_path / "run", FineTuningConfig))
        list(stopping(run, stop))
        assert run.step == end and run.ended_early == (end == 3)
    whole = scripted(toys, tmp_path / "whole", script, early_stopping_patience=4)
    list(whole.run())
    assert all(np.array_equal(a, whole.model.state_dict()[name]) for name, a in run.model.state_dict().items())
    assert run.progress["best"] == {"step": 5, "eval_loss": 1, "eval_accuracy": 0.9}


def test_the_best_model_outlives_a_run_from_before_there_were_checkpoints(toys: Path, tmp_path: Path) -> None:
    """Its one state was at the top, beside the best model."""
    script = [(0.5, 1), (0.8, 1), (0.6, 1), (0.7, 1)]
    run = scripted(toys, tmp_path, script)
    at_step = {record["step"]: run.model.state_dict() for kind, record in stopping(run, 2) if kind == "eval"}
    state_file(tmp_path).rename(tmp_path / STATE)
    for checkpoint in checkpoints(tmp_path):
        shutil.rmtree(checkpoint)
    again = scripted(toys, tmp_path, script)
    again.resume(read_state(tmp_path, FineTuningConfig))
    list(again.run())
    assert again.step == 3 and not (tmp_path / STATE).exists()
    for folder in (tmp_path, checkpoints(tmp_path)[0]):
        assert all(np.array_equal(at_step[1][name], array) for name, array in weights(folder).items())


def test_the_best_model_outlives_a_write_that_failed(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in no checkpoint, and the next update changes it: it is kept until it is written."""
    failing(monkeypatch, 1, 2)
    script = [(0.5, 1), (0.8, 1), (0.6, 1), (0.7, 1)]
    run = scripted(toys, tmp_path, script, save_steps=1)
    with pytest.warns(UserWarning, match="the run goes on"):
        at_step = {record["step"]: run.model.state_dict() for kind, record in run.run() if kind == "eval"}
    for folder in (tmp_path, checkpoints(tmp_path)[0]):
        assert all((at_step[1][name] == array).all() for name, array in weights(folder).items())
    assert state_file(tmp_path).parent.name == "checkpoint-3"


def test_an_error_is_the_better_the_lower(toys: Path, tmp_path: Path) -> None:
    config = replace(SHORT, metric_for_best_model="mean_absolute_error")
    run = run_of("regress", toys, tmp_path / "run", config=config)
    errors = {r["step"]: r["eval_mean_absolute_error"] for kind, r in run.run() if kind == "eval" and r["step"]}
    assert run.progress["best"]["step"] == min(errors, key=lambda step: errors[step])


@pytest.mark.parametrize("kind", ["classify", "regress", "tag", "answer"])
def test_a_metric_that_is_none_is_refused_before_anything_is_written(kind: str, toys: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metric_for_best_model: expected one of loss, .*, got 'f2'"):
        run_of(kind, toys, tmp_path / "run", config=replace(CONFIG, metric_for_best_model="f2"))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_is_none_in_the_log(toys: Path, tmp_path: Path) -> None:
    run = run_of("regress", toys, tmp_path / "run", config=SHORT)
    run.validation = replace(run.validation, targets=np.full(12, 1e30, np.float32))
    with np.errstate(over="ignore"):
        list(stopping(run, 0))
    assert the_log(tmp_path / "run")[0]["eval_loss"] is None
