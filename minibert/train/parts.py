"""Where memory runs out: the passes of a step in parts, which draw the random numbers of the whole.

A step is then the same up to rounding: its masked tokens and its dropout keep their bits (`philox.StreamFrom`), and the
gradients of the parts add up to those of the batch. How many parts there are is kept in the run's progress.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from minibert.data import PackedBatch
from minibert.errors import UserError, warn
from minibert.model.packing import IGNORE, Part
from minibert.tuning.tuned import TunedModel

PARTS = "parts"  # in a run's progress
MOST_EVAL_PARTS = 64  # where the parts of this size find no memory either, the model itself does not


class Divisible(Protocol):
    """A run, as far as it is asked here."""

    model: Any
    graphed: Any  # what replays steps as graphs, if something does
    progress: dict[str, Any]

    def forward_backward(self) -> tuple[float, int]:
        """Gradients and loss of a step, in the parts that `progress` says."""

    eval_parts: int  # of a batch of `evaluate`

    def most_parts(self) -> int:
        """How many parts the step can be cut into: 1 where an example's loss depends on others."""

    def evaluate(self) -> dict[str, Any]:
        """How good the model is, its batches computed in `eval_parts`; these are 0 where they cannot be cut."""


def in_memory(run: Divisible) -> tuple[float, int]:
    """`run.forward_backward`, again in twice as many parts where memory ran out. Raises MemoryError when that ends."""
    refuse_parts(run)
    while True:
        try:
            return run.forward_backward()
        except MemoryError:
            if not divisible(run) or run.progress[PARTS] >= run.most_parts():
                raise
        # Here nothing holds the arrays of that pass any more, as the error did.
        run.progress[PARTS] *= 2
        warn(
            f"step {run.progress['step'] + 1} ran out of memory: from here on each batch is computed in "
            f"{run.progress[PARTS]} parts, with the same random numbers; what it learns is the same up to rounding"
        )


def evaluated(run: Divisible) -> dict[str, Any]:
    """`run.evaluate`, again in twice as many parts where memory ran out. Raises MemoryError when that ends.

    It draws no random numbers: on every backend, with every kernel, the parts give the whole up to rounding.
    """
    while True:
        try:
            return run.evaluate()
        except MemoryError:
            if not 0 < run.eval_parts < MOST_EVAL_PARTS:
                raise
        run.eval_parts *= 2
        warn(
            f"the evaluation after step {run.progress['step']} ran out of memory: from here on each of its batches is "
            f"computed in {run.eval_parts} parts"
        )


def refuse_parts(run: Divisible) -> None:
    """Raise UserError where a run that came to parts is resumed where there can be none."""
    if run.progress[PARTS] > 1 and not divisible(run):
        raise UserError(
            f"this run came to {run.progress[PARTS]} parts of a batch, which cannot be computed so here: resume it "
            "on a backend of minibert, without kernels of your own and without graphs"
        )


def divisible(run: Divisible) -> bool:
    """Whether the passes can be cut: at the ends of sequences, where every mask can be drawn from its middle.

    Kernels of one's own, or of another's backend, may not know how, and a model that is tuned draws masks of its own. A
    graph is of a whole step.
    """
    model = run.model
    if run.graphed is not None or model.backend.swapped:
        return False
    if type(model.backend).__module__.split(".")[0] != "minibert":
        return False
    if isinstance(model, TunedModel) and model.draws_masks:
        return False
    widths = model.config.hidden_size, model.config.embedding_size
    return not any(width % 4 for width in widths)


def cut(batch: PackedBatch, count: int) -> list[tuple[PackedBatch, Part]]:
    """At most `count` parts of about as many tokens, each of whole sequences and with a token to predict."""
    ends, tokens = batch.cu_seqlens, len(batch.input_ids)
    predicted = np.concatenate([[0], np.cumsum(batch.labels != IGNORE)])[ends]
    cuts = [0]
    for k in range(1, count):
        near = int(np.abs(ends - k * tokens / count).argmin())
        if predicted[cuts[-1]] < predicted[near] < predicted[-1]:
            cuts.append(near)
    longest = int(np.diff(ends).max()) if len(cuts) > 1 else 0
    return [
        (slice_of(batch, first, last), Part(int(ends[first]), first, longest))
        for first, last in zip(cuts, [*cuts[1:], len(ends) - 1], strict=True)
    ]


def slice_of(batch: PackedBatch, first: int, last: int) -> PackedBatch:
    """Sequences first .. last."""
    start, stop = batch.cu_seqlens[[first, last]]
    follows = batch.next_sentence_label
    return PackedBatch(
        input_ids=batch.input_ids[start:stop],
        position_ids=batch.position_ids[start:stop],
        token_type_ids=batch.token_type_ids[start:stop],
        cu_seqlens=batch.cu_seqlens[first : last + 1] - start,
        labels=batch.labels[start:stop],
        next_sentence_label=None if follows is None else follows[first:last],
    )
