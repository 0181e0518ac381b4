"""What both sides of a benchmark are given: the same weights, the same batches: packed for us, padded for others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from minibert.data import (
    SHIPPED_TEXT,
    SHIPPED_VOCABULARY,
    encode,
    load_tokenizer,
    make_sequences,
    mask_tokens,
    masking_rule,
    pad,
    read_documents,
    special_ids,
    vocabulary_size,
)
from minibert.data.batching import PackedBatch
from minibert.data.batching import pack as lay_together
from minibert.errors import UserError
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import BertConfig
from minibert.model.packing import IGNORE, Packed, pack

PREDICTED = 0.15  # share of the tokens, as BERT was trained
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 0.01, 1.0
SEQUENCES = ("filled", "sentences")


class Batch:
    """B sequences, of which some positions are predicted."""

    def __init__(self, config: BertConfig, flat: PackedBatch) -> None:
        self.packed: Packed = pack(config, flat.input_ids, labels=flat.labels, cu_seqlens=flat.cu_seqlens)
        self.padded = {name: np.ascontiguousarray(a) for name, a in pad(flat, config.pad_token_id).items()}  # (B, T)

    @property
    def lengths(self) -> np.ndarray:  # (B,)
        return np.diff(self.packed.cu_seqlens)

    @property
    def predicted(self) -> int:
        return 0 if self.packed.predicted is None else len(self.packed.predicted)

    @cached_property
    def real(self) -> np.ndarray:  # (B, T): False on padding
        return self.padded["attention_mask"] != 0


def dense_batch(config: BertConfig, batch: int, length: int, seed: int, share: float = PREDICTED) -> Batch:
    """B random sequences of T tokens each; the share of their positions that is predicted is drawn at random."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, config.vocab_size, batch * length).astype(np.int32)
    chosen = rng.permutation(ids.size)[: max(1, round(share * ids.size))]
    labels = np.full(ids.size, IGNORE, np.int64)
    labels[chosen] = rng.integers(1, config.vocab_size, len(chosen))
    positions = np.tile(np.arange(length, dtype=np.int32), batch)
    ends = np.arange(batch + 1, dtype=np.int32) * length
    return Batch(config, PackedBatch(ids, positions, np.zeros_like(ids), ends, labels))


def text_batches(config: BertConfig, batch: int, length: int, count: int, seed: int, kind: str) -> list[Batch]:
    """`count` batches of B sequences of the shipped text, masked as in pretraining, with the lengths that they have.

    `kind` is "filled" (whole sentences up to T tokens, as `minibert pretrain` lays them) or "sentences" (one each).
    Raises UserError where the vocabulary of the text does not fit the model.
    """
    tokenizer = load_tokenizer(SHIPPED_VOCABULARY)
    if vocabulary_size(tokenizer) > config.vocab_size:
        raise UserError(f"the shipped text needs a vocabulary of {vocabulary_size(tokenizer)}, got {config.vocab_size}")
    special = special_ids(tokenizer)
    documents = encode(read_documents([SHIPPED_TEXT]), tokenizer)
    if kind == "sentences":
        documents = [[sentence] for document in documents for sentence in document]
    sequences = make_sequences(documents, special, length)
    rule = masking_rule(special, vocabulary_size(tokenizer))
    order = np.random.default_rng(seed).permutation(len(sequences))
    chosen = np.resize(order, (count, batch))  # begins again where the text is too short
    found = []
    for number, which in enumerate(chosen):
        flat = lay_together(sequences, which)
        visible, labels = mask_tokens(flat.input_ids, rule, seed, number)
        if (labels == IGNORE).all():  # in a few short sequences: a batch must have a loss
            labels[1] = flat.input_ids[1]
        found.append(Batch(config, replace(flat, input_ids=visible, labels=labels)))
    return found


def random_weights(config: BertConfig, seed: int = 0, architecture: Any = BertForMaskedLM) -> dict[str, np.ndarray]:
    """By Hugging Face's names, as BERT begins; drawn by NumPy in float32, which takes seconds less than Philox."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, parameter in parameters_of(config, architecture):
        shape, begin = parameter.declared_shape, parameter.begin
        if begin == "normal":
            found[name] = rng.standard_normal(shape, np.float32) * np.float32(config.initializer_range)
        else:
            found[name] = np.full(shape, begin == "ones", np.float32)
    return found


def parameters_of(config: BertConfig, architecture: Any = BertForMaskedLM) -> Iterator[tuple[str, Any]]:
    """Names, shapes and beginnings of the parameters."""
    return architecture(config, "numpy", "float32", initialise=False).named_parameters()


def smallest(config: BertConfig) -> BertConfig:
    """A model of the same layers, with as good as nothing to compute."""
    heads = config.num_attention_heads
    return replace(config, hidden_size=heads, intermediate_size=1, vocab_size=8, max_position_embeddings=8)


def forward_flops(config: BertConfig, lengths: np.ndarray, head_rows: int) -> int:
    """Of the products of one forward pass over sequences of these lengths, with the head on so many rows."""
    tokens, c, i = int(lengths.sum()), config.hidden_size, config.intermediate_size
    pairs = int((lengths.astype(np.int64) ** 2).sum())
    layer = 2 * tokens * (4 * c * c + 2 * c * i) + 4 * pairs * c
    return config.num_hidden_layers * layer + 2 * head_rows * (c * c + c * config.vocab_size)


def work(config: BertConfig, batch: Batch, padded: bool, head: str) -> int:
    """Flops of a forward pass: over the padding or not, the head on "no" row, on the "predicted" or on "every" one."""
    count, longest = len(batch.lengths), int(batch.lengths.max())
    lengths = np.full(count, longest) if padded else batch.lengths
    rows = {"no": 0, "predicted": batch.predicted, "every": int(lengths.sum())}[head]
    return forward_flops(config, lengths, rows)
