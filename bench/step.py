"""One training step, ours and PyTorch's in turn: `python -m bench.step --config minilm --vs torch [--json FILE]`.

Forward, loss, backward, clipping and AdamW, dropout 0.1; the same weights, ids, dropout rates and threads. Three
measures, kept apart, since they do not answer the same question:

same work    a loss on every position: both sides make logits, loss and gradient for all of them
masked head  15 % of the positions are predicted: ours runs the head on those, torch on all, as BertForMaskedLM does
packed       real text of real lengths: ours packs it, torch pads to the longest of each batch, with its attention mask

PyTorch is transformers' BertForMaskedLM where that is installed, with sdpa and fused AdamW; "torch.bf16" is the same
under autocast. Before the timing and, on inputs not seen, after it, loss and gradient norm without dropout are
compared; where they differ nothing is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.peers import torch_bert as torch_peer
from bench.timing import frame, harness
from bench.timing.batches import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Batch, dense_batch, work
from minibert import backends
from minibert.backends import Backend
from minibert.model.config import BertConfig
from minibert.train.optim import AdamW, parameter_groups

MEASURES = {
    "same_work": "same work: a loss on every position",
    "masked_head": "masked head: 15 % of the positions predicted, ours runs the head on those alone",
    "packed": "packed: real text; ours packs it, torch pads it to the longest of each batch",
}
OPPONENTS = ("torch", "torch.bf16", "torch.compile", "numba.float32")
SAME = 1e-3  # relative: figures without dropout further apart are not those of the same work
NEAR = 0.03  # where one of the two multiplies in fewer bits


@dataclass(frozen=True)
class Task(frame.Task):
    """What is to be measured."""

    def batches(self, measure: str, seed: int) -> list[Batch]:
        if measure == "same_work":
            return [dense_batch(self.config, self.batch, self.length, seed, share=1.0)]
        return super().batches(measure, seed)


class OurTraining(frame.Ours):
    """minibert's model and optimiser on one backend."""

    def __init__(
        self, config: BertConfig, weights: torch_peer.Weights, backend: Backend, dtype: str = "float32"
    ) -> None:
        super().__init__(config, weights, backend, dtype)
        self.weights = weights
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


def side(name: str, task: Task, weights: torch_peer.Weights, example: Batch) -> Any:
    """The side of this name: a backend of ours, or torch in one of its ways."""
    if name.endswith(frame.IN_FLOAT32):
        ours = OurTraining(task.config, weights, backends.get(name.removesuffix(frame.IN_FLOAT32)))
        ours.name = name
        return ours
    if name in OPPONENTS:
        return torch_peer.TorchTraining(
            task.config, weights, task.threads, compiled=name.endswith("compile"), bfloat16=name.endswith("bf16")
        )
    return OurTraining(task.config, weights, backends.get(name), task.dtype)


def turn(one: Any, prepared: Any) -> float:
    return float(one.step(prepared))


def flops(task: Task, batch: Batch, theirs: bool) -> int:
    """Of a step. Three times the forward pass: the backward has two products for each of its."""
    head = "every" if theirs else "predicted"  # with a loss on every position the same
    return 3 * work(task.config, batch, theirs, head)


def found(one: Any, batch: Batch, timed: bool) -> Sequence[float]:
    """Loss and gradient norm by the weights of the beginning; before the timing, the loss after an update too."""
    prepared = one.prepare(batch)
    if timed:
        one.reload()
        return one.quiet(prepared)
    return [*one.quiet(prepared, update=True), one.quiet(prepared)[0]]


def judge(facts: dict[str, Any], each: Mapping[str, Sequence[float]], timed: bool) -> None:
    """Without dropout all sides must find the same."""
    names = ("loss", "gradient_norm", *(() if timed else ("loss_after_update",)))
    facts["fresh_without_dropout" if timed else "without_dropout"] = {
        who: dict(zip(names, values, strict=True)) for who, values in each.items()
    }
    few = facts["fewer_bits"] = frame.in_fewer_bits(facts)
    near = each if next(iter(each)) in few else few  # whatever is compared with fewer bits
    facts["refused"] = harness.apart(each, SAME, dict.fromkeys(near, NEAR))


BENCH = frame.Bench(
    "step", "Time one training step against PyTorch's.", MEASURES, OPPONENTS, Task, side, turn, flops, found, judge,
    worker="bench.step:one_step",
)  # fmt: skip
measure, one_step = partial(frame.measure, BENCH), partial(frame.peak, BENCH)
bench = frame.command(BENCH)

if __name__ == "__main__":
    harness.run_main(bench)
