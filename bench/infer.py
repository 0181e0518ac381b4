"""Inference, ours and others' in turn: `python -m bench.infer --config minilm --batch 8 --vs torch,onnxruntime`.

No dropout and no gradient; the same weights and ids. The result is the last hidden state, or with `--logits` the
vocabulary's logits on every position. Two measures, kept apart:

dense    every sequence has T tokens
packed   real text of real lengths: ours packs it, the others pad to the longest of each batch, with its attention mask

The outputs of the real tokens are compared before the timing and, on inputs not seen, after it; where they differ
nothing is reported.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench import harness, onnx_peer, sides, torch_peer
from bench.batches import SEQUENCES, Batch, dense_batch, random_weights, text_batches, work
from minibert import backends
from minibert.backends import MOST_THREADS, Backend
from minibert.bert import BertForMaskedLM
from minibert.cli.options import notes, refuse_unwritable
from minibert.config import BertConfig
from minibert.errors import UserError
from minibert.tensor import no_grad

MEASURES = {
    "dense": "dense: every sequence has all its tokens",
    "packed": "packed: real text; ours packs it, the others pad it to the longest of each batch",
}
OPPONENTS = ("torch", "torch.compile", "onnxruntime")
FEWEST_ROUNDS = 3
TEXT_BATCHES = 4  # one after the other in each turn, so that a figure does not hang on one mix of lengths
SHORTEST = 0.05  # seconds that one turn lasts: quick passes are repeated in it
SAME = 1e-3  # of the largest output: outputs further apart are not those of the same model


@dataclass(frozen=True)
class Task:
    """What is to be measured."""

    config: BertConfig
    batch: int
    length: int
    threads: int
    seed: int = 0
    sequences: str = "filled"
    logits: bool = False

    def batches(self, measure: str, seed: int) -> list[Batch]:
        if measure == "packed":
            return text_batches(self.config, self.batch, self.length, TEXT_BATCHES, seed, self.sequences)
        return [dense_batch(self.config, self.batch, self.length, seed)]


class OurInference:
    """minibert's model on one backend."""

    def __init__(self, config: BertConfig, weights: torch_peer.Weights, backend: Backend, logits: bool) -> None:
        self.name, self.library, self.backend, self.logits = backend.name, "minibert", backend, logits
        self.model = BertForMaskedLM(config, backend, "float32", initialise=False)
        self.model.load_state_dict(dict(weights))
        self.model.eval()

    def prepare(self, batch: Batch) -> Any:
        return batch.packed._replace(labels=None, predicted=None, targets=None)

    def run(self, packed: Any) -> np.ndarray:
        with no_grad():
            if self.logits:
                return np.asarray(self.model(packed).logits.numpy())
            return self.model.bert(packed).last_hidden_state.numpy()

    def rows(self, output: Any, batch: Batch) -> np.ndarray:
        """The outputs of the real tokens: (N, C) or (N, V)."""
        return np.asarray(output)


def side(name: str, task: Task, weights: torch_peer.Weights, example: Batch) -> Any:
    """The side of this name: a backend of ours, or another library. Raises whatever that library raises."""
    if name == "onnxruntime":
        if onnx_peer.missing():
            raise UserError(onnx_peer.missing())
        return onnx_peer.OnnxInference(task.config, weights, task.threads, task.logits, example)
    if name in OPPONENTS:
        compiled = name == "torch.compile"
        return torch_peer.TorchInference(task.config, weights, task.threads, task.logits, compiled=compiled)
    return OurInference(task.config, weights, backends.get(name), task.logits)


def one_pass(spec: dict[str, Any]) -> Callable[[], Any]:
    """For `harness.peak_bytes`: what makes one pass of one side, made anew."""
    task = Task(**{**spec["task"], "config": BertConfig.from_dict(spec["config"])})
    batches = task.batches(spec["measure"], task.seed)
    one = side(spec["side"], task, random_weights(task.config, task.seed), batches[0])
    prepared = [one.prepare(b) for b in batches]

    def call() -> None:
        for p in prepared:
            one.run(p)

    return call


# ----------------------------------------------------------------------------------------------------------- a measure


def measure(
    name: str, task: Task, ours: list[str], opponents: list[str], rounds: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """All sides on the batches of one measure. An opponent that cannot run is left out, with its reason."""
    weights = random_weights(task.config, task.seed)
    seen, unseen = task.batches(name, task.seed), task.batches(name, task.seed + 1)[:1]
    facts: dict[str, Any] = {"what": MEASURES[name], **sides.described(seen), "skipped": {}}
    made: list[Any] = []
    for one in (*ours, *opponents):
        progress(f"{one}: making the model")
        try:
            new = side(one, task, weights, seen[0])
            new.run(new.prepare(seen[0]))
        except Exception as error:  # exporters and compilers fail in ways of their own
            if one in ours:
                raise
            facts["skipped"][one] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        made.append(new)
    facts["libraries"] = {one.name: one.library for one in made}
    facts["apart"] = {"before": distances(made, seen[0])}
    facts["refused"] = refusal(facts["apart"]["before"])
    if facts["refused"]:
        return facts
    contestants = [contestant(one, name, task, seen) for one in made]
    harness.interleaved(contestants, rounds, progress)
    progress("verifying on inputs not seen")
    facts["apart"]["after"] = distances(made, unseen[0])
    facts["refused"] = refusal(facts["apart"]["after"])
    if facts["refused"]:
        return facts
    facts |= harness.compared(contestants, ours)
    facts["launches"] = {
        one.name: harness.launches(one.backend, partial(one.run, one.prepare(seen[0])))
        for one in made if one.name in ours
    }  # fmt: skip
    return facts


def distances(found: list[Any], batch: Batch) -> dict[str, float]:
    """Of each side's outputs from the first side's: the largest, over the largest output."""
    first, *others = [(one.name, one.rows(one.run(one.prepare(batch)), batch).astype(np.float64)) for one in found]
    largest = float(np.abs(first[1]).max())
    return {name: float(np.abs(rows - first[1]).max()) / largest for name, rows in others}


def refusal(found: dict[str, float]) -> str:
    """Why the sides do not compute the same; empty where they do."""
    for name, distance in found.items():
        if not distance <= SAME:
            return f"the outputs of {name} are {distance:.2g} of the largest away: it does not compute the same"
    return ""


def contestant(one: Any, name: str, task: Task, batches: list[Batch]) -> harness.Contestant:
    """One side as the harness times it, with as many passes in a turn as make it long enough."""
    prepared = [one.prepare(b) for b in batches]
    flops = sum(work(task.config, b, one.name in OPPONENTS, "every" if task.logits else "no") for b in batches)

    def call() -> None:
        for p in prepared:
            one.run(p)

    return harness.Contestant(one.name, call, flops // len(batches), len(batches), SHORTEST)


def bench(
    config: Annotated[str, typer.Option(help="tiny, mini, minilm, small, medium or base.")] = "minilm",
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 8,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a sequence; of real text, at the most.")] = 128,
    names: Annotated[str, typer.Option("--backends", help="a,b: ours.")] = "numba",
    versus: Annotated[str, typer.Option("--vs", help="torch,torch.compile,onnxruntime; default: nobody.")] = "",
    measures: Annotated[str, typer.Option(help="Some of dense,packed.")] = ",".join(MEASURES),
    sequences: Annotated[str, typer.Option(help="Real text as pretraining has it (filled), or sentences.")] = "filled",
    logits: Annotated[bool, typer.Option(help="The vocabulary's logits on every position.")] = False,
    rounds: Annotated[int, typer.Option(min=FEWEST_ROUNDS)] = 7,
    threads: Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="Of every side; default: all.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each side in a process of its own.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the facts to this file.")] = None,
) -> int:
    """Time inference against others'. Exit status 1 if a figure is impossible or the outputs differ."""
    opponents = harness.among("--vs", versus, OPPONENTS)
    wanted = harness.among("--measures", measures, list(MEASURES)) or list(MEASURES)
    if sequences not in SEQUENCES:
        raise UserError(f"--sequences: expected {' or '.join(SEQUENCES)}, got {sequences!r}")
    refuse_unwritable(json_file)
    if {"torch", "torch.compile"} & set(opponents) and torch_peer.missing():
        raise UserError(f"--vs {versus}: {torch_peer.missing()}; pip install torch transformers, or leave it out")
    named = harness.named_config(config, length)
    task = Task(named, batch, length, threads or harness.cores(), seed, sequences, logits)
    places = harness.cpu_backends(names, task.threads)
    about = harness.fingerprint(places, task.threads)
    sides.say_where(about)

    def run(name: str, progress: Callable[[str], None]) -> dict[str, Any]:
        facts = measure(name, task, [p.name for p in places], opponents, rounds, progress)
        gc.collect()
        given = {key: value for key, value in vars(task).items() if key != "config"}
        spec = {"measure": name, "threads": task.threads, "config": named.to_dict(), "task": given}
        harness.add_memory(facts, "bench.infer:one_pass", spec, progress if memory else None)
        return facts

    found, peaks = harness.between_peaks(wanted, run, notes)
    settings = {
        "config": config, "batch": batch, "length": length, "seed": seed, "rounds": rounds, "sequences": sequences,
        "logits": logits, "model": named.to_dict(),
    }  # fmt: skip
    return sides.report(found, peaks, about, settings, opponents, json_file)


if __name__ == "__main__":
    harness.run_main(bench)
