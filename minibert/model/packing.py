"""The door of the model: padded (B, T) batches in, packed (N,) tokens inside, padded again on the way out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minibert.errors import UserError
from minibert.kernels.cross_entropy import IGNORED
from minibert.model.config import BertConfig

IGNORE = IGNORED  # the label of a position that is not predicted


class Packed(NamedTuple):
    """The N real tokens of B sequences, one after the other. `rows` is where each stood in the padded batch."""

    input_ids: np.ndarray  # (N,)
    position_ids: np.ndarray  # (N,)
    token_type_ids: np.ndarray  # (N,)
    cu_seqlens: np.ndarray  # (B + 1,)
    labels: np.ndarray | None  # (N,), -100 where nothing is predicted
    rows: np.ndarray | None  # (N,), None where the batch came packed
    padded_shape: tuple[int, int] | None  # (B, T)
    predicted: np.ndarray | None = None  # (M,) the rows that have a label
    targets: np.ndarray | None = None  # (M,) their labels

    @property
    def first_rows(self) -> np.ndarray:
        """(B,) row of each sequence's first token, [CLS]."""
        return self.cu_seqlens[:-1]


def pack(
    config: BertConfig,
    input_ids: Any,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    labels: Any = None,
    cu_seqlens: Any = None,
) -> Packed:
    """Check a batch and lay its real tokens one after the other.

    `input_ids` is (B, T), with an `attention_mask` (B, T) of 0 and 1; or (N,) together with `cu_seqlens` (B + 1,),
    already packed. Positions are columns of the padded batch, as in Hugging Face's models. Raises UserError for ids,
    positions or shapes that the model cannot take.
    """
    ids = _integers("input_ids", input_ids)
    if cu_seqlens is not None:
        return _already_packed(config, ids, attention_mask, token_type_ids, position_ids, labels, cu_seqlens)
    if ids.ndim != 2:
        raise UserError(f"input_ids: expected shape (B, T), or (N,) with cu_seqlens, got {ids.shape}")
    mask = np.ones(ids.shape, bool) if attention_mask is None else _like("attention_mask", attention_mask, ids) != 0
    if not mask.any(axis=1).all():
        raise UserError(
            f"attention_mask: sequence {int(np.flatnonzero(~mask.any(axis=1))[0])} has no token; leave it out"
        )
    rows = np.flatnonzero(mask).astype(np.int32)

    def real(name: str, given: Any, default: np.ndarray) -> np.ndarray:
        return np.broadcast_to(default if given is None else _like(name, given, ids), ids.shape).reshape(-1)[rows]

    packed = Packed(
        input_ids=ids.reshape(-1)[rows],
        position_ids=real("position_ids", position_ids, np.arange(ids.shape[1])),
        token_type_ids=real("token_type_ids", token_type_ids, np.zeros(1, np.int32)),
        cu_seqlens=np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int32),
        labels=None if labels is None else real("labels", labels, ids),
        rows=rows,
        padded_shape=(ids.shape[0], ids.shape[1]),
    )
    return _checked(config, packed)


def _already_packed(
    config: BertConfig, ids: np.ndarray, attention_mask: Any, token_type_ids: Any, position_ids: Any, labels: Any,
    cu_seqlens: Any,
) -> Packed:  # fmt: skip
    ends = _integers("cu_seqlens", cu_seqlens)
    if (
        ids.ndim != 1
        or ends.ndim != 1
        or len(ends) < 2
        or ends[0] != 0
        or ends[-1] != len(ids)
        or (np.diff(ends) < 1).any()
    ):
        raise UserError(
            "cu_seqlens: expected growing offsets from 0 to the number of tokens of a 1-D input_ids, "
            f"got {ends.tolist()[:8]} for input_ids of shape {ids.shape}"
        )
    if attention_mask is not None:
        raise UserError("attention_mask: a packed batch (cu_seqlens) has no padding to mask; leave it out")
    columns = np.arange(len(ids)) - np.repeat(ends[:-1], np.diff(ends))
    packed = Packed(
        ids,
        columns if position_ids is None else _like("position_ids", position_ids, ids),
        np.zeros_like(ids) if token_type_ids is None else _like("token_type_ids", token_type_ids, ids),
        ends.astype(np.int32),
        None if labels is None else _like("labels", labels, ids),
        rows=None,
        padded_shape=None,
    )
    return _checked(config, packed)


def _checked(config: BertConfig, packed: Packed) -> Packed:
    _within("input_ids", packed.input_ids, config.vocab_size, "the vocabulary (vocab_size)")
    _within("position_ids", packed.position_ids, config.max_position_embeddings, "positions (max_position_embeddings)")
    _within("token_type_ids", packed.token_type_ids, config.type_vocab_size, "token types (type_vocab_size)")
    if packed.labels is not None:
        _within("labels", packed.labels[packed.labels != IGNORE], config.vocab_size, "the vocabulary (vocab_size)")
    if packed.labels is not None:
        predicted = np.flatnonzero(packed.labels != IGNORE).astype(np.int32)
        packed = packed._replace(predicted=predicted, targets=packed.labels[predicted].astype(np.int32))
    return packed._replace(
        input_ids=packed.input_ids.astype(np.int32),
        position_ids=packed.position_ids.astype(np.int32),
        token_type_ids=packed.token_type_ids.astype(np.int32),
    )


class FixedShape(NamedTuple):
    """The axes that a captured step depends on."""

    tokens: int  # N
    sequences: int  # B
    predicted: int  # M
    longest: int  # tokens of the longest sequence


def in_fixed_shape(packed: Packed, tokens: int, pad_id: int) -> tuple[Packed, FixedShape]:
    """A batch of at most `tokens` tokens filled up, so that few shapes serve all batches; nothing that counts changes.

    Sequences of `pad_id` follow the real ones (no other sees them), then empty ones up to a multiple of 8; to the
    predicted rows come row 0 again, with the label that counts for nothing, up to a multiple of 32.
    """
    lengths = np.diff(packed.cu_seqlens)
    longest, missing = int(lengths.max()), tokens - len(packed.input_ids)
    more = [min(longest, missing - start) for start in range(0, missing, longest)]
    empty = -(len(lengths) + len(more)) % 8
    lengths = np.concatenate([lengths, more, np.zeros(empty)]).astype(np.int32)
    columns = np.concatenate([np.arange(n) for n in more]) if more else np.zeros(0)
    zeros = np.zeros(missing)

    def longer(values: np.ndarray, fill: np.ndarray) -> np.ndarray:
        return np.concatenate([values, fill]).astype(values.dtype)

    filled = packed._replace(
        input_ids=longer(packed.input_ids, zeros + pad_id),
        position_ids=longer(packed.position_ids, columns),
        token_type_ids=longer(packed.token_type_ids, zeros),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
    )
    count = 0
    if packed.labels is not None and packed.predicted is not None and packed.targets is not None:
        fill = np.zeros(-len(packed.predicted) % 32)
        filled = filled._replace(
            labels=longer(packed.labels, zeros + IGNORE),
            predicted=longer(packed.predicted, fill),
            targets=longer(packed.targets, fill + IGNORE),
        )
        count = len(packed.predicted) + len(fill)
    return filled, FixedShape(tokens, len(lengths), count, longest)


def sentence_labels(given: Any, count: int) -> np.ndarray:
    """(B,) labels of the next-sentence head, 0 or 1. Raises UserError for any other."""
    labels = _integers("next_sentence_label", given)
    if labels.size != count or labels.ndim > 2:
        raise UserError(f"next_sentence_label: expected one for each of {count} sequences, got shape {labels.shape}")
    _within("next_sentence_label", labels, 2, "the head (0: the second follows, 1: it does not)")
    return labels.reshape(-1)


def _integers(name: str, given: Any) -> np.ndarray:
    try:
        array = np.asarray(given)
    except ValueError as error:  # rows of unequal length
        raise UserError(f"{name}: expected an array of integers, got rows that do not line up ({error})") from None
    if array.dtype.kind not in "iub" or array.size == 0:
        raise UserError(f"{name}: expected a non-empty array of integers, got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64, copy=False)


def _like(name: str, given: Any, ids: np.ndarray) -> np.ndarray:
    array = _integers(name, given)
    if array.shape != ids.shape and not (name == "position_ids" and array.shape == (1, *ids.shape[1:])):
        raise UserError(f"{name}: expected the shape of input_ids, {ids.shape}, got {array.shape}")
    return array


def _within(name: str, ids: np.ndarray, count: int, of_what: str) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= count):
        worst = ids.max() if ids.max() >= count else ids.min()
        raise UserError(f"{name}: {int(worst)} is out of range; expected 0 .. {count - 1}, the size of {of_what}")
