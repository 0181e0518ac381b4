"""`minibert search`: which settings a model is fine-tuned best with, by trials on the validation examples."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import typer

from minibert import backends
from minibert.backends import Backend
from minibert.cli import app
from minibert.cli.compiling import show_compiling
from minibert.cli.finetune import MOVABLE, asked, begun, evaluation, finetune, make_run
from minibert.cli.legend import show
from minibert.cli.options import machine, notes, plain_table, takes_options_of
from minibert.cli.running import ended_by, fastest_or, say, stopped_by_signals
from minibert.cli.signals import ENDING
from minibert.errors import UserError
from minibert.tasks.search import ERROR, STUDY, Search, Trial, optuna_library
from minibert.tasks.space import Space, option, read_space, usual_space

KEPT = ("best", "all")
# Settings that not every model or file takes.
FITTED = (
    "max_seq_length", "freeze", "class_weights", "peft", "target_modules", "num_virtual_tokens",
    "gradient_accumulation_steps",
)  # fmt: skip
OF_ONE_RUN = ("context", "resume", "test", "group_column", "output")  # options of `finetune` that a search has not


@app.command()
@takes_options_of(finetune, *OF_ONE_RUN)
def search(
    context: typer.Context,
    output: Path = typer.Option(
        ..., help=f"Folder for the study ({STUDY}) and its trials; one with a study goes on with it."
    ),
    trials: int = typer.Option(20, min=1, help="Trials in all, those of earlier runs of the command among them."),
    space: list[str] = typer.Option(
        [],
        "--space",
        metavar="NAME=VALUES",
        show_default="learning rate, epochs and batch size, as it prints",
        help="What is searched, as learning-rate=1e-5..1e-3:log or num-train-epochs=2,3,4 (with | between values that "
        "hold commas). May be repeated. All else is as the options say.",
    ),
    jobs: int = typer.Option(
        1, min=1, max=64, help="Processes, among which the cores are divided; or each has --threads."
    ),
    prune: bool = typer.Option(
        True,
        "--prune/--no-prune",
        help="End a trial after an epoch that is worse than the median of the trials before.",
    ),
    keep: str = typer.Option("best", help="Whose weights are kept: best, or all."),
    worker: bool = typer.Option(False, "--worker", hidden=True),
    **of_finetune: Any,
) -> int:
    """Try settings of `finetune`, and name the best of them by the metric on validation examples.

    Stopped and given again, the command goes on where it was; started more than once, each takes the next trial. Each
    trial is a run of `minibert finetune` in OUTPUT/trial-N, with its log. The study is Optuna's: `optuna-dashboard
    OUTPUT/study.journal` shows it. By --seed the same trials come again, of one process.
    """
    optuna_library()
    if keep not in KEPT:
        raise UserError(f"--keep: expected {' or '.join(KEPT)}, got {keep!r}")
    options, settings = asked(of_finetune)
    searched = space_of(space, settings)
    refuse_unfit(options, settings, searched)
    context.with_resource(backends.determinism(bool(options["deterministic"])))
    place = fastest_or(options["backend"], of_finetune["threads"])
    tell = silent if worker else say

    first = {name: values.ends[0] for name, values in searched.items()}
    common, config = begun(options, {**settings, **first})
    place.require_dtype(common["dtype"])
    run = make_run(common, config, place, output, tell)  # what is amiss shows now, and what was found is said once
    about = {"task": common["task"], "data": run.fingerprint, **settings}
    about |= {name: value for name, value in common.items() if name not in MOVABLE and value is not None}
    if not worker:
        refuse_unfit_values(options, {**settings, **first}, searched, place)
    study = Search(output, searched, run.metric, config.seed, about, prune=prune, keep_all=keep == "all")
    tell(f"searching by {shown(run.metric)}, the {'lowest' if study.minimise else 'highest'} is the best; "
         f"seed {config.seed}; {trials} trials over {said(searched)}")  # fmt: skip
    tell(f"for Optuna's dashboard: optuna-dashboard {output / STUDY}")
    del run  # its weights
    if jobs > 1:
        status = in_processes(jobs, of_finetune["threads"])
    else:
        status = one_after_another(study, trials, options, settings, place, worker)
    if not worker:
        show_trials(study)
        say_what_is_best(study, status, options, settings)
    return status


def silent(text: str) -> None:
    """In place of `say`."""


def space_of(texts: Sequence[str], settings: Mapping[str, Any]) -> Space:
    """What --space says; else the usual space, less what is given."""
    if texts:
        return read_space(texts)
    return {name: values for name, values in usual_space(settings.get("peft", "")).items() if name not in settings}


def refuse_unfit(options: Mapping[str, Any], settings: Mapping[str, Any], space: Space) -> None:
    """Raise UserError for what is searched and given too, and for values that a run would refuse."""
    if not space:
        raise UserError("nothing is left to be searched: name it by --space NAME=VALUES, or leave options out")
    for name in space:
        if name in settings:
            raise UserError(f"--space {option(name)}: --{option(name)} is given too: leave one of the two out")
    first = {name: values.ends[0] for name, values in space.items()}
    for name, values in space.items():
        for value in values.ends:
            begun(options, {**settings, **first, name: value})


def refuse_unfit_values(options: Mapping[str, Any], settings: Mapping[str, Any], space: Space, place: Backend) -> None:
    """Raise UserError for what this model or these examples do not take: told now, and not in a trial."""
    for name in FITTED:
        for value in space[name].ends[1:] if name in space else ():
            try:
                make_run(*begun(options, {**settings, name: value}), place, Path(), silent)
            except UserError as error:
                raise UserError(f"--space {option(name)}: {error}") from None


# -------------------------------------------------------------------------------------------------------------- trials


def one_after_another(
    study: Search, count: int, options: Mapping[str, Any], settings: Mapping[str, Any], place: Backend, worker: bool
) -> int:
    """Run the trials that are to be run here. Gives the exit code: 130 where a signal ended it."""
    for trial in study.trials(count):
        say(f"trial {trial.number}: {settings_in_words(trial.settings)}")
        run = make_run(*begun(options, {**settings, **trial.settings}), place, trial.folder, silent)
        with stopped_by_signals(run), show_compiling(), nullcontext() if worker else notes.status("") as status:
            for kind, record in trial.follow(run):
                if kind == "eval":
                    say(f"trial {trial.number}, {evaluation(record)}")
                elif kind == "step" and status is not None:
                    status.update(
                        f"trial {trial.number}: step {record['step']} of {run.max_steps}, loss {record['loss']:.3f}"
                    )
        if trial.state == "RUNNING":
            say(f"trial {trial.number}: stopped after step {run.step} of {run.max_steps}, and saved")
            return ended_by(run)
        say(f"trial {trial.number}: {outcome(study, trial)}")
    return 0


def outcome(study: Search, trial: Trial) -> str:
    found = study.found[trial.number]
    if trial.state == "FAIL":
        return f"failed: {found.user_attrs[ERROR]}"
    if trial.state == "PRUNED":
        return "ended early: worse than the median of the trials before"
    return f"{shown(study.metric)} {found.value:.4f}"


def in_processes(jobs: int, threads: int | None) -> int:
    """The same command in so many processes. Gives the exit code; signals are handed on to all, which save and end.

    They are in sessions of their own: Ctrl-C on a terminal would reach them a second time.
    """
    each = threads or max(1, machine()["cores"] // jobs)
    command = [sys.executable, "-m", "minibert", *sys.argv[1:], "--jobs", "1", "--threads", str(each), "--worker"]
    workers = [subprocess.Popen(command, start_new_session=True) for _ in range(jobs)]

    stopped = 0

    def hand_on(number: int, frame: Any) -> None:
        nonlocal stopped
        stopped = 128 + number
        for worker in workers:
            worker.send_signal(number)

    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, hand_on)
    codes = [worker.wait() for worker in workers]
    by_signal = [code for code in codes if code - 128 in ENDING]
    wrong = [code for code in codes if code and code not in by_signal]
    if stopped or by_signal:
        return stopped or by_signal[0]
    if len(wrong) == jobs:  # else the others did what was left
        raise UserError(f"each of {jobs} processes ended with status {wrong[0]}: what they said stands above")
    return 0


# ------------------------------------------------------------------------------------------------------------- results


def show_trials(study: Search) -> None:
    names = list(study.space)
    table = plain_table("trial", "state", shown(study.metric), *map(option, names), "epochs done")
    for column in table.columns[2:]:
        column.justify = "right"
    for trial in study.found:
        best = study.best is not None and trial.number == study.best.number
        values = [in_words(trial.params[name]) if name in trial.params else "-" for name in names]
        value, epochs = "-" if trial.value is None else f"{trial.value:.4f}", len(trial.intermediate_values)
        state = "stopped" if study.left(trial) else trial.state.name.lower()
        table.add_row(f"{trial.number}{' *' * best}", state, value, *values, str(epochs))
    show(table, {"trial": "* is the best"})


def say_what_is_best(study: Search, status: int, options: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises UserError where every trial ended, and none is complete."""
    best, undone = study.best, [trial for trial in study.found if not trial.state.is_finished()]
    if status:
        say("stopped, and saved. To go on: the same command again")
    elif undone:
        say(f"trial {', '.join(str(trial.number) for trial in undone)} is not done: see the table; "
            "what was stopped the same command goes on with")  # fmt: skip
    elif best is None:
        failed = next(trial for trial in study.found if ERROR in trial.user_attrs)
        raise UserError(f"no trial was completed: trial {failed.number}: {failed.user_attrs[ERROR]}")
    if best is not None:
        folder = study.folder_of(best.number)
        say(f"the best model, of trial {best.number}, is in {folder}: {shown(study.metric)} {best.value:.4f}")
        say(f"the same again: {command_of(options, settings, best.params, f'{folder}-again')}")


def command_of(options: Mapping[str, Any], settings: Mapping[str, Any], found: Mapping[str, Any], output: str) -> str:
    """The command line that repeats a trial, in full digits."""
    words = ["minibert", "finetune", options["task"]]
    given = {**options, **settings, **found, "output": output}
    for name, value in given.items():
        if value is True:
            words.append(f"--{option(name)}")
        elif name != "task" and value is not None and value is not False and value != "":
            words += [f"--{option(name)}", str(value)]
    return shlex.join(words)


def said(space: Space) -> str:
    return ", ".join(f"{option(name)} {values}" for name, values in space.items())


def settings_in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{option(name)} {in_words(value)}" for name, value in settings.items())


def in_words(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value) or "none"


def shown(metric: str) -> str:
    return metric.removeprefix("eval_").replace("_", " ")
