"""What commands that train share: the backend, signals, and how a run is shown."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from minibert import backends
from minibert.backends import Backend, BackendUnavailable
from minibert.cli.compiling import show_compiling
from minibert.cli.options import console, notes, plain_table
from minibert.cli.signals import handled
from minibert.errors import Interrupted, UserError
from minibert.kernels import Op
from minibert.lab.conform.own_kernels import TriedKernel, refuse_uncalled
from minibert.train.checkpoint import megabytes
from minibert.train.config import OptimizationConfig
from minibert.train.loop import Loop, Record
from minibert.train.memory import Memory, Passes, available, smaller
from minibert.train.weights_and_biases import FOLDER as OFFLINE_RUNS

TENSORBOARD = typer.Option(
    None, "--tensorboard/--no-tensorboard", help="Log into event files too: tensorboard --logdir OUTPUT."
)
WANDB = typer.Option(
    None, "--wandb", metavar="PROJECT",
    help="When it ends, write the log as an offline run of this project of Weights & Biases too, in OUTPUT/wandb.",
)  # fmt: skip
STOPPED_BY: WeakKeyDictionary[Loop, int] = WeakKeyDictionary()  # runs, and the signals that did it
SAVE_ERRORS_HELP = "Where a checkpoint cannot be written: report, and go on; or fatal. The last one always is."
FASTEST_FIRST = ("cupy", "numba", "numpy")
Config = TypeVar("Config", bound=OptimizationConfig)


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def fastest_or(name: str | None, threads: int | None) -> Backend:
    """The backend called `name`, else the fastest that runs here."""
    if threads is not None:
        backends.set_num_threads(threads)
    if name is not None:
        return backends.get(name)
    for candidate in FASTEST_FIRST:
        if candidate in backends.names():
            try:
                return backends.get(candidate)
            except BackendUnavailable as error:
                if candidate != "cupy" or find_spec("cupy"):  # most machines have no GPU: that is no news
                    notes.print(str(error), markup=False, highlight=False, soft_wrap=True)
    raise UserError("no backend runs here: see minibert backends")


def say_views(options: Mapping[str, Any], output: Path) -> None:
    """What shows the log in another form, where one was asked for."""
    if options["tensorboard"]:
        say(f"for TensorBoard: tensorboard --logdir {output}")
    if options["wandb"]:
        say(f"for Weights & Biases, when the run has ended: wandb sync {output / OFFLINE_RUNS}/offline-run-*")


def merged(stored: Config, settings: Mapping[str, Any], changeable: Collection[str]) -> Config:
    """A resumed run's config. Raises UserError for a setting that is not the one the run began with."""
    refuse_changes(vars(stored), settings, changeable)
    return replace(stored, **settings)


def resumed(stored: Mapping[str, Any], given: Mapping[str, Any], movable: Collection[str]) -> dict[str, Any]:
    """A resumed run's other options. What is `movable` may be given anew: the same files may be at another place."""
    refuse_changes(stored, given, movable)
    if given["backend"] is None and ":" in (stored.get("backend") or ""):  # a folder from elsewhere runs no code
        raise UserError(
            f"--resume: the run's --backend was {stored['backend']}, code of its own: name it again, or another"
        )
    return {name: stored.get(name) if value is None or value == [] else value for name, value in given.items()}


def refuse_changes(stored: Mapping[str, Any], given: Mapping[str, Any], changeable: Collection[str]) -> None:
    for name, value in given.items():
        if name not in changeable and value is not None and value != stored.get(name):
            raise UserError(
                f"--resume: the run began with {name} {stored.get(name)}, got {value}: leave it out, or begin anew"
            )


def require_memory(
    place: Backend, predicted: Callable[[Passes], Memory | None], passes: Passes, least: int,
    flags: Callable[[Passes], str],
) -> None:  # fmt: skip
    """Raise UserError, after a table, where a run would take more memory than its device, or the host, has.

    `least`: tokens that a pass has to hold. `flags`: those of a command line that ask for such passes.
    """
    memory, free = predicted(passes), available(place)
    if memory is None or free is None or memory.total <= free:
        return

    def fits(tried: Passes) -> bool:
        less = predicted(tried)
        return less is not None and less.total <= free

    table = plain_table("memory", "MB")
    for name, size in (*memory.rows(), ("free", megabytes(free))):
        table.add_row(name, size.removesuffix(" MB"))
    notes.print(table)
    found = smaller(passes, least, fits)
    where = "" if place.device_memory() is None else f" on {place.name}"
    mend = "take a smaller model" if found is None else f"the same updates fit with {flags(found)}"
    raise UserError(
        f"the run would take about {megabytes(memory.total)} of memory, and {megabytes(free)} are free{where}: {mend}"
    )


@contextmanager
def stopped_by_signals(trainer: Loop) -> Iterator[None]:
    """A signal that asks for the end lets the step finish, leaves an evaluation, and the run saves itself.

    The process ends with its code then (`ended_by`); a second signal ends it at once.
    """

    def stop(number: int) -> None:
        trainer.stop = True
        STOPPED_BY[trainer] = number
        if trainer.may_be_left:
            raise Interrupted(number)

    with handled(stop):
        yield


def ended_by(trainer: Loop) -> int:
    """The exit code of a command whose run was stopped: that of the signal, as shells have it."""
    return 128 + STOPPED_BY.get(trainer, signal.SIGINT)


def is_over(trainer: Loop) -> bool:
    """Whether all was done, the last evaluation too."""
    return trainer.step >= trainer.max_steps and not trainer.unevaluated


def follow(trainer: Loop, evaluation: Callable[[Record], str], swapped: dict[Op, TriedKernel] | None = None) -> None:
    """Run, and show how it goes: a progress bar on a terminal, else a line for each line of the log.

    `evaluation` puts a record of the log into words.
    """
    events = trainer.run()
    with show_compiling():  # the first evaluation and the first step compile all there is to compile
        for kind, record in events:
            if kind == "eval":
                say(evaluation(record))
            if kind == "step":
                refuse_uncalled(swapped or {})
                break
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(), console=console, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=trainer.max_steps, completed=trainer.step, rate="")
        for kind, record in events:
            if kind == "eval":
                say(evaluation(record))
            elif kind == "log" and not console.is_terminal:
                say(line(record, trainer.max_steps))
            elif kind == "step":
                rate = f"{record['tokens'] / record['seconds']:,.0f} tokens/s"
                bar.update(task, completed=record["step"], description=f"loss {record['loss']:.3f}", rate=rate)
    lost, seconds = trainer.progress["save_seconds"], trainer.progress["seconds"]
    say(f"training took {seconds:.1f} s, and stood still for {lost:.2f} s more while checkpoints were saved")


def line(record: Record, steps: int) -> str:
    left = (steps - record["step"]) * record["seconds"] / record["step"]
    return (
        f"step {record['step']}/{steps}: loss {record['loss']:.4f}, learning rate {record['learning_rate']:.2e}, "
        f"gradient norm {record['grad_norm']:.2f}, {record['tokens_per_second']:,.0f} tokens/s, {left:.0f} s left"
    )
