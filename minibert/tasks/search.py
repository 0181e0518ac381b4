"""The search for settings: a study of Optuna in a folder, whose trials are runs of fine-tuning.

    search = Search("folder", {"learning_rate": Between(1e-5, 1e-3, log=True)}, "eval_accuracy")
    for trial in search.trials(20):
        run = FineTuning(model, task, *data, tokenizer, replace(config, **trial.settings), trial.folder)
        for kind, record in trial.follow(run):
            print(trial.number, kind, record)
    print(search.best.params)

Several processes may have a folder open: each takes the trials that no other has. A trial whose process ended midway is
gone on with, from the state of its run, by whoever looks for the next one. Who has a trial is told by a lock on a file
of it, which the system gives free when the process ends in whatever way (Linux, macOS).
"""

from __future__ import annotations

import math
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minibert.errors import UserError, WriteError, pip_install
from minibert.tasks.finetune import FineTuning, FineTuningConfig, lower_is_better
from minibert.tasks.space import Space
from minibert.train.checkpoint import STATE, checkpoints, is_resumable, read_state, refuse_to_overwrite, remove
from minibert.train.guard import NonFiniteError
from minibert.train.lock import locked
from minibert.train.log import read_log
from minibert.train.loop import Kind, Record

STUDY = "study.journal"  # Optuna's file: a line for each thing that happened
LOCK = "study.lock"
NAME = "minibert"  # of the study in the file
STARTUP = 5  # trials that are never ended early: there is no median before
ABOUT, ERROR, LOSS = "about", "error", "eval_loss"  # attributes of a study, and of trials


def optuna_library() -> Any:
    """Optuna, which speaks only of what is wrong. Raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError(f"a search needs optuna: {pip_install('[search]')}") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class Search:
    """The study in a folder: begun there, or gone on with.

    `metric` is one that the log of a run has, as eval_accuracy; of losses and errors the lowest is the best. `about` is
    what else all trials have in common, as JSON takes it. The trials' settings are drawn by `seed` (TPE: Bergstra et
    al. (2011), "Algorithms for hyper-parameter optimization"): of one process always the same, whether it was
    interrupted or not. With `prune`, a trial ends after an epoch that is worse than the median of the trials
    before. Of finished trials the best one's weights are kept, or with `keep_all` all, and the states of their runs.

    Raises UserError for a folder with anything else in it, or with a study of another metric, space, or `about`.
    """

    def __init__(
        self, folder: str | Path, space: Space, metric: str, seed: int = 0, about: Mapping[str, Any] | None = None, *,
        prune: bool = True, keep_all: bool = False,
    ) -> None:  # fmt: skip
        self.optuna, self.folder, self.space = optuna_library(), Path(folder), space
        self.metric, self.seed, self.keep_all = metric, seed, keep_all
        known = {STUDY, LOCK}
        if not self.folder.is_dir() or not known & {path.name for path in self.folder.iterdir()}:
            refuse_to_overwrite(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.alone():
                self.study = self.open(prune)
        except OSError as error:
            raise WriteError(f"cannot write into {self.folder}: {error}; choose another --output") from None
        written = {name: str(values) for name, values in space.items()}
        self.refuse_another({"metric": metric, "seed": seed, **written, **(about or {})})

    def open(self, prune: bool) -> Any:
        optuna, path = self.optuna, str(self.folder / STUDY)
        journal = optuna.storages.journal
        pruners = optuna.pruners
        try:
            return optuna.create_study(
                storage=optuna.storages.JournalStorage(
                    journal.JournalFileBackend(path, lock_obj=journal.JournalFileOpenLock(path))
                ),
                study_name=NAME, load_if_exists=True, direction="minimize" if self.minimise else "maximize",
                pruner=pruners.MedianPruner(n_startup_trials=STARTUP) if prune else pruners.NopPruner(),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no study, or is damaged ({error}): name another --output") from None

    @property
    def minimise(self) -> bool:
        return lower_is_better(self.metric)

    def refuse_another(self, about: dict[str, Any]) -> None:
        with self.alone():
            began = self.study.user_attrs.get(ABOUT)
            if began is None:
                self.study.set_user_attr(ABOUT, about)
                return
        for name in [*about, *began]:
            if began.get(name) != about.get(name):
                raise UserError(
                    f"{self.folder}: its search began with {name} {began.get(name)}, got {about.get(name)}: "
                    "give the same, or another folder"
                )

    # --------------------------------------------------------------------------------------------------------- trials

    def trials(self, count: int) -> Iterator[Trial]:
        """The trials that are to be run here, until there are `count` in all, those of other processes among them."""
        while (trial := self.next_trial(count)) is not None:
            yield trial

    def next_trial(self, count: int) -> Trial | None:
        """One that was left midway, else a new one, if there are fewer than `count`."""
        states = self.optuna.trial.TrialState
        with self.alone():
            known = self.study.get_trials(deepcopy=False, states=[s for s in states if s != states.WAITING])
            for trial in known:
                if trial.state == states.RUNNING and (lock := self.take(trial.number)) is not None:
                    return self.begun(trial.number, lock, trial._trial_id)
            if len(known) >= count:
                return None
            trial = self.study.ask()
            lock = self.take(trial.number)
            assert lock is not None
            return self.begun(trial.number, lock, trial._trial_id)

    def begun(self, number: int, lock: int, trial_id: int) -> Trial:
        """A trial with its settings: those that it has already, or drawn now.

        By seed and number of the trial: how often the study was opened, and what was drawn before, has no part in it.
        """
        (seed,) = np.random.SeedSequence([self.seed, number]).generate_state(1)
        self.study.sampler = self.optuna.samplers.TPESampler(seed=int(seed))
        trial = self.optuna.trial.Trial(self.study, trial_id)  # of another process too
        return Trial(self, trial, lock, {name: values.suggest(trial, name) for name, values in self.space.items()})

    @property
    def found(self) -> list[Any]:
        """Optuna's record of each trial so far: number, state, params, value, user_attrs."""
        return self.study.get_trials(deepcopy=False)

    @property
    def best(self) -> Any | None:
        """The best of the trials that are complete, of equals the one of the lowest loss; None where none is."""
        complete = [trial for trial in self.found if trial.state == self.optuna.trial.TrialState.COMPLETE]
        sign = 1 if self.minimise else -1
        return min(complete, key=lambda t: (sign * t.value, t.user_attrs[LOSS], t.number), default=None)

    def folder_of(self, number: int) -> Path:
        return self.folder / f"trial-{number}"

    # ---------------------------------------------------------------------------------------------------------- locks

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process is in such a block."""
        lock = locked(self.folder / LOCK, wait=True)
        try:
            yield
        finally:
            assert lock is not None
            os.close(lock)

    def take(self, number: int) -> int | None:
        """The lock of a trial; None where another process holds it."""
        return locked(self.lock_of(number), wait=False)

    def left(self, trial: Any) -> bool:
        """Whether a trial was stopped midway, and nobody has gone on with it."""
        if trial.state != self.optuna.trial.TrialState.RUNNING:
            return False
        with self.alone():
            lock = self.take(trial.number)
            if lock is not None:
                os.close(lock)
        return lock is not None

    def lock_of(self, number: int) -> Path:
        return self.folder / f"trial-{number}.lock"

    def finish(self, trial: Trial, state: str, value: float | None = None) -> None:
        """Tell the study, and remove the weights that need not be kept."""
        with self.alone():
            self.study.tell(trial.trial, value, state=self.optuna.trial.TrialState[state])
            self.lock_of(trial.number).unlink()
            if self.keep_all:
                return
            best = self.best
            for each in self.found:
                folder = self.folder_of(each.number)
                if each.state.is_finished() and folder.is_dir():
                    of_best = best is not None and each.number == best.number
                    for checkpoint in checkpoints(folder):
                        remove(checkpoint)
                    for path in [folder / STATE] if of_best else folder.rglob("*.safetensors"):
                        path.unlink(missing_ok=True)


class Trial:
    """Settings to be tried, by a run of fine-tuning in the folder `folder`."""

    def __init__(self, search: Search, trial: Any, lock: int, settings: dict[str, Any]) -> None:
        self.search, self.trial, self.settings = search, trial, settings
        self.release = weakref.finalize(self, os.close, lock)  # at the latest when nobody has the trial any more
        self.number: int = trial.number
        self.folder = search.folder_of(self.number)
        self.state = "RUNNING"  # then COMPLETE, PRUNED or FAIL; RUNNING it stays where it was stopped
        if not is_resumable(self.folder):  # left before there was anything to go on with
            shutil.rmtree(self.folder, ignore_errors=True)

    def follow(self, run: FineTuning) -> Iterator[tuple[Kind, Record]]:
        """All that comes of the run, which goes on where it was left; the study is told of each epoch, and of the end.

        A number that is not finite, and too little memory, are failures of the trial. Where the run is stopped
        (`run.stop`), the trial is left for later.
        """
        try:
            if is_resumable(self.folder):
                run.resume(read_state(self.folder, FineTuningConfig))
                for record in read_log(self.folder):
                    self.report(record)
            for kind, record in run.run():
                yield kind, record
                if kind == "eval" and self.worse_than_others(run, record):
                    self.state, run.stop = "PRUNED", True
            if self.state == "PRUNED":
                self.end("PRUNED")
            elif run.step == run.max_steps and not run.unevaluated:
                self.complete(run.progress["best"])
        except (NonFiniteError, MemoryError) as error:
            self.fail(str(error) or "out of memory")
        finally:
            self.release()

    def report(self, record: Record) -> None:
        """Tell the metric after an epoch, once; the untrained model's is none of a trial."""
        value, epoch = record.get(self.search.metric), int(np.ceil(record.get("epoch", 0)))
        reported = self.search.study.get_trials(deepcopy=False)[self.number].intermediate_values
        if value is not None and epoch > 0 and epoch not in reported:
            self.trial.report(value, epoch)

    def worse_than_others(self, run: FineTuning, record: Record) -> bool:
        self.report(record)
        return 0 < run.step < run.max_steps and self.trial.should_prune()

    def complete(self, best: Record) -> None:
        """Tell what came of it: the metric after the best epoch, and the loss there."""
        value = best[self.search.metric]
        if value is None:
            self.fail(f"{self.search.metric} is not defined on such predictions")
            return
        self.trial.set_user_attr(LOSS, math.inf if best[LOSS] is None else best[LOSS])
        self.end("COMPLETE", value)

    def fail(self, why: str) -> None:
        self.trial.set_user_attr(ERROR, why)
        self.end("FAIL")

    def end(self, state: Literal["COMPLETE", "PRUNED", "FAIL"], value: float | None = None) -> None:
        self.state = state
        self.search.finish(self, state, value)
