"""Inference, ours and others' in turn: `python -m bench.infer --config minilm --batch 8 --vs torch,onnxruntime`.

No dropout and no gradient; the same weights and ids. The result is the last hidden state, or with `--logits` the
vocabulary's logits on every position. Two measures, kept apart:

dense    every sequence has T tokens
packed   real text of real lengths: ours packs it, the others pad to the longest of each batch, with its attention mask

The outputs of the real tokens are compared before the timing and, on inputs not seen, after it; where they differ
nothing is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import typer

from bench.peers import onnx_bert as onnx_peer
from bench.peers import torch_bert as torch_peer
from bench.timing import frame, harness, sides
from bench.timing.batches import Batch, dense_batch, random_weights, smallest, work
from minibert import backends
from minibert.backends import Backend
from minibert.errors import UserError
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import BertConfig
from minibert.model.tensor import no_grad

MEASURES = {
    "dense": "dense: every sequence has all its tokens",
    "packed": "packed: real text; ours packs it, the others pad it to the longest of each batch",
}
OPPONENTS = ("torch", "torch.compile", "onnxruntime")
SHORTEST = 0.05  # seconds that one turn lasts: quick passes are repeated in it
SAME = 1e-3  # of the largest output: outputs further apart are not those of the same model


@dataclass(frozen=True)
class Task(frame.Task):
    """What is to be measured."""

    logits: bool = False


@dataclass(frozen=True)
class Options(frame.Options):
    """The option that inference alone has."""

    logits: Annotated[bool, typer.Option(help="The vocabulary's logits on every position.")] = False


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
    task = Task.again(spec)
    backends.set_deterministic(task.deterministic)
    batches = task.batches(spec["measure"], task.seed)
    one = side(spec["side"], task, random_weights(task.config, task.seed), batches[0])
    prepared = [one.prepare(b) for b in batches]

    def call() -> None:
        for p in prepared:
            one.run(p)

    return call


# ----------------------------------------------------------------------------------------------------------- a measure


def measure(
    name: str, task: Task, ours: list[str], opponents: list[str], rounds: int, progress: frame.Progress
) -> dict[str, Any]:
    """Time inference against others'."""
    weights = random_weights(task.config, task.seed)
    seen, unseen = task.batches(name, task.seed), task.batches(name, task.seed + 1)[:1]

    def make(who: str) -> Any:
        new = side(who, task, weights, seen[0])
        new.run(new.prepare(seen[0]))
        return new

    def on_nothing(who: str) -> Callable[[], Any]:
        small = smallest(task.config)
        batch = dense_batch(small, 1, 2, task.seed)
        one = side(who, replace(task, config=small), random_weights(small), batch)
        prepared = one.prepare(batch)
        return lambda: one.run(prepared)

    made, skipped = frame.make_sides((*ours, *opponents), ours, make, progress)
    facts: dict[str, Any] = {"what": MEASURES[name], **sides.described(seen), "skipped": skipped}
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
    facts |= frame.timed(contestants, made, ours, lambda one: one.run(one.prepare(seen[0])), on_nothing)
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


BENCH = frame.Bench("infer", MEASURES, OPPONENTS, Task, measure, "bench.infer:one_pass")
bench = frame.command(BENCH, Options)

if __name__ == "__main__":
    harness.run_main(bench)
