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

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bench.peers import torch_bert as torch_peer
from bench.timing import frame, harness, sides
from bench.timing.batches import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    Batch,
    dense_batch,
    random_weights,
    smallest,
    work,
)
from minibert import backends
from minibert.backends import Backend
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import BertConfig
from minibert.train.optim import AdamW, parameter_groups

MEASURES = {
    "same_work": "same work: a loss on every position",
    "masked_head": "masked head: 15 % of the positions predicted, ours runs the head on those alone",
    "packed": "packed: real text; ours packs it, torch pads it to the longest of each batch",
}
OPPONENTS = ("torch", "torch.compile")
SAME = 1e-3  # relative: figures without dropout further apart are not those of the same work


@dataclass(frozen=True)
class Task(frame.Task):
    """What is to be measured."""

    def batches(self, measure: str, seed: int) -> list[Batch]:
        if measure == "same_work":
            return [dense_batch(self.config, self.batch, self.length, seed, share=1.0)]
        return super().batches(measure, seed)


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
        loss.backward()
        value = loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(value)

    def quiet(self, packed: Any, update: bool = False) -> tuple[float, float]:
        """Loss and gradient norm without dropout; with `update` the weights follow."""
        self.model.eval()
        loss = self.model(packed).loss
        loss.backward()
        value = loss.item()
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
    task = Task.again(spec)
    backends.set_deterministic(task.deterministic)
    one = side(spec["side"], task, random_weights(task.config, task.seed))
    one.weights = {}  # kept for `reload` alone
    if isinstance(one, OurTraining):
        one.backend.release_memory()  # of the weights it was given a copy of, which torch gives back by itself
    prepared = [one.prepare(b) for b in task.batches(spec["measure"], task.seed)]
    return lambda: [one.step(p) for p in prepared]


# ----------------------------------------------------------------------------------------------------------- a measure


def measure(
    name: str, task: Task, ours: list[str], opponents: list[str], rounds: int, progress: frame.Progress
) -> dict[str, Any]:
    """Time one training step against PyTorch's."""
    weights = random_weights(task.config, task.seed)
    seen, unseen = task.batches(name, task.seed), task.batches(name, task.seed + 1)[:1]
    quiet: dict[str, list[float]] = {}

    def make(who: str) -> Any:
        new = side(who, task, weights)
        prepared = new.prepare(seen[0])
        quiet[who] = [*new.quiet(prepared, update=True), new.quiet(prepared)[0]]
        return new

    def on_nothing(who: str) -> Callable[[], Any]:
        small = smallest(task.config)
        one = side(who, replace(task, config=small), random_weights(small))
        prepared = one.prepare(dense_batch(small, 1, 2, task.seed))
        return lambda: one.step(prepared)

    made, skipped = frame.make_sides((*ours, *opponents), ours, make, progress)
    facts: dict[str, Any] = {"what": MEASURES[name], **sides.described(seen), "skipped": skipped}
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
    facts |= frame.timed(contestants, made, ours, lambda one: one.step(one.prepare(seen[0])), on_nothing)
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


BENCH = frame.Bench("step", MEASURES, OPPONENTS, Task, measure, "bench.step:one_step")
bench = frame.command(BENCH)

if __name__ == "__main__":
    harness.run_main(bench)
