"""The search for settings: spaces read, trials shared, ended early, gone on with; which weights are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.errors import UserError, pip_install
from minibert.tasks.search import STUDY, Search, Trial
from minibert.tasks.space import SEARCHED, Among, Between, read_space, usual_space
from minibert.train.checkpoint import checkpoints
from tests.toy_tasks import CONFIG, SHORT, run_of, scripted, the_log

pytest.importorskip("optuna", reason=f"needs optuna: {pip_install('[search]')}")
pytest.importorskip("sklearn.metrics", reason=f"needs scikit-learn: {pip_install('[tasks]')}")

SPACE = {"learning_rate": Between(1e-3, 1e-2, log=True), "weight_decay": Among((0.0, 0.1))}

# -------------------------------------------------------------------------------------------------------------- spaces


@pytest.mark.parametrize(
    ("text", "name", "values", "again"),
    [
        ("learning-rate=1e-5..1e-3:log", "learning_rate", Between(1e-5, 1e-3, log=True), "1e-05..0.001:log"),
        ("warmup_ratio=0..0.3", "warmup_ratio", Between(0.0, 0.3), "0.0..0.3"),
        ("lora-r=2..64:log", "lora_r", Between(2, 64, log=True), "2..64:log"),
        ("num-train-epochs=2, 3,4", "num_train_epochs", Among((2.0, 3.0, 4.0)), "2.0,3.0,4.0"),
        ("freeze=embeddings,layers:0-3", "freeze", Among(("embeddings", "layers:0-3")), "embeddings,layers:0-3"),
        ("freeze=|embeddings,layers:0", "freeze", Among(("", "embeddings,layers:0")), "|embeddings,layers:0"),
        ("class-weights=balanced,", "class_weights", Among(("balanced", "")), "balanced,"),
        ("target-modules=query,value|all-linear", "target_modules", Among(("query,value", "all-linear")), 
         "query,value|all-linear"),
    ],
)  # fmt: skip
def test_a_space_is_read_and_written(text: str, name: str, values: Any, again: str) -> None:
    space = read_space([text])
    assert space == {name: values} and type(space[name].ends[0]) is type(values.ends[0])
    assert str(values) == again and read_space([f"{name}={again}"]) == space


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["lr=1..2"], "--space: expected one of learning-rate, num-train-epochs, .*, got 'lr'"),
        (["seed=1,2"], "--space: expected one of .*, got 'seed'"),
        (["learning-rate"], "expected NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=VALUE,VALUE, got 'learning-rate'"),
        (["learning-rate="], "expected NAME=LOW..HIGH"),
        (["learning-rate=1..2", "learning_rate=3,4"], "learning-rate is there twice"),
        (["learning-rate=1e-3"], "learning-rate: expected two values or more, .*: .* an option, --learning-rate"),
        (["learning-rate=1e-3,0.001"], "expected two values or more, each once"),
        (["learning-rate=a,b"], "learning-rate: expected a number, got 'a'"),
        (["learning-rate=1..b"], "learning-rate: expected a number, got 'b'"),
        (["lora-r=1.5..3"], "lora-r: expected a whole number, got '1.5'"),
        (["learning-rate=2..1"], "expected LOW..HIGH or LOW..HIGH:log, LOW below HIGH"),
        (["learning-rate=1..2:lin"], "expected LOW..HIGH or LOW..HIGH:log"),
        (["weight-decay=0..1:log"], "with :log above 0, got '0..1:log'"),
        (["learning-rate=-1..1"], "learning-rate: expected learning_rate to be above 0, got -1.0"),
        (["learning-rate=nan..1"], "expected learning_rate to be above 0, got nan"),
        (["peft=lora,loha"], "peft: expected peft to be lora, .*, got loha"),
        (["warmup-ratio=0..2"], "expected warmup_ratio to be from 0 to 1, got 2.0"),
    ],
)
def test_a_space_that_is_none_is_refused(texts: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_space(texts)


def test_usual_spaces_are_spaces() -> None:
    for peft in ("", "lora"):
        space = usual_space(peft)
        assert read_space([f"{name}={values}" for name, values in space.items()]) == space
    assert all(hasattr(CONFIG, name) for name in SEARCHED)


# -------------------------------------------------------------------------------------------------------------- trials


def ran(trial: Trial, toys: Path, script: list[Any]) -> Trial:
    """A run of a trial whose evaluations are given."""
    for _ in trial.follow(scripted(toys, trial.folder, script)):
        pass
    return trial


def flat(value: float, loss: float = 1.0, epochs: int = 3) -> list[tuple[float, float]]:
    return [(0.99, 0.0), *[(value, loss)] * epochs]


def test_below_the_median_a_trial_ends_early_and_the_best_keeps_its_weights(toys: Path, tmp_path: Path) -> None:
    search = Search(tmp_path / "s", SPACE, "eval_accuracy")
    scripts = [flat(value) for value in (0.5, 0.6, 0.7, 0.8, 0.9)]
    scripts += [
        [(0.99, 0), (0.75, 1), (0.65, 1), (0.95, 1)],  # its best so far is above the median, then the last counts
        [(0.99, 0), (0.72, 1), (0.95, 1), (0.95, 1)],  # at once below it
        [(0.99, 0), (0.95, 1), (0.95, 0.5), (0.5, 1)],
        [(0.99, 0), (None, 1), (None, 1), (None, 1)],
    ]
    done = [ran(trial, toys, script) for trial, script in zip(search.trials(9), scripts, strict=True)]
    assert [trial.state for trial in done] == ["COMPLETE"] * 6 + ["PRUNED", "COMPLETE", "FAIL"]
    found = search.found
    assert [trial.value for trial in found] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.72, 0.95, None]
    assert found[5].intermediate_values == {1: 0.75, 2: 0.65, 3: 0.95} and found[6].intermediate_values == {1: 0.72}
    assert found[8].user_attrs["error"] == "eval_accuracy is not defined on such predictions"
    assert search.best is not None and search.best.number == 7, "as good as 5, of a lower loss"
    assert {path.relative_to(tmp_path / "s").as_posix() for path in tmp_path.rglob("*.safetensors")} == {
        "trial-7/model.safetensors"
    }
    assert all(len(the_log(trial.folder)) >= 2 for trial in done)
    assert not list((tmp_path / "s").glob("trial-*.lock"))


def test_of_losses_the_lowest_is_the_best_and_all_weights_may_be_kept(toys: Path, tmp_path: Path) -> None:
    search = Search(tmp_path / "s", SPACE, "eval_loss", prune=False, keep_all=True)
    for trial, loss in zip(search.trials(7), (5, 4, 3, 2, 1, 6, 7), strict=True):
        assert ran(trial, toys, flat(0.5, loss)).state == "COMPLETE", "not ended early"
    assert search.best is not None and search.best.number == 4
    trials = [tmp_path / "s" / f"trial-{number}" for number in range(7)]
    assert all((folder / "model.safetensors").is_file() and checkpoints(folder) for folder in trials)


def settings_of(folder: Path, count: int, seed: int = 0, at_once: int = 99) -> list[dict[str, Any]]:
    """The settings of so many trials, of which few have a study open `at_once`; what came of them is made up."""
    found: list[dict[str, Any]] = []
    while len(found) < count:
        search = Search(folder, SPACE, "eval_accuracy", seed)
        for trial in search.trials(min(count, len(found) + at_once)):
            found.append(trial.settings)
            trial.trial.set_user_attr("eval_loss", 1.0)
            trial.end("COMPLETE", trial.settings["learning_rate"])
            trial.release()
    return found


def test_the_same_seed_gives_the_same_trials_however_often_it_is_interrupted(tmp_path: Path) -> None:
    count = 13  # of which ten are drawn without regard to what came of the others
    whole = settings_of(tmp_path / "a", count)
    assert settings_of(tmp_path / "b", count, at_once=2) == whole
    assert settings_of(tmp_path / "c", 2, seed=1) != whole[:2]
    assert len({trial["learning_rate"] for trial in whole}) == count
    assert all(1e-3 <= trial["learning_rate"] <= 1e-2 and trial["weight_decay"] in (0, 0.1) for trial in whole)


@pytest.mark.parametrize("died", [False, True])
def test_a_trial_that_was_left_is_gone_on_with_as_if_it_had_not(died: bool, toys: Path, tmp_path: Path) -> None:
    def run(trial: Trial, stop: int = -1) -> Trial:
        config = replace(SHORT, save_steps=2, **trial.settings)
        going = run_of("classify", toys, trial.folder, config=config)
        for _ in trial.follow(going):
            if going.step == stop and died:
                trial.release()  # as the system does, with the process
                return trial
            going.stop = going.stop or going.step == stop
        return trial

    whole = Search(tmp_path / "whole", SPACE, "eval_accuracy")
    for trial in whole.trials(2):
        run(trial)
    first = Search(tmp_path / "cut", SPACE, "eval_accuracy").next_trial(2)
    assert first is not None and run(first, stop=5).state == "RUNNING"
    again = Search(tmp_path / "cut", SPACE, "eval_accuracy")
    done = [run(trial) for trial in again.trials(2)]
    assert [(trial.number, trial.settings) for trial in done] == [(n, whole.found[n].params) for n in (0, 1)]
    for number in (0, 1):
        one, other = whole.found[number], again.found[number]
        assert (one.value, one.intermediate_values) == (other.value, other.intermediate_values)
        assert the_log(whole.folder_of(number)) == the_log(again.folder_of(number))


def test_a_trial_that_died_before_its_first_state_begins_anew(toys: Path, tmp_path: Path) -> None:
    search = Search(tmp_path / "s", SPACE, "eval_accuracy")
    trial = search.next_trial(1)
    assert trial is not None
    trial.folder.mkdir()
    (trial.folder / "vocab.txt").write_text("a")
    trial.release()
    again = search.next_trial(1)
    assert again is not None and again.settings == trial.settings
    assert ran(again, toys, flat(0.5)).state == "COMPLETE"


def test_a_trial_that_nobody_has_any_more_is_free(toys: Path, tmp_path: Path) -> None:
    search = Search(tmp_path / "s", SPACE, "eval_accuracy")
    trial = search.next_trial(2)
    assert trial is not None and trial.number == 0
    other = search.next_trial(2)
    assert other is not None and other.number == 1
    assert not search.left(search.found[0])
    del trial
    assert search.left(search.found[0]) and not search.left(search.found[1])
    again = search.next_trial(2)
    assert again is not None and again.number == 0
    events = again.follow(scripted(toys, again.folder, flat(0.5)))
    next(events)
    events.close()
    assert again.state == "RUNNING"
    once_more = search.next_trial(2)
    assert once_more is not None and once_more.number == 0
    assert ran(once_more, toys, flat(0.5)).state == "COMPLETE" and search.next_trial(2) is None


def test_studies_that_are_open_at_once_share_the_trials(toys: Path, tmp_path: Path) -> None:
    studies = [Search(tmp_path / "s", SPACE, "eval_accuracy") for _ in range(2)]
    taken = [studies[number % 2].next_trial(4) for number in range(4)]
    assert [trial.number for trial in taken if trial] == [0, 1, 2, 3]
    assert studies[0].next_trial(4) is None, "none is left, and none of the others is taken away"
    for trial in taken:
        assert trial is not None
        ran(trial, toys, flat(0.1 * (trial.number + 1), epochs=1))
    assert [trial.value for trial in studies[0].found] == [trial.value for trial in studies[1].found]
    assert studies[0].next_trial(4) is None and not list((tmp_path / "s").glob("trial-*.lock"))


def test_a_trial_whose_numbers_are_not_finite_fails_and_others_go_on(toys: Path, tmp_path: Path) -> None:
    search = Search(tmp_path / "s", {"learning_rate": Among((1e30, 1e29))}, "eval_accuracy")
    for trial in search.trials(2):
        config = replace(SHORT, **trial.settings)
        for _ in trial.follow(run_of("classify", toys, trial.folder, config=config)):
            pass
        assert trial.state == "FAIL"
    assert all("the loss is nan: first in op " in trial.user_attrs["error"] for trial in search.found)
    assert search.best is None and not list(tmp_path.rglob("*.safetensors"))


def test_too_little_memory_is_a_failure_of_the_trial(toys: Path, tmp_path: Path) -> None:
    search = Search(tmp_path / "s", SPACE, "eval_accuracy")
    (trial,) = search.trials(1)
    run = scripted(toys, trial.folder, flat(0.5))

    def update() -> Any:
        raise MemoryError

    run.update = update  # type: ignore[method-assign]
    list(trial.follow(run))
    assert trial.state == "FAIL" and search.found[0].user_attrs["error"] == "out of memory"


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric": "eval_loss"}, "its search began with metric eval_accuracy, got eval_loss: give the same"),
        ({"seed": 1}, "its search began with seed 0, got 1"),
        ({"space": {"weight_decay": Among((0.0, 0.1))}}, "its search began with learning_rate .*:log, got None"),
        ({"about": {"task": "tag"}}, "its search began with task None, got tag"),
    ],
)
def test_another_search_in_the_same_folder_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    common: dict[str, Any] = {"space": SPACE, "metric": "eval_accuracy", "seed": 0}
    Search(tmp_path / "s", **common)
    Search(tmp_path / "s", **common)
    with pytest.raises(UserError, match=said):
        Search(tmp_path / "s", **{**common, **changes})


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty: name another"):
        Search(tmp_path, SPACE, "eval_accuracy")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("content", ["garbage\nmore\n", "{}\n{}\n", '"text"\n1\n'])
def test_a_damaged_study_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / STUDY).write_text(content)
    with pytest.raises(UserError, match=f"{STUDY} is no study, or is damaged"):
        Search(tmp_path, SPACE, "eval_accuracy")
    assert (tmp_path / STUDY).read_text() == content


def test_the_settings_of_a_trial_are_those_that_the_study_says(tmp_path: Path) -> None:
    search = Search(tmp_path / "s", {**SPACE, "lora_r": Between(2, 64, log=True)}, "eval_accuracy")
    trial = search.next_trial(1)
    assert trial is not None and trial.settings == search.found[0].params
    assert isinstance(trial.settings["lora_r"], int) and np.isfinite(trial.settings["learning_rate"])
