"""What a fine-tuned model makes of examples, and how good that is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minibert.data import PackedBatch
from minibert.data.batching import pack as packed_sequences
from minibert.model.packing import Packed, Part, pack
from minibert.model.tensor import no_grad
from minibert.tasks.batches import targets_of
from minibert.tasks.metrics import Scores, finite
from minibert.tasks.task import Prepared, Task


def batch_of(task: Task, model: Any, part: Prepared, chosen: np.ndarray) -> tuple[Packed, np.ndarray]:
    """Some examples' sequences as the model takes them, and their targets."""
    flat: PackedBatch = packed_sequences(part.sequences, part.sequences_of(chosen))
    return pack(model.config, **flat.inputs), targets_of(task, part, chosen)


def in_parts(
    task: Task, model: Any, prepared: Prepared, chosen: np.ndarray, count: int
) -> Iterator[tuple[Packed, np.ndarray]]:  # fmt: skip
    """As `batch_of`, in at most `count` parts, which draw the random numbers of the whole (`minibert.train.parts`)."""
    count = min(count, len(chosen))
    lengths = np.diff(batch_of(task, model, prepared, chosen)[0].cu_seqlens) if count > 1 else np.zeros(1)
    row = sequence = 0
    for some in np.array_split(chosen, count):
        packed, targets = batch_of(task, model, prepared, some)
        yield packed._replace(part=Part(row, sequence, int(lengths.max()))), targets
        row, sequence = row + len(packed.input_ids), sequence + len(packed.first_rows)


def in_order(lengths: np.ndarray, tokens_per_batch: int) -> Iterator[np.ndarray]:
    """The numbers of examples of so many tokens, in order, as many at a time as their tokens allow."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + tokens_per_batch, side="right")))
        yield np.arange(start, stop)
        start = stop


def predict(task: Task, model: Any, part: Prepared, tokens_per_batch: int = 4096) -> np.ndarray:
    """The logits of all rows, (S, K) or (N, K) float32, dropout off."""
    return evaluated(task, model, part, tokens_per_batch, with_loss=False)[1]


def evaluate(
    task: Task, model: Any, part: Prepared, tokens_per_batch: int = 4096
) -> tuple[float | None, Scores, np.ndarray]:
    """The mean loss over what counts, the metrics, and the logits of all rows.

    The loss is None where nothing counts, or where it is no finite number.
    """
    loss, outputs = evaluated(task, model, part, tokens_per_batch, with_loss=not task.in_batch)
    if task.in_batch:
        loss = task.mean_loss(part, outputs)
    return loss, task.scores(part, outputs), outputs


def evaluated(
    task: Task, model: Any, part: Prepared, tokens_per_batch: int, with_loss: bool
) -> tuple[float | None, np.ndarray]:
    model.eval()
    loss = count = 0.0
    rows = []
    with no_grad():
        for chosen in in_order(part.lengths, tokens_per_batch):
            packed, targets = batch_of(task, model, part, chosen)
            weight = task.counted(targets) if with_loss else 0
            logits, mean = task.forward(model, packed, targets if weight else None)
            rows.append(logits.numpy().astype(np.float32))
            if mean is not None:
                loss += mean.item() * weight
                count += weight
    return (finite(loss / count) if count else None), np.concatenate(rows)


def figure_names(task: Task, part: Prepared) -> list[str]:
    """The metrics of these examples, by judging outputs of zeros: so a library that is missing is told early too."""
    return list(task.scores(part, task.no_outputs(part)).figures)
