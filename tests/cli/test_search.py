"""`minibert search`: what it prints and keeps, stopped and given again, several processes, mistakes in one line."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minibert.errors import pip_install
from minibert.tasks.finetune import FineTuning
from minibert.tasks.search import STUDY
from tests.toy_tasks import FILES, command, make, the_log, weights

optuna = pytest.importorskip("optuna", reason=f"needs optuna: {pip_install('[search]')}")
pytest.importorskip("sklearn.metrics", reason=f"needs scikit-learn: {pip_install('[tasks]')}")

Command = Callable[..., tuple[int, list[str]]]
SPACE = ("--space", "learning-rate=1e-3..1e-2:log", "--space", "num-train-epochs=1,2")


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as cli:
        return make(tmp_path_factory.mktemp("toys"), cli)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """A command's exit code and the lines that it prints."""

    def run(*arguments: object) -> tuple[int, list[str]]:
        code = command(monkeypatch, *arguments)
        return code, capsys.readouterr().out.splitlines()

    return run


def searching(toys: Path, output: Path, *more: object) -> tuple[object, ...]:
    files = "--model", toys / "model", "--train", toys / FILES["classify"], "--output", output
    return "search", "classify", *files, "--backend", "numpy", *more


def study_in(folder: Path) -> Any:
    backend = optuna.storages.journal.JournalFileBackend(str(folder / STUDY))
    return optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))


def test_trials_are_told_and_the_best_is_repeated_by_the_command_that_it_names(
    ran: Command, toys: Path, tmp_path: Path
) -> None:
    code, out = ran(*searching(toys, tmp_path / "s", "--trials", 3, *SPACE, "--weight-decay", 0.1))
    assert code == 0
    over = "3 trials over learning-rate 0.001..0.01:log, num-train-epochs 1.0,2.0"
    assert f"searching by accuracy, the highest is the best; seed 0; {over}" in out
    assert f"for Optuna's dashboard: optuna-dashboard {tmp_path / 's' / STUDY}" in out
    study = study_in(tmp_path / "s")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    rows = [line.split() for line in out if line[1:2].isdigit()]
    for trial, row in zip(study.trials, rows, strict=True):
        value, rate, epochs, done = row[-4:]
        assert row[0] == str(trial.number) and "complete" in row
        assert (float(value), float(rate)) == pytest.approx((trial.value, trial.params["learning_rate"]), rel=1e-3)
        assert float(epochs) == float(done) == trial.params["num_train_epochs"]
    kept = [path.parent for path in tmp_path.rglob("*.safetensors")]
    assert len(kept) == 1 and out[-2].startswith(f"the best model, of trial {kept[0].name.removeprefix('trial-')}, is")

    assert out[-1].startswith("the same again: minibert finetune classify --model ")
    again = shlex.split(out[-1].partition("minibert ")[2])
    assert "0.1" in again[again.index("--weight-decay") + 1]
    assert ran(*again)[0] == 0
    output = Path(again[again.index("--output") + 1])
    assert the_log(output) == the_log(kept[0])
    assert all(array.tobytes() == weights(kept[0])[name].tobytes() for name, array in weights(output).items())

    code, once_more = ran(*searching(toys, tmp_path / "s", "--trials", 3, *SPACE, "--weight-decay", 0.1))
    assert code == 0 and once_more[-2:] == out[-2:] and not any(line.startswith("trial 0:") for line in once_more)


def test_ctrl_c_leaves_a_trial_that_the_same_command_goes_on_with(
    ran: Command, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = searching(
        toys, tmp_path / "s", "--trials", 2, "--space", "learning-rate=1e-3..1e-2:log", "--num-train-epochs", 2
    )
    train_step = FineTuning.train_step

    def interrupted(run: FineTuning) -> Any:
        if run.output.name == "trial-1" and run.step + 1 == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(run)

    with monkeypatch.context() as patched:
        patched.setattr(FineTuning, "train_step", interrupted)
        code, out = ran(*words)
    assert code == 130 and "trial 1: stopped after step 2 of 6, and saved" in out
    assert "stopped, and saved. To go on: the same command again" in out
    assert [line.split()[:2] for line in out if line[1:2] == "1"] == [["1", "stopped"]]
    code, out = ran(*words)
    assert code == 0 and [trial.state.name for trial in study_in(tmp_path / "s").trials] == ["COMPLETE"] * 2
    assert [record["step"] for record in the_log(tmp_path / "s" / "trial-1")] == [0, 3, 6, 6]


def test_without_a_space_the_usual_is_printed_less_what_is_given(ran: Command, toys: Path, tmp_path: Path) -> None:
    more = ("--trials", 1, "--peft", "lora", "--num-train-epochs", 1, "--metric-for-best-model", "eval_loss")
    code, out = ran(*searching(toys, tmp_path / "s", *more))
    over = "1 trials over learning-rate 0.0001..0.003:log, per-device-train-batch-size 8,16,32"
    assert code == 0 and f"searching by loss, the lowest is the best; seed 0; {over}" in out
    assert study_in(tmp_path / "s").direction.name == "MINIMIZE"
    assert (tmp_path / "s" / "trial-0" / "adapter_model.safetensors").exists()


def test_processes_share_the_trials_and_what_one_left_another_goes_on_with(
    toys: Path, tmp_path: Path, root: Path
) -> None:
    """One is killed in the middle of a trial; two others, of one command, do the rest."""
    more = ("--trials", 3, "--keep", "all", "--num-train-epochs", 8, "--per-device-train-batch-size", 2, *SPACE[:2])
    minibert = [sys.executable, "-m", "minibert", *map(str, searching(toys, tmp_path / "s", *more))]
    killed, began = subprocess.Popen(minibert, stdout=subprocess.DEVNULL, cwd=root), time.monotonic()
    while not list((tmp_path / "s" / "trial-0").glob("checkpoint-*")):
        assert time.monotonic() < began + 60 and killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert study_in(tmp_path / "s").trials[0].state.name == "RUNNING"
    done = subprocess.run([*minibert, "--jobs", "2"], capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [trial.state.name for trial in study_in(tmp_path / "s").trials] == ["COMPLETE"] * 3
    assert len(list((tmp_path / "s").glob("trial-*/model.safetensors"))) == 3
    assert done.stdout.count("searching by accuracy") == 1 and done.stdout.count("the best model, of trial") == 1
    assert not list((tmp_path / "s").glob("trial-*.lock"))


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--space lr=1..2", "--space: expected one of learning-rate,"),
        ("--space learning-rate=2..1", "--space learning-rate: expected LOW..HIGH"),
        ("--space learning-rate=1e-5,1e-4 --learning-rate 1e-3", "--learning-rate is given too: leave one of the two"),
        ("--space lora-r=2..8", "--lora-r: expected with --peft lora or adalora"),
        ("--space peft=lora,prefix --lora-r 4", "--lora-r: expected with --peft lora or adalora"),
        ("--space max-seq-length=16,64", "expected max_seq_length of at most 48, the model's positions, got 64"),
        ("--space freeze=layers:0,layers:7", "freeze: expected layers from 0 to 0, got layers:7"),
        ("--learning-rate 1e-3 --num-train-epochs 1 --per-device-train-batch-size 4", "nothing is left to be searched"),
        ("--keep some", "--keep: expected best or all, got 'some'"),
        ("--trials 0", "Invalid value for '--trials'"),
        ("--metric-for-best-model f2", "metric_for_best_model: expected one of loss, accuracy,"),
        ("--resume", "No such option: --resume"),
        ("--test TOYS/classify.csv", "No such option: --test"),
        ("--label-column no", "has no column 'no' (--label-column)"),
        ("--output TOYS", "is not empty: name another"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_begun(
    arguments: str, said: str, refused: Callable[..., str], toys: Path, tmp_path: Path
) -> None:
    words = arguments.replace("TOYS", str(toys)).split()
    assert said in refused(*searching(toys, tmp_path / "s"), *words)
    assert not (tmp_path / "s").exists()


def test_another_task_or_metric_in_the_same_folder(
    ran: Command, refused: Callable[..., str], toys: Path, tmp_path: Path
) -> None:
    assert ran(*searching(toys, tmp_path / "s", "--trials", 1, *SPACE))[0] == 0
    for more, said in (
        (("--metric-for-best-model", "f1_macro"), "began with metric eval_accuracy, got eval_f1_macro: give the same"),
        (("--seed", 4), "began with seed 0, got 4"),
        (("--weight-decay", 0.2), "began with weight_decay None, got 0.2"),
        (("--label-column", "group"), "its search began with "),
    ):
        assert said in refused(*searching(toys, tmp_path / "s", *SPACE, *more))
    regress = ("--model", toys / "model", "--train", toys / FILES["regress"], "--output", tmp_path / "s", *SPACE)
    assert "began with metric eval_accuracy, got eval_pearson" in refused(
        "search", "regress", *regress, "--backend", "numpy"
    )


def test_optuna_that_is_missing_is_named(
    refused: Callable[..., str], toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "a search needs optuna: pip install 'minibert-lab[search]'" in refused(*searching(toys, tmp_path / "s"))


def test_a_search_of_which_every_trial_fails_says_why(refused: Callable[..., str], toys: Path, tmp_path: Path) -> None:
    more = ("--trials", 2, "--space", "learning-rate=1e29,1e30", "--num-train-epochs", 2)
    assert "no trial was completed: trial 0: step 2: the loss is nan" in refused(
        *searching(toys, tmp_path / "s", *more)
    )
