"""Packed batches of labelled examples: what a step of fine-tuning takes, as `minibert.data.Batches` of plain text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minibert.data import Batches, PackedBatch
from minibert.data.batching import pack as packed_sequences
from minibert.model.packing import Packed, pack
from minibert.tasks.task import Prepared, Task


@dataclass(frozen=True, kw_only=True)
class TaskBatch(PackedBatch):
    """Examples of a task. Its `labels` are the task's targets: a row for each example, or for each token."""

    task: Task

    @property
    def counted(self) -> int:
        return self.task.counted(self.labels)

    def packed(self, model: Any) -> Packed:
        return pack(model.config, **self.inputs)

    def loss(self, model: Any) -> Any:
        return self.task.forward(model, self.packed(model), self.labels)[1]

    def infer(self, model: Any) -> Any:
        """(B or N, K), the logits; to embed (B, C), the vectors."""
        return self.task.forward(model, self.packed(model))[0]


class TaskBatches(Batches):
    """Of prepared examples, by step; one that is longer than `tokens_per_batch` is a batch by itself.

    Where the loss of one depends on others, there is room for two.
    """

    def __init__(self, task: Task, part: Prepared, tokens_per_batch: int, seed: int = 0) -> None:
        least = np.sort(part.lengths)[-2 if task.in_batch else -1 :].sum()
        super().__init__(part.sequences, max(tokens_per_batch, int(least)), seed, lengths=part.lengths)
        self.task, self.part = task, part

    def batch(self, step: int) -> TaskBatch:
        """As `Batches.batch`, with targets."""
        chosen = self.chosen(step)
        fields = vars(packed_sequences(self.sequences, self.part.sequences_of(chosen)))
        return TaskBatch(**fields | {"labels": targets_of(self.task, self.part, chosen)}, task=self.task)


def targets_of(task: Task, part: Prepared, chosen: np.ndarray) -> np.ndarray:
    """The targets of some examples: their rows, or those of their tokens; zeros where the examples have none."""
    if part.targets is None:
        return np.zeros(len(chosen))
    if task.of_tokens and len(part.targets) == len(part.sequences.ids):
        offsets = part.sequences.offsets
        return np.concatenate([part.targets[offsets[i] : offsets[i + 1]] for i in chosen])
    return np.asarray(part.targets[chosen])
