"""One training step, ours and PyTorch's in turn: `python -m bench.step --config minilm --vs torch [--json FILE]`.

Forward, loss, backward, clipping and AdamW, dropout 0.1; the same weights, ids, dropout rates and threads. Three
measures, kept apart, since they do not answer the same question:

same work    a loss on every position: both sides make logits, loss and gradient for all of them
masked head  15 % of the positions are predicted: ours runs the head on those, torch on all, as BertForMaskedLM does
packed       real text of real lengths: ours packs it, torch pads to the longest of each batch, with its attention mask

PyTorch is transformers' BertForMaskedLM where that is installed, with sdpa and fused AdamW. Before the timing and, on
inputs not seen, after it, loss and gradient norm without dropout are compared; where they differ nothing is reported.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import harness, sides, torch_peer
from bench.batches import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    SEQUENCES,
    WEIGHT_DECAY,
    Batch,
    dense_batch,
    random_weights,
    text_batches,
    work,
)
from minibert import backends
from minibert.backends import MOST_THREADS, Backend
from minibert.bert import BertForMaskedLM
from minibert.cli.options import notes, refuse_unwritable
from minibert.config import BertConfig
from minibert.errors import UserError
from minibert.optim import AdamW, parameter_groups

MEASURES = {
    "same_work": "same work: a loss on every position",
    "masked_head": "masked head: 15 % of the positions predicted, ours runs the head on those alone",
    "packed": "packed: real text; ours packs it, torch pads it to the longest of each batch",
}
OPPONENTS = ("torch", "torch.compile")
FEWEST_ROUNDS = 3
TEXT_BATCHES = 4  # one after the other in each turn, so that a figure does not hang on one mix of lengths
SAME = 1e-3  # relative: figures without dropout further apart are not those of the same work


@dataclass(frozen=True)
class Task:
    """What is to be measured."""

    config: BertConfig
    batch: int
    length: int
    threads: int
    seed: int = 0
    sequences: str = "filled"

    def batches(self, measure: str, seed: int) -> list[Batch]:
        if measure == "packed":
            return text_batches(self.config, self.batch, self.length, TEXT_BATCHES, seed, self.sequences)
        share = {"share": 1.0} if measure == "same_work" else {}
        return [dense_batch(self.config, self.batch, self.length, seed, **share)]


class OurTraining:
    """minibert's model and optimiser on one backend."""

    def __init__(self, config: BertConfig, weights: torch_peer.Weights, backend: Backend) -> None:
        self.name, self.library, self.backend, self.weights = backend.name, "minibert", backend, weights
        self.model = BertForMaskedLM(config, backend, "float32", initialise=False)
        self.model.load_state_dict(dict(weights))
        self.model.train()
        groups = parameter_groups(self.model, WEIGHT_DECAY)
        self.optimizer = AdamW(groups, lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)

    def prepare(self, batch: Batch) -> Any:
        return batch.packed

    def step(self, packed: Any) -> float:
        """One update; the loss."""
        loss = self.model(packed).loss
        value = loss.item()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(value)

    def quiet(self, packed: Any, update: bool = False) -> tuple[float, float]:
        """Loss and gradient norm without dropout; with `update` the weights follow."""
        self.model.eval()
        loss = self.model(packed).loss
        value = loss.item()
        loss.backward()
        norm = float(self.backend.numpy(self.optimizer.square_norm())) ** 0.5
        if update:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.train()
        return float(value), norm

    def reload(self) -> None:
        """The weights of the beginning."""
        self.model.load_state_dict(dict(self.weights))


def side(name: str, task: Task, weights: torch_peer.Weights) -> Any:
    """The side of this name: a backend of ours, "torch" or "torch.compile"."""
    if name in OPPONENTS:
        return torch_peer.TorchTraining(task.config, weights, task.threads, compiled=name == "torch.compile")
    return OurTraining(task.config, weights, backends.get(name))


def one_step(spec: dict[str, Any]) -> Callable[[], Any]:
    """For `harness.peak_bytes`: what makes one step of one side, made anew."""
    task = Task(**{**spec["task"], "config": BertConfig.from_dict(spec["config"])})
    one = side(spec["side"], task, random_weights(task.config, task.seed))
    one.weights = {}  # kept for `reload` alone
    prepared = [one.prepare(b) for b in task.batches(spec["measure"], task.seed)]
    return lambda: [one.step(p) for p in prepared]


# ----------------------------------------------------------------------------------------------------------- a measure


def measure(
    name: str, task: Task, ours: list[str], opponents: list[str], rounds: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """All sides on the batches of one measure. A side of torch that cannot run is left out, with its reason."""
    weights = random_weights(task.config, task.seed)
    seen, unseen = task.batches(name, task.seed), task.batches(name, task.seed + 1)[:1]
    facts: dict[str, Any] = {"what": MEASURES[name], **sides.described(seen), "skipped": {}}
    made: list[Any] = []
    quiet: dict[str, list[float]] = {}
    for one in (*ours, *opponents):
        progress(f"{one}: making the model")
        try:
            new = side(one, task, weights)
            prepared = new.prepare(seen[0])
            quiet[one] = [*new.quiet(prepared, update=True), new.quiet(prepared)[0]]
        except Exception as error:  # torch.compile asks for a compiler, and fails in ways of its own
            if one in ours:
                raise
            facts["skipped"][one] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        made.append(new)
    facts["without_dropout"] = {
        who: dict(zip(("loss", "gradient_norm", "loss_after_update"), values, strict=True))
        for who, values in quiet.items()
    }
    facts["libraries"] = {one.name: one.library for one in made}
    facts["refused"] = harness.apart(quiet, SAME)
    if facts["refused"]:
        return facts
    last: dict[str, float] = {}
    contestants = [contestant(one, name, task, seen, last) for one in made]
    harness.interleaved(contestants, rounds, progress)
    progress("verifying on inputs not seen")
    for one in made:
        one.reload()
    fresh = {one.name: list(one.quiet(one.prepare(unseen[0]))) for one in made}
    facts["fresh_without_dropout"] = {
        who: dict(zip(("loss", "gradient_norm"), values, strict=True)) for who, values in fresh.items()
    }
    facts["refused"] = harness.apart(fresh, SAME)
    if facts["refused"]:
        return facts
    facts["last_loss"] = last
    facts |= harness.compared(contestants, ours)
    facts["launches"] = {
        one.name: harness.launches(one.backend, partial(one.step, one.prepare(seen[0])))
        for one in made if one.name in ours
    }  # fmt: skip
    return facts


def contestant(one: Any, name: str, task: Task, batches: list[Batch], last: dict[str, float]) -> harness.Contestant:
    """One side as the harness times it. Three times the forward pass: the backward has two products for each of its."""
    prepared = [one.prepare(b) for b in batches]
    theirs = one.name in OPPONENTS

    def call() -> None:
        for p in prepared:
            last[one.name] = one.step(p)

    head = "every" if theirs else "predicted"  # with a loss on every position the same
    flops = 3 * sum(work(task.config, b, theirs, head) for b in batches) // len(batches)
    return harness.Contestant(one.name, call, flops, len(batches))


def bench(
    config: Annotated[str, typer.Option(help="tiny, mini, minilm, small, medium or base.")] = "minilm",
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 8,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a sequence; of real text, at the most.")] = 128,
    names: Annotated[str, typer.Option("--backends", help="a,b: ours.")] = "numba",
    versus: Annotated[str, typer.Option("--vs", help="torch,torch.compile; default: nobody.")] = "",
    measures: Annotated[str, typer.Option(help="Some of same_work,masked_head,packed.")] = ",".join(MEASURES),
    sequences: Annotated[str, typer.Option(help="Real text as pretraining has it (filled), or sentences.")] = "filled",
    rounds: Annotated[int, typer.Option(min=FEWEST_ROUNDS)] = 7,
    threads: Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="Of every side; default: all.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each side in a process of its own.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the facts to this file.")] = None,
) -> int:
    """Time one training step against PyTorch's. Exit status 1 if a figure is impossible or the work differs."""
    opponents = harness.among("--vs", versus, OPPONENTS)
    wanted = harness.among("--measures", measures, list(MEASURES)) or list(MEASURES)
    if sequences not in SEQUENCES:
        raise UserError(f"--sequences: expected {' or '.join(SEQUENCES)}, got {sequences!r}")
    refuse_unwritable(json_file)
    if opponents and torch_peer.missing():
        raise UserError(f"--vs {versus}: {torch_peer.missing()}; pip install torch transformers, or leave --vs out")
    task = Task(harness.named_config(config, length), batch, length, threads or harness.cores(), seed, sequences)
    places = harness.cpu_backends(names, task.threads)
    about = harness.fingerprint(places, task.threads)
    sides.say_where(about)

    def run(name: str, progress: Callable[[str], None]) -> dict[str, Any]:
        facts = measure(name, task, [p.name for p in places], opponents, rounds, progress)
        gc.collect()
        given = {key: value for key, value in vars(task).items() if key != "config"}
        spec = {"measure": name, "threads": task.threads, "config": task.config.to_dict(), "task": given}
        harness.add_memory(facts, "bench.step:one_step", spec, progress if memory else None)
        return facts

    found, peaks = harness.between_peaks(wanted, run, notes)
    settings = {
        "config": config, "batch": batch, "length": length, "seed": seed, "rounds": rounds, "sequences": sequences,
        "model": task.config.to_dict(),
    }  # fmt: skip
    return sides.report(found, peaks, about, settings, opponents, json_file)


if __name__ == "__main__":
    harness.run_main(bench)
