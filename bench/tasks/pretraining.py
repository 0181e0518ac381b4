"""Pretrain a BERT on 38 MB of prose beside transformers and torch, both for the same time: which has learned more?

    python -m bench.tasks.pretraining --minutes 60 --json FILE --picture FILE.png

Both have the same text, vocabulary, split, config, first weights, batches, masks, order, AdamW, clipping and dropout
rates; ours packed, with the head on what is predicted, torch's padded, with the head on every position, as
BertForMaskedLM has it. First they are held to the same loss and gradient norm without dropout.

The budget is the time of a side's own steps: they take turns of some seconds, who begins changing; evaluations, always
of the same masked tokens, count for nobody, and what compiles has been compiled before. The whole takes twice the
minutes, and some more. The learning rate rises over the first twentieth of a side's time and then falls to 0 at its
end: how many steps a side will take is not known, and a schedule over steps would end too soon for one of them.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.step import NEAR, SAME
from bench.tasks.fetch import examples_in, fetched, sha256
from bench.tasks.learned import report
from bench.tasks.options import command_line, vars_of
from bench.tasks.pretrainers import ENDLESS, Ours, Torch
from bench.tasks.prose import PROSE
from bench.timing import frame, harness, sides
from bench.timing.batches import Batch
from minibert import backends
from minibert.backends import MOST_THREADS
from minibert.cli.options import BACKENDS, OWN_HELP, notes, refuse_unwritable
from minibert.data import (
    SHIPPED_TEXT,
    SHIPPED_VOCABULARY,
    load_tokenizer,
    special_ids,
    train_tokenizer,
    vocabulary_size,
)
from minibert.errors import UserError, pip_install
from minibert.lab.measure import quiet
from minibert.model.bert import BertForMaskedLM
from minibert.model.packing import IGNORE
from minibert.tasks.picture import figure_library
from minibert.train.config import TrainingConfig
from minibert.train.trainer import Trainer, prepare

OPPONENTS = ("torch", "torch.bf16", "numba.float32")
TURN = 5.0  # seconds of a side, one step after the other
WARM_UP = 0.05  # share of the time in which the learning rate rises
FIRST = 2  # steps of each side that are thrown away: they compile
SMALL: dict[str, Any] = {"minutes": 0.03, "points": 3, "config": "tiny", "batch": 1024}
PICTURES = (".png", ".svg", ".pdf")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """As typer reads them."""

    minutes: Annotated[float, typer.Option(min=0.01, help="Of steps, for each side.")] = 60.0
    points: Annotated[int, typer.Option(min=1, help="Evaluations beside the first.")] = 60
    config: Annotated[str, typer.Option(help="tiny, mini, minilm, small, medium or base.")] = "mini"
    file: Annotated[Path | None, typer.Option("--data", help="Plain text; default: the prose, fetched and kept.")] = (
        None
    )
    vocab_size: Annotated[int, typer.Option(min=300, help="Tokens, of a vocabulary made of the text.")] = 8000
    batch: Annotated[int, typer.Option(min=8, help="Tokens of a step, at the most.")] = 4096
    length: Annotated[int, typer.Option(min=8, help="Tokens of a sequence, at the most.")] = PROSE.length
    learning_rate: Annotated[float, typer.Option(min=0.0, help="At its highest.")] = 1e-3
    seed: Annotated[int, typer.Option(min=0, help="Of weights, split, order, masks and dropout.")] = 0
    small: Annotated[
        bool, typer.Option("--small", help="Two seconds of the tiny model on the shipped text: a test.")
    ] = False
    vs: Annotated[str, typer.Option(help=f"{', '.join(OPPONENTS)}; or nothing: ours alone.")] = "torch"
    dtype: Annotated[str, typer.Option(help="Of our arrays: float32 or bfloat16.")] = "float32"
    backend: Annotated[str, typer.Option(*BACKENDS, help=f"Ours. {OWN_HELP}")] = "numba"
    threads: Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="Of every side; default: all cores.")] = (
        None
    )
    picture: Annotated[Path | None, typer.Option(help="Draw the curves: .png, .svg or .pdf.")] = None
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the facts to this file.")] = None


def run(options: Options) -> int:
    """Pretrain, show and write. Raises UserError for options that make no sense and for what is missing."""
    refuse_unwritable(json=options.json_file, picture=options.picture)
    said = command_line("pretraining", options)
    versus = harness.among("--vs", options.vs, OPPONENTS)
    for library in ("torch", "transformers") if any(name.startswith("torch") for name in versus) else ():
        if importlib.util.find_spec(library) is None:
            need = pip_install("[parity]")
            raise UserError(f"{library} is not installed, to compare with: {need}, or leave it out by --vs ''")
    if options.picture is not None:
        figure_library()
        if options.picture.suffix not in PICTURES:
            raise UserError(f"--picture: expected a name that ends in {', '.join(PICTURES)}, got {options.picture}")
    options = replace(options, threads=options.threads or harness.cores(), **(SMALL if options.small else {}))
    assert options.threads is not None
    config = harness.named_config(options.config, options.length)
    place, *others = harness.cpu_backends(options.backend, options.threads)
    if others:
        raise UserError(f"--backend: expected one, got {options.backend}")
    path = options.file or (SHIPPED_TEXT if options.small else fetched(PROSE))
    settings = TrainingConfig(
        max_steps=ENDLESS, max_seq_length=options.length, tokens_per_batch=options.batch,
        learning_rate=options.learning_rate, seed=options.seed, **({"eval_tokens": 5000} if options.small else {}),
    )  # fmt: skip
    with notes.status("reading the text, making its vocabulary"):
        documents = examples_in(PROSE, path)
        tokenizer = (
            load_tokenizer(SHIPPED_VOCABULARY) if options.small else train_tokenizer(documents, options.vocab_size)
        )
        data = prepare(documents, tokenizer, settings)
    config = replace(config, vocab_size=vocabulary_size(tokenizer), pad_token_id=special_ids(tokenizer).pad)
    kept = {"set": path.name if options.file or options.small else PROSE.file, "sha256": sha256(path),
            "package": "" if options.file or options.small else PROSE.source,
            "bytes": path.stat().st_size, "documents": len(documents), "tokens": data.tokens,
            "sequences": {"train": len(data.train), "held_out": len(data.held_out)}}  # fmt: skip
    del documents
    load, about = quiet.Load(), harness.fingerprint([place], options.threads)
    sides.say_where(about)
    weights = BertForMaskedLM(config, "numpy", seed=options.seed).state_dict()

    def make() -> list[Any]:
        ours = Ours(config, weights, data, settings, place, options.dtype)

        def opponent(name: str) -> Any:
            if name.endswith(frame.IN_FLOAT32):
                there = backends.get(name.removesuffix(frame.IN_FLOAT32))
                return Ours(config, weights, data, settings, there, name=name)
            return Torch(weights, ours.trainer, options.threads or 1, name.endswith("bf16"))

        return [ours, *map(opponent, versus)]

    def one(name: str, progress: Progress) -> dict[str, Any]:
        return pretrained(options, make, progress)

    found, peaks = harness.between_peaks(["pretraining"], one, notes)
    facts = found["pretraining"]
    kept["held_out_predicted"] = facts.pop("held_out_predicted")
    document = {
        "bench": "tasks", "task": "pretraining", "command": said, "command_options": vars_of(options), "data": kept,
        **about, "model": config.to_dict(), "peaks": peaks, "unigram_loss": facts.pop("unigram_loss"),
        "measures": found, "disturbance": load.disturbance(options.threads, facts.get("seconds_per_flop", {})),
    }  # fmt: skip
    return report(document, options.json_file, options.picture)


class Run:
    """A side, and what it has done: time and tokens of its steps, turn by turn, and what it had learned when."""

    def __init__(self, side: Any, trainer: Trainer, seconds: float) -> None:
        self.side, self.trainer, self.budget = side, trainer, seconds
        self.seconds, self.steps, self.tokens, self.flops = 0.0, 0, 0, 0
        self.turns: list[float | None] = []  # seconds of a step, in each turn that had one
        self.per_flop: list[float] = []  # seconds, in each turn
        self.curve: list[dict[str, float]] = []

    def turn(self, until: float) -> None:
        """Steps up to so many seconds of its own; none where a long one is there already."""
        before = self.seconds, self.steps, self.flops
        time.sleep(harness.SETTLE)
        while self.seconds < until:
            batch = Batch(self.trainer.model.config, self.trainer.batches.batch(self.steps))
            prepared, rate = self.side.prepare(batch), self.trainer.config.learning_rate * self.share_of_rate()
            began = time.perf_counter()
            self.side.step(prepared, rate)
            self.seconds += time.perf_counter() - began
            self.steps, self.tokens = self.steps + 1, self.tokens + int(batch.lengths.sum())
            self.flops += self.side.flops(batch)
        seconds, steps, flops = (
            now - then for now, then in zip((self.seconds, self.steps, self.flops), before, strict=True)
        )
        self.turns.append(seconds / steps if steps else None)
        self.per_flop += [seconds / flops] if steps else []

    def share_of_rate(self) -> float:
        """Of the highest learning rate, by the share of the time that is over."""
        over = self.seconds / self.budget
        return max(0.0, min(over / WARM_UP, (1 - over) / (1 - WARM_UP)))

    def evaluate(self) -> None:
        self.curve.append({
            "seconds": self.seconds, "steps": self.steps, "tokens": self.tokens,
            "held_out_loss": self.side.held_out_loss(),
        })  # fmt: skip


def pretrained(options: Options, make: Callable[[], list[Any]], progress: Progress) -> dict[str, Any]:
    """A run of every side. Where they do not find the same without dropout, that is all that is told."""
    progress("compiling")
    thrown_away = make()
    for number in range(FIRST):
        for side in thrown_away:
            side.step(
                side.prepare(Batch(thrown_away[0].trainer.model.config, thrown_away[0].trainer.batches.batch(number))),
                0.0,
            )
    del thrown_away, side
    gc.collect()
    made = make()
    trainer = made[0].trainer
    quietly = {side.name: side.quiet() for side in made}
    libraries = {side.name: side.library for side in made}
    few = frame.in_fewer_bits({"libraries": libraries})
    near = quietly if made[0].name in few else few  # whatever is compared with fewer bits
    facts: dict[str, Any] = {
        "libraries": libraries, "fewer_bits": few,
        "without_dropout": {who: {"loss": loss, "gradient_norm": norm} for who, (loss, norm) in quietly.items()},
        "refused": harness.apart(quietly, SAME, dict.fromkeys(near, NEAR)), "unigram_loss": trainer.unigram_loss,
        "held_out_predicted": sum(int((batch.labels != IGNORE).sum()) for batch in trainer.held_out),
    }  # fmt: skip
    if facts["refused"]:
        return facts
    runs = {side.name: Run(side, trainer, options.minutes * 60) for side in made}
    train(list(runs.values()), options, progress)
    return {
        **facts, "curves": {who: run.curve for who, run in runs.items()},
        "tokens_per_second": {who: run.tokens / run.seconds for who, run in runs.items()},
        "seconds_per_flop": {who: run.per_flop for who, run in runs.items()},
        **harness.compared(contestants(list(runs.values())), [made[0].name]),
    }  # fmt: skip


def contestants(runs: Sequence[Run]) -> list[harness.Contestant]:
    """The runs as the harness compares them: by the turns in which all of them took steps, as in the first one."""
    found = [harness.Contestant(run.side.name, lambda: None, run.flops // run.steps) for run in runs]
    for turn in zip(*(run.turns for run in runs), strict=True):
        if None not in turn:
            for one, seconds in zip(found, turn, strict=True):
                one.seconds.append(seconds)
    return found


def train(runs: Sequence[Run], options: Options, progress: Progress) -> None:
    """To the end of each one's time, in turns that are even parts of the time between two evaluations."""
    between = options.minutes * 60 / options.points
    parts = max(1, round(between / TURN))
    for run in runs:
        run.evaluate()
    gc.disable()
    try:
        for number in range(options.points * parts):
            for run in runs if number % 2 == 0 else reversed(runs):
                progress(
                    f"{run.side.name}: {run.seconds / 60:.1f} of {options.minutes:g} minutes, {run.steps} steps, "
                    f"held-out loss {run.curve[-1]['held_out_loss']:.3f}"
                )
                run.turn((number + 1) * between / parts)
            gc.collect()
            if (number + 1) % parts == 0:
                for run in runs:
                    progress(f"{run.side.name}: held-out loss")
                    run.evaluate()
    finally:
        gc.enable()


bench = frame.with_options(
    Options, run,
    "Pretrain a BERT on prose, ours beside transformers and torch for the same time.\n\nExit status 1 if a figure is "
    "impossible or the sides do not compute the same.",
)  # fmt: skip

if __name__ == "__main__":
    harness.run_main(bench)
