"""The frame of `bench.step` and `bench.infer`: options, sides and turns, what is written. Each adds what is its own.

A side is anything with `name`, `library` and `prepare(batch)`; what it does with a prepared batch is the command's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from bench.peers import torch_bert as torch_peer
from bench.timing import harness, sides
from bench.timing.batches import SEQUENCES, Batch, dense_batch, random_weights, smallest, text_batches
from bench.timing.figures import refuse_other_csv
from minibert import backends
from minibert.backends import MOST_THREADS, Backend, determinism
from minibert.cli.options import BACKENDS, DETERMINISTIC_HELP, OWN_HELP, notes, refuse_unwritable
from minibert.errors import UserError, pip_install
from minibert.kernels.cpu.tiles import pair_instructions
from minibert.lab.measure import quiet
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import BertConfig

TEXT_BATCHES = 4  # one after the other in each turn, so that a figure does not hang on one mix of lengths
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """What is to be measured."""

    config: BertConfig
    batch: int
    length: int
    threads: int
    seed: int = 0
    sequences: str = "filled"
    deterministic: bool = False
    dtype: str = "float32"

    def batches(self, measure: str, seed: int) -> list[Batch]:
        if measure == "packed":
            return text_batches(self.config, self.batch, self.length, TEXT_BATCHES, seed, self.sequences)
        return [dense_batch(self.config, self.batch, self.length, seed)]

    @property
    def given(self) -> dict[str, Any]:
        """All but the model, as JSON holds it."""
        return {name: value for name, value in vars(self).items() if name != "config"}

    @classmethod
    def again(cls, spec: Mapping[str, Any]) -> Any:
        """The task that a child process was told of; it gets to know the backends that its user wrote."""
        for name in spec["backends"]:
            backends.get(name)
        return cls(**{**spec["task"], "config": BertConfig.from_dict(spec["config"])})


@dataclass(frozen=True)
class Options:
    """The options that both commands take, as typer reads them."""

    config: Annotated[str, typer.Option(help="tiny, mini, minilm, small, medium or base.")] = "minilm"
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 8
    length: Annotated[int, typer.Option(min=8, help="Tokens of a sequence; of real text, at the most.")] = 128
    names: Annotated[str, typer.Option(*BACKENDS, help=f"a,b: ours. {OWN_HELP}")] = "numba"
    versus: Annotated[str, typer.Option("--vs", help="Whom to compare with, a,b; default: nobody.")] = ""
    measures: Annotated[str, typer.Option(help="Which measures, a,b; default: all.")] = ""
    sequences: Annotated[str, typer.Option(help="Real text as pretraining has it (filled), or sentences.")] = "filled"
    rounds: Annotated[int, typer.Option(min=harness.FEWEST_ROUNDS)] = 7
    threads: Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="Of every side; default: all cores.")] = (
        None
    )
    deterministic: Annotated[bool, typer.Option("--deterministic", help=DETERMINISTIC_HELP)] = False
    dtype: Annotated[str, typer.Option(help="Of our arrays: float32 or bfloat16.")] = "float32"
    seed: Annotated[int, typer.Option(min=0)] = 0
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each side in a process of its own.")] = True
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the facts to this file.")] = None
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Add the figures to this long CSV.")] = None


@dataclass(frozen=True)
class Bench:
    """What is a command's own. A batch is prepared by its side before a turn begins."""

    name: str
    about: str  # in a line
    measures: Mapping[str, str]
    opponents: Sequence[str]
    task: type[Task]  # its fields beyond those of Task are options of the same names
    side: Callable[[str, Any, torch_peer.Weights, Batch], Any]  # of this name; raises whatever its library raises
    turn: Callable[[Any, Any], float | None]  # of a side, on what it prepared; the loss, where there is one
    flops: Callable[[Any, Batch, bool], int]  # of a turn on a batch, for one of ours or (True) for an opponent
    found: Callable[[Any, Batch, bool], Any]  # by a side before the timing or (True) after it: alike for all sides
    judge: Callable[[dict[str, Any], Mapping[str, Any], bool], None]  # adds to the facts what was found, and "refused"
    worker: str  # MODULE:FUNCTION, a partial of `peak`: what the child of `harness.peak_bytes` runs
    shortest: float = 0.0  # seconds that a turn lasts: quick ones are repeated in it


FEWER_BITS = ("int8", "bfloat16")  # as the library of a side says
IN_FLOAT32 = ".float32"  # after the name of a backend: ours in float32, beside the same in fewer bits


def in_fewer_bits(facts: Mapping[str, Any]) -> list[str]:
    """The sides whose products are not of float32: they find nearly the same, and have no share of its peak."""
    return [name for name, library in facts["libraries"].items() if any(kind in library for kind in FEWER_BITS)]


def ours_in(dtype: str) -> str:
    """The library of a side of ours whose arrays are of this dtype."""
    return "minibert" + (f", weights and states in bfloat16 ({pair_instructions()})" if dtype == "bfloat16" else "")


class Ours:
    """minibert's model on one backend: a side, but for what it does with a batch."""

    def __init__(self, config: BertConfig, weights: torch_peer.Weights, backend: Backend, dtype: str) -> None:
        self.name, self.library, self.backend = backend.name, ours_in(dtype), backend
        self.model = BertForMaskedLM(config, backend, dtype, initialise=False)
        self.model.load_state_dict(dict(weights))


def command(bench: Bench, options: type[Options] = Options) -> Callable[..., int]:
    """The function that typer makes a command of: its parameters are the fields of `options`."""

    return with_options(
        options, partial(run, bench),
        f"{bench.about}\n\n--measures: {', '.join(bench.measures)}. --vs: {', '.join(bench.opponents)}. "
        "Exit status 1 if a figure is impossible or the work differs.",
    )  # fmt: skip


def with_options(options: type[Any], run: Callable[[Any], int], about: str) -> Callable[..., int]:
    """`run` as typer makes a command of it: its parameters are the fields of a dataclass, made into one of these."""

    def run_with(**values: Any) -> int:
        return run(options(**values))

    hints = get_type_hints(options, include_extras=True)
    parameters = [
        Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name]) for f in fields(options)
    ]
    run_with.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run_with.__doc__ = about
    return run_with


def run(bench: Bench, options: Options) -> int:
    """Measure, show and write. Raises UserError for options that make no sense, BackendUnavailable for a backend."""
    opponents = harness.among("--vs", options.versus, bench.opponents)
    wanted = harness.among("--measures", options.measures, list(bench.measures)) or list(bench.measures)
    if options.sequences not in SEQUENCES:
        raise UserError(f"--sequences: expected {' or '.join(SEQUENCES)}, got {options.sequences!r}")
    refuse_unwritable(json=options.json_file, csv=options.csv_file)
    refuse_other_csv(options.csv_file)
    if any(name.startswith("torch") for name in opponents) and torch_peer.missing():
        raise UserError(f"--vs {options.versus}: {torch_peer.missing()}; {pip_install('[parity]')}, or leave it out")
    task = task_of(bench, options)
    places = harness.cpu_backends(options.names, task.threads)
    load = quiet.Load()
    with determinism(task.deterministic):
        about = harness.fingerprint(places, task.threads)
    sides.say_where(about)

    def one(name: str, progress: Progress) -> dict[str, Any]:
        with determinism(task.deterministic):  # not around the peaks: BLAS reaches them on all its threads
            facts = measure(bench, name, task, [p.name for p in places], opponents, options.rounds, progress)
        gc.collect()
        spec = {"measure": name, "threads": task.threads, "config": task.config.to_dict(), "task": task.given}
        spec["backends"] = [backends.spec_of(place) for place in places]
        harness.add_memory(facts, bench.worker, spec, progress if options.memory else None)
        return facts

    found, peaks = harness.between_peaks(wanted, one, notes)
    settings = {
        **task.given, "config": options.config, "rounds": options.rounds, "model": task.config.to_dict(),
    }  # fmt: skip
    taken = {
        f"{who} ({name})": seconds["all"]
        for name, facts in found.items() for who, seconds in facts.get("seconds", {}).items()
    }  # fmt: skip
    document = {
        "bench": bench.name, **about, "settings": settings, "peaks": peaks, "measures": found,
        "disturbance": load.disturbance(task.threads, taken),
    }  # fmt: skip
    return sides.report(document, opponents, options.json_file, options.csv_file)


def task_of(bench: Bench, options: Options) -> Task:
    config = harness.named_config(options.config, options.length)
    given = {f.name: getattr(options, f.name) for f in fields(bench.task) if f.name != "config"}
    return bench.task(config, **{**given, "threads": options.threads or harness.cores()})


# ----------------------------------------------------------------------------------------------------------- a measure


def make_sides(
    names: Iterable[str], ours: Sequence[str], make: Callable[[str], Any], progress: Progress
) -> tuple[list[Any], dict[str, str]]:
    """Every side that can be made, and why the others' were left out. Raises what one of ours raises."""
    made, skipped = [], {}
    for name in names:
        progress(f"{name}: making the model")
        try:
            made.append(make(name))
        except Exception as error:  # exporters and compilers fail in ways of their own
            if name in ours:
                raise
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return made, skipped


def measure(
    bench: Bench, name: str, task: Task, ours: Sequence[str], opponents: Sequence[str], rounds: int, progress: Progress
) -> dict[str, Any]:
    """Time every side on one measure. Where they do not find the same, before or after, that is all that is told."""
    weights = random_weights(task.config, task.seed)
    seen, unseen = task.batches(name, task.seed), task.batches(name, task.seed + 1)[0]
    found: dict[str, Any] = {}

    def make(who: str) -> Any:
        side = bench.side(who, task, weights, seen[0])
        found[who] = bench.found(side, seen[0], False)
        return side

    made, skipped = make_sides((*ours, *opponents), ours, make, progress)
    facts: dict[str, Any] = {"what": bench.measures[name], **sides.described(seen), "skipped": skipped}
    facts["libraries"] = {side.name: side.library for side in made}
    bench.judge(facts, found, False)
    if facts["refused"]:
        return facts
    found.clear()
    losses: dict[str, float] = {}
    contestants = [contestant(bench, side, task, seen, losses) for side in made]
    harness.interleaved(contestants, rounds, progress)
    progress("verifying on inputs not seen")
    bench.judge(facts, {side.name: bench.found(side, unseen, True) for side in made}, True)
    if facts["refused"]:
        return facts
    if losses:
        facts["last_loss"] = losses
    overhead = {side.name: overhead_of(bench, side, task, seen[0]) for side in made if side.name in ours}
    return {**facts, **harness.compared(contestants, ours), "overhead": overhead}


def contestant(
    bench: Bench, side: Any, task: Task, batches: Sequence[Batch], losses: dict[str, float]
) -> harness.Contestant:
    """One side as the harness times it; `losses` keeps the last of each."""
    prepared = [side.prepare(b) for b in batches]
    flops = sum(bench.flops(task, b, not isinstance(side, Ours)) for b in batches) // len(batches)

    def call() -> None:
        for p in prepared:
            loss = bench.turn(side, p)
            if loss is not None:
                losses[side.name] = loss

    return harness.Contestant(side.name, call, flops, len(batches), bench.shortest)


def overhead_of(bench: Bench, side: Any, task: Task, batch: Batch) -> dict[str, Any]:
    """What one of ours takes beside its work: the same turn at the smallest sizes."""
    small = smallest(task.config)
    on_nothing = dense_batch(small, 1, 2, task.seed)
    tiny = bench.side(side.name, replace(task, config=small), random_weights(small), on_nothing)
    prepared = tiny.prepare(on_nothing)
    return harness.overhead(
        side.backend, lambda: bench.turn(side, side.prepare(batch)), lambda: bench.turn(tiny, prepared)
    )


def peak(bench: Bench, spec: Mapping[str, Any]) -> Callable[[], Any]:
    """For `harness.peak_bytes`: what makes a turn of one side, made anew, on each batch."""
    task = bench.task.again(spec)
    backends.set_deterministic(task.deterministic)
    batches = task.batches(spec["measure"], task.seed)
    side = bench.side(spec["side"], task, random_weights(task.config, task.seed), batches[0])
    side.weights = {}  # kept for `reload` alone
    if isinstance(side, Ours):
        side.backend.release_memory()  # of the weights it was given a copy of, which torch gives back by itself
    prepared = [side.prepare(b) for b in batches]

    def call() -> None:
        for p in prepared:
            bench.turn(side, p)

    return call
