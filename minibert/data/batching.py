"""Sequences to packed batches within a budget of tokens, the same batch for the same step at any time.

A batch is flat: the tokens of its sequences one after the other, `cu_seqlens` the offsets. Nothing is padded.
B sequences in a batch, N tokens, S sequences in all, T the padded length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from minibert.data.masking import SHUFFLE_STREAM, MaskingRule, check_seed, mask_tokens, shuffled
from minibert.data.sequences import Sequences
from minibert.errors import UserError
from minibert.kernels.philox import Stream
from minibert.model.packing import IGNORE


@dataclass(frozen=True)
class PackedBatch:
    """B sequences of N tokens in all."""

    input_ids: np.ndarray  # (N,) int32
    position_ids: np.ndarray  # (N,) int32: 0, 1, 2 ... within each sequence
    token_type_ids: np.ndarray  # (N,) int32: 1 in the second of two segments
    cu_seqlens: np.ndarray  # (B + 1,) int32
    labels: np.ndarray  # (N,) int64: the token to predict, -100 where none is
    next_sentence_label: np.ndarray | None = None  # (B,) int64

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model reads, by its arguments."""
        names = ("input_ids", "token_type_ids", "position_ids", "cu_seqlens")
        return {name: getattr(self, name) for name in names}

    @property
    def counted(self) -> int:
        """What the loss is the mean of."""
        return int((self.labels >= 0).sum())

    def loss(self, model: Any) -> Any:
        """What a training step of the model lowers, as a tensor."""
        return model(**self.inputs, labels=self.labels, return_dict=True).loss

    def infer(self, model: Any) -> Any:
        """What the model is used for once it is trained, as a tensor: (N, C), the encoder's output."""
        return model.base_model(**self.inputs, return_dict=True).last_hidden_state


class Batches:
    """Packed batches, addressable by step: the same step gives the same batch at any time.

    In each epoch every sequence comes once, in an order drawn from (seed, epoch); a batch takes sequences until the
    next would exceed `tokens_per_batch`, so lengths mix, and the last batch of an epoch holds what is left.
    With `masking` the batch at `step` is masked by (seed, step); without, nothing is predicted.
    """

    def __init__(
        self, sequences: Sequences, tokens_per_batch: int, seed: int = 0, masking: MaskingRule | None = None,
        lengths: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """`lengths` are the tokens of what is not to be parted, where that is more than a sequence."""
        self.lengths = sequences.lengths if lengths is None else lengths
        longest = int(self.lengths.max())
        if tokens_per_batch < longest:
            raise UserError(
                f"expected tokens_per_batch of at least {longest}, the length of the longest sequence, "
                f"got {tokens_per_batch}: raise it or lower max_seq_length"
            )
        check_seed(seed)
        self.sequences, self.tokens_per_batch, self.seed, self.masking = sequences, tokens_per_batch, seed, masking
        self.first_steps = [0]  # the step at which each epoch begins, as far as known
        self.plans: dict[int, list[np.ndarray]] = {}  # the plan of the epoch in use

    def batch(self, step: int) -> PackedBatch:
        """The batch of a step, counted from 0 through all epochs."""
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        batch = pack(self.sequences, self.chosen(step))
        if self.masking is None:
            return batch
        visible, labels = mask_tokens(batch.input_ids, self.masking, self.seed, step)
        return replace(batch, input_ids=visible, labels=labels)

    def chosen(self, step: int) -> np.ndarray:
        """The numbers of a batch's sequences, or of what they belong to."""
        epoch = self.epoch_of(step)
        return self.plan(epoch)[step - self.first_steps[epoch]]

    def epoch_of(self, step: int) -> int:
        """Epochs differ in their number of batches, so the first search plans every epoch up to the step."""
        while self.first_steps[-1] <= step:
            self.first_steps.append(self.first_steps[-1] + self.steps_in_epoch(len(self.first_steps) - 1))
        return int(np.searchsorted(self.first_steps, step, side="right")) - 1

    def steps_in_epoch(self, epoch: int) -> int:
        return len(self.plan(epoch))

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The numbers of the sequences in each batch of an epoch."""
        if epoch not in self.plans:
            order = shuffled(len(self.lengths), Stream(self.seed, SHUFFLE_STREAM, epoch))
            ends = np.cumsum(self.lengths[order])
            cuts, done = [0], 0
            while cuts[-1] < len(order):
                cuts.append(int(np.searchsorted(ends, done + self.tokens_per_batch, side="right")))
                done = ends[cuts[-1] - 1]
            self.plans = {epoch: [order[a:b] for a, b in pairwise(cuts)]}
        return self.plans[epoch]


def pack(sequences: Sequences, chosen: np.ndarray) -> PackedBatch:
    """The chosen sequences (B,), one after the other, nothing predicted."""
    lengths = sequences.lengths[chosen]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    positions = np.arange(cu_seqlens[-1], dtype=np.int32) - np.repeat(cu_seqlens[:-1], lengths)
    input_ids = sequences.ids[positions + np.repeat(sequences.offsets[chosen], lengths)]
    labels = sequences.next_sentence_labels
    return PackedBatch(
        input_ids=input_ids,
        position_ids=positions,
        token_type_ids=(positions >= np.repeat(sequences.second[chosen], lengths)).astype(np.int32),
        cu_seqlens=cu_seqlens,
        labels=np.full(len(input_ids), IGNORE, dtype=np.int64),
        next_sentence_label=None if labels is None else labels[chosen],
    )


def pad(batch: PackedBatch, pad_id: int = 0) -> dict[str, np.ndarray]:
    """The padded form of Hugging Face: input_ids, attention_mask, token_type_ids, labels, each (B, T) int64.

    With sentence pairs also next_sentence_label (B,).
    """
    lengths = np.diff(batch.cu_seqlens)
    real = np.arange(lengths.max()) < lengths[:, None]  # (B, T): row by row in the packed order

    def spread(values: np.ndarray, filler: int) -> np.ndarray:
        padded = np.full(real.shape, filler, dtype=np.int64)
        padded[real] = values
        return padded

    padded = {
        "input_ids": spread(batch.input_ids, pad_id),
        "attention_mask": real.astype(np.int64),
        "token_type_ids": spread(batch.token_type_ids, 0),
        "labels": spread(batch.labels, IGNORE),
    }
    if batch.next_sentence_label is not None:
        padded["next_sentence_label"] = batch.next_sentence_label
    return padded
