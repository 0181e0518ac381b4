"""Pretraining: steps over packed batches, held-out evaluation, a log, and a state from which a run goes on exactly.

    data = prepare(read_documents(["speeches.txt"]), tokenizer, config)
    trainer = Trainer(BertForMaskedLM(bert_config, backend="numba", seed=config.seed), data, config, "folder")
    for kind, record in trainer.run():
        print(kind, record)

What a step does is named by its number alone (its batch, masks and dropout are drawn by Philox from seed and step), so
a run that was stopped goes on with the same bits as one that was not.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from minibert.data import (
    Batches,
    Document,
    PackedBatch,
    Sequences,
    check_vocabulary,
    continuing_pieces,
    encode,
    make_sequences,
    masking_rule,
    special_ids,
    split,
    vocabulary_size,
)
from minibert.errors import UserError
from minibert.kernels.cross_entropy import cross_entropy
from minibert.kernels.op import Array
from minibert.model.bert import BertForMaskedLM
from minibert.model.electra_pair import ElectraPair
from minibert.model.packing import IGNORE, Packed, pack
from minibert.model.tensor import Tensor, no_grad
from minibert.train.config import TrainingConfig
from minibert.train.failed_step import FailedStep
from minibert.train.graphed import GraphedSteps
from minibert.train.loop import Loop, Record, demand_finite, shares
from minibert.train.optim import AdamW, parameter_groups
from minibert.train.parts import PARTS, cut, refuse_parts


class Data(NamedTuple):
    """Text made ready: sequences to train on, those held out, how many tokens were read and how frequent each is."""

    tokenizer: Tokenizer
    train: Sequences
    held_out: Sequences
    tokens: int  # of the whole text, [CLS] and [SEP] not among them
    unigram: np.ndarray  # (V,) float64: log of each token's share of the training text, one added to each count

    @property
    def fingerprint(self) -> int:
        """A checksum: a run goes on with the text it began with."""
        return zlib.crc32(self.held_out.ids.tobytes(), zlib.crc32(self.train.ids.tobytes()))


def prepare(documents: Sequence[Document], tokenizer: Tokenizer, config: TrainingConfig) -> Data:
    """Encode, hold documents out, cut into sequences. Raises UserError where the text is too short."""
    special, encoded = special_ids(tokenizer), encode(documents, tokenizer)
    if config.next_sentence and encoded and all(len(document) == 1 for document in encoded):
        raise UserError(
            f"next_sentence: each of {len(encoded)} documents has a single sentence, so that none follows another: "
            "name another document separator, or leave it out"
        )
    train, held_out = (
        make_sequences(part, special, config.max_seq_length, config.next_sentence, config.seed)
        for part in split(encoded, config.held_out, config.seed)
    )
    tokens = sum(len(sentence) for document in encoded for sentence in document)
    counts = np.bincount(train.ids, minlength=vocabulary_size(tokenizer)) + 1.0
    counts[list(special)] = 1.0
    return Data(tokenizer, train, held_out, tokens, np.log(counts / counts.sum()))


class Trainer(Loop):
    """A run of pretraining (see `Loop`). Raises UserError where model, text and config do not fit."""

    config: TrainingConfig

    def __init__(
        self, model: BertForMaskedLM | ElectraPair, data: Data, config: TrainingConfig, output: str | Path,
        options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        check_vocabulary(data.tokenizer, model.config.vocab_size)
        if config.max_seq_length > model.config.max_position_embeddings:
            raise UserError(
                f"expected max_seq_length of at most {model.config.max_position_embeddings}, the model's positions, "
                f"got {config.max_seq_length}: lower it"
            )
        groups = parameter_groups(model, config.weight_decay)
        super().__init__(model, data.tokenizer, config, config.max_steps, AdamW.of(config, groups), output, options)
        self.data = data
        rule = masking_rule(
            special_ids(data.tokenizer), vocabulary_size(data.tokenizer), config.mlm_probability,
            continuing_pieces(data.tokenizer) if config.whole_word_mask else None,
        )  # fmt: skip
        self.batches = Batches(data.train, config.tokens_per_batch, config.seed, rule)
        # With another seed, so that the masks have nothing to do with those of training.
        held_out = Batches(data.held_out, config.tokens_per_batch, config.seed ^ 0x5EED, rule)
        count = min(held_out.steps_in_epoch(0), -(-config.eval_tokens // config.tokens_per_batch))
        self.held_out = [held_out.batch(i) for i in range(count)]
        if config.graph and isinstance(model, BertForMaskedLM):
            self.graphed = GraphedSteps(model, self.optimizer, config.tokens_per_batch)
        # Batches of this step and, early, of the next: by pass and by how many parts it is in.
        self.made: dict[tuple[int, int], list[tuple[PackedBatch, Packed]]] = {}

    @property
    def fingerprint(self) -> int:
        return self.data.fingerprint

    def eval_due(self) -> bool:
        return self.step % self.config.eval_steps == 0

    @property
    def unigram_loss(self) -> float:
        """Cross entropy of guessing held-out masked tokens by their frequency in the training text: to be beaten."""
        labels = np.concatenate([batch.labels[batch.labels != IGNORE] for batch in self.held_out])
        return float(-self.data.unigram[labels].mean())

    def update(self) -> tuple[float, int]:
        """As `Loop.update`, op by op or by graph."""
        result = super().update() if self.graphed is None else self.update_by_graph(self.graphed)
        done = (self.step + 1) * self.config.gradient_accumulation_steps
        self.made = {which: parts for which, parts in self.made.items() if which[0] >= done}
        return result

    def update_by_graph(self, graphed: GraphedSteps) -> tuple[float, int]:
        """The same, where the step's shape has come before, in two calls of the device."""
        refuse_parts(self)
        self.model.train()
        ((batch, packed),) = self.packed(self.step)
        loss, square_norm, recorded = graphed.gradients(packed, self.step)
        graphed.prepare(self.packed(self.step + 1)[0][1])  # uploaded by the graph itself
        value = float(self.model.backend.numpy(loss))
        demand_finite(value)
        self.optimizer.check_norm(square_norm)
        graphed.update(recorded, square_norm)
        return value, len(batch.input_ids)

    @np.errstate(all="ignore")  # the guard sees what NumPy would warn of, and says where it began
    def forward_backward(self) -> tuple[float, int]:
        """Gradients and loss of the step's batches as if they were one batch; and their tokens.

        The loss of a head is a mean, so a pass counts by what it is the mean of: predicted tokens, or `second_count`.
        """
        passes = self.config.gradient_accumulation_steps
        self.model.train()
        self.optimizer.zero_grad()
        numbers = range(self.step * passes, (self.step + 1) * passes)
        parts = [(number, *part) for number in numbers for part in self.packed(number)]
        predicted = shares([int((batch.labels != IGNORE).sum()) for _, batch, _ in parts])
        second = shares([self.second_count(batch) for _, batch, _ in parts])
        loss, self.measured = 0.0, {}
        for (number, batch, packed), share, second_share in zip(parts, predicted, second, strict=True):
            self.model.step = self.number = number  # names the dropout masks
            mean = self.mean_of(batch, packed, share, second_share)
            mean.backward(np.asarray(share))
            self.prepare(number + 1)
            loss += mean.item() * share
        return loss, sum(len(batch.input_ids) for _, batch, _ in parts)

    def most_parts(self) -> int:
        passes = self.config.gradient_accumulation_steps
        numbers = range(self.step * passes, (self.step + 1) * passes)
        return max(len(self.batches.chosen(number)) for number in numbers)

    def failed_step(self) -> FailedStep | None:
        if self.config.next_sentence:  # whose loss a batch of `minibert diff` has not
            return None
        batch = {name: array for name, array in vars(self.batches.batch(self.number)).items() if array is not None}
        return FailedStep(batch, self.config.objective, self.model.place.dtype, self.config.seed, self.number)

    def second_count(self, batch: PackedBatch) -> int:
        """What the loss of the second head is the mean of."""
        return len(batch.cu_seqlens) - 1

    def mean_of(self, batch: PackedBatch, packed: Packed, share: float, second_share: float) -> Tensor:
        """The loss of a pass, whose two heads have these shares of the step: for the first head's mean."""
        out = self.model(packed, return_dict=True)
        if batch.next_sentence_label is None:
            return out.loss
        return out.loss + out.next_sentence_loss(batch.next_sentence_label) * (second_share / share)

    def packed(self, number: int) -> list[tuple[PackedBatch, Packed]]:
        """The batch of a pass as the model takes it, in its parts, kept until its step is done."""
        which = number, self.progress[PARTS]
        if which not in self.made:
            parts = cut(self.batches.batch(number), self.progress[PARTS])
            self.made[which] = [(batch, self.pack(batch, batch.labels)._replace(part=part)) for batch, part in parts]
        return self.made[which]

    def pack(self, batch: PackedBatch, labels: np.ndarray | None) -> Packed:
        return pack(
            self.model.config, batch.input_ids, token_type_ids=batch.token_type_ids, position_ids=batch.position_ids,
            labels=labels, cu_seqlens=batch.cu_seqlens,
        )  # fmt: skip

    def prepare(self, number: int) -> None:
        """While the device is still at work, make a batch of the next step, and begin to upload that of pass `number`.

        A step's batches are made before its first pass, which must know how many tokens all of them predict.
        """
        passes = self.config.gradient_accumulation_steps
        for each in (number + passes - 1, number):
            if each < self.config.max_steps * passes:
                self.packed(each)
        if parts := self.made.get((number, self.progress[PARTS])):
            self.model.backend.upload_ahead([a for a in parts[0][1] if isinstance(a, np.ndarray)])

    # ------------------------------------------------------------------------------------------------------ evaluation

    def evaluate(self) -> Record:
        """Loss and accuracy on the held-out masked tokens: always the same ones, dropout off."""
        self.model.eval()
        loss = hits = count = 0.0
        follows: list[np.ndarray] = []
        with no_grad():
            for batch in (part for whole in self.held_out for part, _ in cut(whole, self.eval_parts)):
                out = self.model(self.pack(batch, None), return_dict=True)
                index = np.flatnonzero(batch.labels != IGNORE)
                labels = batch.labels[index]
                logits = out.logits_at(index)
                hits += np.count_nonzero(logits.numpy().argmax(axis=-1) == labels)
                loss += self.mean_loss(logits.data, labels) * len(labels)
                count += len(labels)
                if batch.next_sentence_label is not None:
                    follows.append(out.seq_relationship_logits.numpy().argmax(axis=-1) == batch.next_sentence_label)
        record = {"eval_loss": loss / count, "eval_accuracy": float(hits / count)}
        if follows:
            record["eval_next_sentence_accuracy"] = float(np.concatenate(follows).mean())
        return {**record, "unigram_loss": self.unigram_loss}

    def mean_loss(self, logits: Array, labels: np.ndarray) -> float:
        backend = self.model.backend
        return float(backend.numpy(backend.run(cross_entropy, logits, backend.asarray(labels))[0]))
