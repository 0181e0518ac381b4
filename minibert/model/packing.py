"""The door of the model: padded (B, T) batches in, packed (N,) tokens inside, padded again on the way out."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

import numpy as np

from minibert.errors import UserError
from minibert.kernels.cross_entropy import IGNORED
from minibert.model.config import BertConfig

IGNORE = IGNORED  # the label of a position that is not predicted

# Arguments that scripts written for transformers give and that no model here takes: what to do instead.
ELSEWHERE = {
    "labels": "BertModel has no head that predicts; use BertForMaskedLM, BertForSequenceClassification or another head",
    "next_sentence_label": "this model has no next-sentence head; use BertForPreTraining",
    "masked_lm_labels": "its name is labels",
    "lm_labels": "its name is labels",
    "output_all_encoded_layers": "its name is output_hidden_states",
    "head_mask": "no head can be masked in a call; set its columns of attention.output.dense.weight to 0 instead",
    "num_items_in_batch": "out.loss is the mean over this call's labels; weigh it yourself: out.loss * (own / all)",
    "special_tokens_mask": "no model reads the tokenizer's notes; leave it out",
    "offset_mapping": "no model reads the tokenizer's notes; leave it out",
    "overflow_to_sample_mapping": "no model reads the tokenizer's notes; leave it out",
    "length": "no model reads the tokenizer's notes; leave it out, and give the attention_mask",
    "encoder_hidden_states": "no layer here attends to another model's states: this is an encoder",
    "encoder_attention_mask": "no layer here attends to another model's states: this is an encoder",
    "past_key_values": "an encoder reads all tokens at once and keeps no cache; leave it out",
    "cache": "an encoder reads all tokens at once and keeps no cache; leave it out",
    "cache_position": "an encoder reads all tokens at once and keeps no cache; leave it out",
    "use_cache": "an encoder reads all tokens at once and keeps no cache; leave it out",
}
ARGUMENTS = (
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "cu_seqlens", "labels",
    "next_sentence_label", "output_hidden_states", "output_attentions", "return_dict",
)  # fmt: skip


class Part(NamedTuple):
    """Where a part of a batch begins in the whole, of which it draws the random numbers."""

    row: int = 0
    sequence: int = 0
    longest: int = 0  # tokens of the whole's longest sequence; 0: of the part's own


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
    part: Part = Part()  # all of it, unless the batch was cut

    @property
    def not_empty(self) -> np.ndarray:
        """(B,) whether a sequence has a token: one that is masked throughout has none."""
        return np.diff(self.cu_seqlens) > 0

    @property
    def first_rows(self) -> np.ndarray:
        """(B,) row of each sequence's first token, [CLS]."""
        return self.cu_seqlens[:-1]


def refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """Raise UserError for an argument of a call that no model takes, with what to do instead; None asks for nothing."""
    for name, value in arguments.items():
        if name in ELSEWHERE and (value is None or value is False):
            continue
        near = get_close_matches(name, ARGUMENTS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(ARGUMENTS)}"
        raise UserError(f"{name}: {ELSEWHERE.get(name) or 'unknown argument; ' + meant}")


def pack(
    config: BertConfig,
    input_ids: Any,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    labels: Any = None,
    cu_seqlens: Any = None,
    embedded: tuple[int, ...] | None = None,
    num_labels: int | None = None,
) -> Packed:
    """Check a batch and lay its real tokens one after the other.

    `input_ids` is (B, T), with an `attention_mask` (B, T) of 0 and 1 in any dtype; or (N,) together with `cu_seqlens`
    (B + 1,), already packed. A row that is masked throughout is an empty sequence. Positions are columns of the padded
    batch, as in Hugging Face's models. A label is one of `num_labels` (None: of the vocabulary), or -100. `embedded` is
    the shape, less its last axis, of embeddings given in place of ids: the packed ids are then their rows. Raises
    UserError for ids, positions or shapes that the model cannot take.
    """
    if embedded is None:
        ids = _integers("input_ids", input_ids)
    else:
        ids = np.arange(np.prod(embedded, dtype=int)).reshape(embedded)
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise UserError("attention_mask: a packed batch (cu_seqlens) has no padding to mask; leave it out")
        packed = _already_packed(ids, token_type_ids, position_ids, labels, cu_seqlens)
    else:
        packed = _packed(ids, attention_mask, token_type_ids, position_ids, labels)
    if embedded is None:
        _within("input_ids", packed.input_ids, config.vocab_size, "the vocabulary (vocab_size)")
    if position_ids is None and packed.position_ids.max() >= config.max_position_embeddings:
        name, length = "input_ids" if embedded is None else "inputs_embeds", packed.position_ids.max() + 1
        raise UserError(
            f"{name}: a sequence of {length} tokens is too long: the model has positions for "
            f"{config.max_position_embeddings} (max_position_embeddings); cut it, or read it in parts"
        )
    _within("position_ids", packed.position_ids, config.max_position_embeddings, "positions (max_position_embeddings)")
    _within("token_type_ids", packed.token_type_ids, config.type_vocab_size, "token types (type_vocab_size)")
    if packed.labels is not None:
        kept = packed.labels != IGNORE
        of_what = "the vocabulary" if num_labels is None else "the labels (num_labels)"
        count = config.vocab_size if num_labels is None else num_labels
        _within("labels", packed.labels[kept], count, f"{of_what}, or -100 where nothing is predicted")
        predicted = np.flatnonzero(kept).astype(np.int32)
        packed = packed._replace(predicted=predicted, targets=packed.labels[predicted].astype(np.int32))
    return packed._replace(
        input_ids=packed.input_ids.astype(np.int32),
        position_ids=packed.position_ids.astype(np.int32),
        token_type_ids=packed.token_type_ids.astype(np.int32),
    )


def _packed(ids: np.ndarray, attention_mask: Any, token_type_ids: Any, position_ids: Any, labels: Any) -> Packed:
    if ids.ndim != 2:
        one = "; of one sequence alone make a batch: [ids]" if ids.ndim == 1 else ""
        raise UserError(f"input_ids: expected shape (B, T), or (N,) with cu_seqlens, got {ids.shape}{one}")
    mask = np.ones(ids.shape, bool) if attention_mask is None else _mask(attention_mask, ids)
    rows = np.flatnonzero(mask).astype(np.int32)

    def real(name: str, given: Any, default: np.ndarray) -> np.ndarray:
        return np.broadcast_to(default if given is None else _like(name, given, ids), ids.shape).reshape(-1)[rows]

    return Packed(
        input_ids=ids.reshape(-1)[rows],
        position_ids=real("position_ids", position_ids, np.arange(ids.shape[1])),
        token_type_ids=real("token_type_ids", token_type_ids, np.zeros(1, np.int32)),
        cu_seqlens=np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int32),
        labels=None if labels is None else real("labels", labels, ids),
        rows=rows,
        padded_shape=(ids.shape[0], ids.shape[1]),
    )


def _already_packed(ids: np.ndarray, token_type_ids: Any, position_ids: Any, labels: Any, cu_seqlens: Any) -> Packed:
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
            f"got {_shortened(ends)} of shape {ends.shape} for input_ids of shape {ids.shape}"
        )
    columns = np.arange(len(ids)) - np.repeat(ends[:-1], np.diff(ends))
    return Packed(
        ids,
        columns if position_ids is None else _like("position_ids", position_ids, ids),
        np.zeros_like(ids) if token_type_ids is None else _like("token_type_ids", token_type_ids, ids),
        ends.astype(np.int32),
        None if labels is None else _like("labels", labels, ids),
        rows=None,
        padded_shape=None,
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


def sentence_labels(given: Any, packed: Packed) -> np.ndarray:
    """(B,) labels of the next-sentence head: 0, 1, or -100 for a sequence that does not count, as an empty one.

    Raises UserError for any other, and where none counts.
    """
    labels = class_numbers("next_sentence_label", given, len(packed.first_rows), 2)
    labels = np.where(packed.not_empty, labels, IGNORE)
    if (labels == IGNORE).all():
        raise UserError("next_sentence_label: expected one of 0 or 1 at least, but no sequence has a label that counts")
    return labels


def class_numbers(name: str, given: Any, rows: int, classes: int) -> np.ndarray:
    """(rows,) class numbers, -100 for a row that does not count. Raises UserError for another shape or number."""
    labels = _integers(name, given)
    if labels.size != rows or labels.ndim > 2:
        raise UserError(f"{name}: expected one for each of {rows} sequences, got shape {labels.shape}")
    labels = labels.reshape(-1)
    _within(name, labels[labels != IGNORE], classes, f"the head's {classes} labels, or -100")
    return labels


def row_numbers(name: str, given: Any, count: int, of_what: str = "the table") -> np.ndarray:
    """Numbers of rows of a table of `count` rows, int64. Raises UserError for any that it has not."""
    ids = _integers(name, given)
    _within(name, ids, count, of_what)
    return ids


def as_array(name: str, given: Any, expected: str) -> np.ndarray:
    """What was given as NumPy; of torch and others what stands on the CPU. Raises UserError for what is no array."""
    if isinstance(given, Mapping):
        raise UserError(f"{name}: expected {expected}, got a {type(given).__name__}; unpack it: model(**batch)")
    try:
        torch_only = str(getattr(given, "dtype", "")) == "torch.bfloat16"  # which NumPy does not know
        array = np.asarray(given.float() if torch_only else given)
    except (TypeError, ValueError, RuntimeError) as error:  # rows of unequal length, memory of another device
        why = str(error).split("\n")[0][:200]
        raise UserError(f"{name}: expected {expected}, got what NumPy does not read as one: {why}") from None
    if array.dtype.kind in "OSUVcmM" and array.dtype.name != "bfloat16":
        hint = "; a tokenizer makes ids of text (mb.data.load_tokenizer)" if array.dtype.kind in "SU" else ""
        raise UserError(f"{name}: expected {expected}, got {type(given).__name__} of {array.dtype}{hint}")
    if array.size == 0:
        raise UserError(f"{name}: expected {expected}, got an empty one of shape {array.shape}")
    return array


def _integers(name: str, given: Any) -> np.ndarray:
    array = as_array(name, given, "an array of integers")
    if array.dtype.kind not in "iu":
        raise UserError(f"{name}: expected an array of integers, got {array.dtype} of shape {array.shape}")
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise UserError(f"{name}: {array.max()} is out of range; expected integers below 2**63")
    return array.astype(np.int64, copy=False)


def _mask(given: Any, ids: np.ndarray) -> np.ndarray:
    """(B, T) of bool from 0 and 1 of any dtype."""
    array = as_array("attention_mask", given, "an array of 0 and 1")
    if array.ndim == 4 and array.shape[1:3] == (1, 1):  # as a mask stands beside scores, (B, H, T, T)
        array = array[:, 0, 0]
    if array.shape == (1, ids.shape[1]):
        array = np.broadcast_to(array, ids.shape)
    if array.shape != ids.shape:
        more = "; there is one value for each token, not for each pair of them" if array.ndim > 2 else ""
        raise UserError(f"attention_mask: expected the shape of input_ids, {ids.shape}, got {array.shape}{more}")
    mask = array == 1
    wrong = array[~mask & (array != 0)]
    if wrong.size:
        additive = "; of a mask that is added to scores give mask == 0" if (array <= 0).all() else ""
        raise UserError(f"attention_mask: expected 1 for a token and 0 for padding, got {wrong[0]}{additive}")
    if not mask.any():
        raise UserError("attention_mask: every token is masked; expected 1 for a token and 0 for padding")
    return np.asarray(mask, bool)


def _like(name: str, given: Any, ids: np.ndarray) -> np.ndarray:
    """Integers of the shape of `ids`; positions and types also as one row for all sequences, labels also flat."""
    array = _integers(name, given)
    if name == "labels" and array.shape == (ids.size,):
        array = array.reshape(ids.shape)
    one_row = name != "labels" and array.shape in (ids.shape[-1:], (1, *ids.shape[-1:]))
    if array.shape != ids.shape and not one_row:
        raise UserError(f"{name}: expected the shape of input_ids, {ids.shape}, got {array.shape}")
    return array.reshape(ids.shape[-1]) if one_row else array


def _within(name: str, ids: np.ndarray, count: int, of_what: str) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= count):
        worst = ids.max() if ids.max() >= count else ids.min()
        raise UserError(f"{name}: {int(worst)} is out of range; expected 0 .. {count - 1}, the size of {of_what}")


def _shortened(values: np.ndarray, most: int = 8) -> str:
    shown = ", ".join(map(str, values.reshape(-1)[:most].tolist()))
    return f"[{shown}{', ...' if values.size > most else ''}]"
