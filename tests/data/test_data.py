"""Sequences, masking and batches: nothing crosses a document, nothing is lost, every step can be repeated."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from minibert.data import (
    MASKING_STREAM,
    SHIPPED_TEXT,
    SHIPPED_VOCABULARY,
    Batches,
    PackedBatch,
    Sequences,
    SpecialIds,
    continuing_pieces,
    encode,
    load_tokenizer,
    make_sequences,
    mask_tokens,
    masking_rule,
    pad,
    read_documents,
    split,
)
from minibert.data.sequences import EncodedDocument
from minibert.errors import UserError
from minibert.kernels.philox import random_words

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
VOCABULARY = 8000


@pytest.fixture(scope="module")
def encoded() -> list[EncodedDocument]:
    return encode(read_documents(SHIPPED_TEXT), load_tokenizer(SHIPPED_VOCABULARY))


@pytest.fixture(scope="module")
def sequences(encoded: list[EncodedDocument]) -> Sequences:
    return make_sequences(encoded, SPECIAL, 128)


def toy(*documents: list[int]) -> list[EncodedDocument]:
    """Documents of sentences with the given lengths; every token tells its document (thousands) and place."""
    made = []
    for number, lengths in enumerate(documents):
        tokens = 1000 * (number + 1) + np.arange(sum(lengths), dtype=np.int32)
        made.append(np.split(tokens, np.cumsum(lengths)[:-1]))
    return made


def rows(sequences: Sequences) -> list[list[int]]:
    return [sequences.ids[a:b].tolist() for a, b in zip(sequences.offsets, sequences.offsets[1:], strict=False)]


def assert_same(a: PackedBatch, b: PackedBatch) -> None:
    for field in fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert (left is None) == (right is None)
        if left is not None:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


# --- sequences


def test_whole_sentences_fill_sequences_and_documents_end_them() -> None:
    made = make_sequences(toy([3, 4, 5], [2], [25, 1]), SPECIAL, 12)
    assert made.lengths.tolist() == [9, 7, 4, 12, 12, 8]  # 3 + 4 | 5 | 2 | 10 | 10 | 5 + 1, each with [CLS] and [SEP]
    assert made.documents.tolist() == [0, 0, 1, 2, 2, 2]
    assert rows(made)[1] == [SPECIAL.cls, 1007, 1008, 1009, 1010, 1011, SPECIAL.sep]


def test_every_token_of_the_text_comes_once_and_in_order(encoded: list[EncodedDocument], sequences: Sequences) -> None:
    assert sequences.lengths.max() <= 128 and sequences.lengths.mean() > 90
    for number, document in enumerate(encoded):
        mine = [row[1:-1] for row, owner in zip(rows(sequences), sequences.documents, strict=True) if owner == number]
        assert np.concatenate(mine).tolist() == np.concatenate(document).tolist()


def test_pairs_follow_or_come_from_another_document() -> None:
    documents = toy([7, 5, 6, 3, 8] * 12, [4, 9, 30, 2] * 15, [11] * 30)
    made = make_sequences(documents, SPECIAL, 32, next_sentence=True, seed=5)
    ends = {int(sentence[-1]) for document in documents for sentence in document}
    assert made.next_sentence_labels is not None and set(made.next_sentence_labels.tolist()) == {0, 1}
    assert made.lengths.max() <= 32
    seen = Counter[int]()
    for row, second, owner, label in zip(
        rows(made), made.second, made.documents, made.next_sentence_labels, strict=True
    ):
        assert row[0] == SPECIAL.cls and row[second - 1] == row[-1] == SPECIAL.sep
        a, b = row[1 : second - 1], row[second:-1]
        assert a == list(range(a[0], a[-1] + 1)) and b == list(range(b[0], b[-1] + 1))
        assert a[0] // 1000 == a[-1] // 1000 == owner + 1 and b[0] // 1000 == b[-1] // 1000
        assert (b[0] == a[-1] + 1) == (label == 0)
        assert label == 0 or b[0] // 1000 != owner + 1
        assert a[-1] in ends or len(a) == 14  # only a sentence longer than half a sequence is cut
        seen.update(a + (b if label == 0 else []))
    assert seen == Counter(np.concatenate([s for document in documents for s in document]).tolist())
    again = make_sequences(documents, SPECIAL, 32, next_sentence=True, seed=5)
    other = make_sequences(documents, SPECIAL, 32, next_sentence=True, seed=6)
    assert rows(made) == rows(again) != rows(other)


def test_half_of_the_pairs_are_random(encoded: list[EncodedDocument]) -> None:
    labels = make_sequences(encoded, SPECIAL, 128, next_sentence=True, seed=1).next_sentence_labels
    assert labels is not None and len(labels) > 1000
    assert (
        abs(labels.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(labels)) + 0.02
    )  # a document's last sentence has no successor


def test_pairs_within_a_single_document() -> None:
    made = make_sequences(toy([5] * 40), SPECIAL, 24, next_sentence=True, seed=2)
    assert made.next_sentence_labels is not None and 0 < made.next_sentence_labels.mean() < 1
    for row, second, label in zip(rows(made), made.second, made.next_sentence_labels, strict=True):
        assert (row[second] == row[second - 2] + 1) == (label == 0)


@pytest.mark.parametrize("count", [2, 3])
def test_split_cuts_a_document_that_would_hold_out_too_much(count: int) -> None:
    documents = toy(*[[5] * 20] * count)
    train, held_out = split(documents, 0.1, seed=3)
    assert sum(map(len, held_out[0])) == 10 * count and len(held_out) == 1 and len(train) == count
    both = sorted(int(token) for document in train + held_out for sentence in document for token in sentence)
    assert both == sorted(int(token) for document in documents for sentence in document for token in sentence)


@pytest.mark.parametrize("count", [10, 20])
def test_split_by_document(count: int) -> None:
    documents = toy(*[[5, 6]] * count)
    train, held_out = split(documents, 0.1, seed=3)
    assert len(train) + len(held_out) == count and len(held_out) == max(1, round(0.1 * count))
    firsts = sorted(int(document[0][0]) for document in train + held_out)
    assert firsts == [1000 * (i + 1) for i in range(count)]
    assert [d[0][0] for d in split(documents, 0.1, seed=3)[1]] == [d[0][0] for d in held_out]
    if count == 20:
        assert len({tuple(int(d[0][0]) for d in split(documents, 0.1, seed)[1]) for seed in range(10)}) > 3


@pytest.mark.parametrize("lengths", [[5] * 100, [500], [2], [1, 1]])
def test_split_of_a_single_document(lengths: list[int]) -> None:
    [train], [held_out] = split(toy(lengths), 0.1, seed=0)
    tokens = np.concatenate(train + held_out)
    assert tokens.tolist() == list(range(1000, 1000 + sum(lengths)))
    assert train and held_out and (len(tokens) < 10 or sum(map(len, held_out)) == len(tokens) // 10)


# --- masking


def test_masking_rates_within_binomial_limits() -> None:
    count, rate = 400_000, 0.15
    ids = np.random.default_rng(0).integers(0, 50, count, dtype=np.int32)  # a tenth of them special
    visible, labels = mask_tokens(ids, masking_rule(SPECIAL, 50, rate), seed=9, step=4)
    ordinary, chosen = ids > 4, labels != -100

    def within(hits: int, trials: int, chance: float) -> bool:  # five standard deviations
        return abs(hits - trials * chance) < 5 * np.sqrt(trials * chance * (1 - chance))

    assert not chosen[~ordinary].any()
    np.testing.assert_array_equal(labels[chosen], ids[chosen])
    np.testing.assert_array_equal(visible[~chosen], ids[~chosen])
    picked = int(chosen.sum())
    assert within(picked, int(ordinary.sum()), rate)
    masked = visible[chosen] == SPECIAL.mask
    assert within(int(masked.sum()), picked, 0.8)
    changed = ~masked & (visible[chosen] != ids[chosen])
    assert within(int(changed.sum()), picked, 0.1 * 44 / 45)  # a random token is the old one once in 45
    drawn = Counter(visible[chosen][changed].tolist())
    assert set(drawn) == set(range(5, 50))
    assert all(within(hits, int(changed.sum()), 1 / 45) for hits in drawn.values())
    runs = int((chosen[1:] & chosen[:-1]).sum())  # neighbours are chosen independently
    assert within(runs, int((ordinary[1:] & ordinary[:-1]).sum()), rate**2)


def test_masking_is_integer_arithmetic_on_philox_words() -> None:
    """Written again with Python's integers, token by token: nothing in it can depend on the machine."""
    ids = np.arange(2000, dtype=np.int32) % 1000
    visible, labels = mask_tokens(ids, masking_rule(SPECIAL, 1000), seed=1, step=2)
    words = [random_words((1, MASKING_STREAM, 2, use), len(ids)).tolist() for use in range(3)]
    for token, seen, label, choice, action, word in zip(
        *map(np.ndarray.tolist, (ids, visible, labels)), *words, strict=True
    ):
        if token < 5 or choice >= 644245094:  # 0.15 * 2^32
            assert (seen, label) == (token, -100)
        elif action < 3435973837:  # 0.8 * 2^32
            assert (seen, label) == (SPECIAL.mask, token)
        elif action < 3865470566:  # 0.9 * 2^32
            assert (seen, label) == (5 + (word * 995 >> 32), token)
        else:
            assert (seen, label) == (token, token)


def test_masking_depends_on_seed_and_step() -> None:
    ids = np.full(1000, 7, dtype=np.int32)
    masked = [
        mask_tokens(ids, masking_rule(SPECIAL, 50), seed, step)[0].tobytes() for seed in range(3) for step in range(3)
    ]
    assert len(set(masked)) == 9


def test_at_least_one_token_is_predicted() -> None:
    ids = np.array([2, 9, 3, 2, 8, 3], dtype=np.int32)
    counts = [int((mask_tokens(ids, masking_rule(SPECIAL, 50, 0.01), 0, step)[1] != -100).sum()) for step in range(200)]
    assert min(counts) == 1
    positions = {int(np.argmax(mask_tokens(ids, masking_rule(SPECIAL, 50, 0.01), 0, step)[1])) for step in range(200)}
    assert positions == {1, 4}


def test_nothing_to_predict_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing to predict"):
        mask_tokens(np.array([2, 1, 1, 3], dtype=np.int32), masking_rule(SPECIAL, 50), 0, 0)


def words_in(ids: np.ndarray, continues: np.ndarray) -> list[list[int]]:
    """The places of each word's tokens, written again token by token."""
    words: list[list[int]] = []
    for place, token in enumerate(ids.tolist()):
        if token < 5:
            words.append([])
        elif continues[token] and words and words[-1]:
            words[-1].append(place)
        else:
            words.append([place])
    return [word for word in words if word]


def test_whole_words_are_masked_and_the_share_stays(sequences: Sequences) -> None:
    """On real text: of each word all pieces are predicted or none, as many tokens as without."""
    continues = continuing_pieces(load_tokenizer(SHIPPED_VOCABULARY))
    rule = masking_rule(SPECIAL, VOCABULARY, 0.15, continues)
    words = words_in(sequences.ids, continues)
    sizes, several = np.array([len(word) for word in words]), [word for word in words if len(word) > 1]
    assert len(several) > 1000
    mixed = chosen = masked = kept = total = 0
    for step in range(20):
        visible, labels = mask_tokens(sequences.ids, rule, seed=3, step=step)
        predicted = labels != -100
        assert not predicted[sequences.ids < 5].any()
        np.testing.assert_array_equal(labels[predicted], sequences.ids[predicted])
        np.testing.assert_array_equal(visible[~predicted], sequences.ids[~predicted])
        assert all(predicted[word].all() or not predicted[word].any() for word in several)
        hidden = visible == SPECIAL.mask
        mixed += sum(0 < hidden[word].sum() < len(word) for word in several)
        chosen, masked, total = chosen + predicted.sum(), masked + hidden.sum(), total + sizes.sum()
        kept += (predicted & (visible == sequences.ids)).sum()
    deviation = np.sqrt(20 * (sizes**2).sum() * 0.15 * 0.85)  # of a sum over words, each chosen by itself
    assert abs(chosen - 0.15 * total) < 5 * deviation
    assert abs(masked - 0.8 * chosen) < 5 * np.sqrt(chosen * 0.8 * 0.2)
    assert abs(kept - 0.1 * chosen) < 5 * np.sqrt(chosen * 0.1 * 0.9)
    assert mixed > 0, "what becomes of a piece is drawn by itself, as in Google's code"


def test_whole_words_at_the_ends_of_sequences() -> None:
    """A piece after a special token begins a word; at least one word is predicted, whole."""
    ids = np.array([6, 6, 2, 6, 5, 6, 1, 6, 3, 2, 5, 6, 6, 3], dtype=np.int32)  # 6 continues, 5 does not
    continues = np.arange(50) == 6
    rule = masking_rule(SPECIAL, 50, 1e-6, continues)
    seen = {
        tuple(np.flatnonzero(mask_tokens(ids, rule, 0, step)[1] != -100).tolist()) for step in range(300)
    }  # fmt: skip
    assert seen == {(0, 1), (3,), (4, 5), (7,), (10, 11, 12)} == {tuple(word) for word in words_in(ids, continues)}


def test_a_vocabulary_without_pieces_has_no_whole_words() -> None:
    letters = [*"abc", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece({letter: i for i, letter in enumerate(letters)}, unk_token="[UNK]"))
    with pytest.raises(UserError, match="as ##ing, but the vocabulary has none"):
        continuing_pieces(tokenizer)


# --- batches


def test_budget_is_kept_and_used(sequences: Sequences) -> None:
    batches = Batches(sequences, 1000, seed=1)
    sizes = [len(batches.batch(step).input_ids) for step in range(batches.steps_in_epoch(0))]
    assert max(sizes) <= 1000 and min(sizes[:-1]) > 1000 - 128
    assert sum(sizes) == len(sequences.ids)


def test_a_budget_is_filled_to_the_last_token() -> None:
    made = make_sequences(toy(*[[8]] * 6), SPECIAL, 10)
    assert [len(Batches(made, budget).batch(0).input_ids) for budget in (10, 19, 20, 60, 1000)] == [10, 10, 20, 60, 60]


def test_each_epoch_masks_anew() -> None:
    made = make_sequences(toy([90] * 5), SPECIAL, 128)
    batches = Batches(made, 10_000, masking=masking_rule(SPECIAL, VOCABULARY))
    assert batches.steps_in_epoch(0) == 1
    places = [(batches.batch(step).labels != -100).tobytes() for step in range(5)]
    assert len(set(places)) == 5


@pytest.mark.parametrize("epoch", [0, 3])
def test_every_sequence_comes_once_an_epoch(sequences: Sequences, epoch: int) -> None:
    batches = Batches(sequences, 2048, seed=1)
    first = sum(batches.steps_in_epoch(e) for e in range(epoch))
    seen = Counter[bytes]()
    for step in range(first, first + batches.steps_in_epoch(epoch)):
        batch = batches.batch(step)
        seen.update(row.tobytes() for row in np.split(batch.input_ids, batch.cu_seqlens[1:-1]))
    assert seen == Counter(np.array(row, dtype=np.int32).tobytes() for row in rows(sequences))


def test_batch_layout() -> None:
    made = make_sequences(toy([3, 4], [6], [2]), SPECIAL, 16, next_sentence=True)
    batch = Batches(made, 100).batch(0)
    assert batch.next_sentence_label is not None and len(batch.next_sentence_label) == len(made)
    assert (batch.input_ids.dtype, batch.cu_seqlens.dtype, batch.labels.dtype) == (np.int32, np.int32, np.int64)
    assert (batch.labels == -100).all() and len(batch.cu_seqlens) == len(made) + 1 and batch.cu_seqlens[0] == 0
    for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        assert batch.position_ids[start:end].tolist() == list(range(end - start))
        row = batch.input_ids[start:end].tolist()
        boundary = row.index(SPECIAL.sep) + 1
        assert batch.token_type_ids[start:end].tolist() == [0] * boundary + [1] * (len(row) - boundary)


def test_any_step_can_be_resumed(sequences: Sequences) -> None:
    fresh = partial(Batches, sequences, 4000, seed=11, masking=masking_rule(SPECIAL, VOCABULARY))
    running = fresh()
    steps = 3 * running.steps_in_epoch(0) + 5
    whole = [running.batch(step) for step in range(steps)]
    resumed = fresh()
    for step in (steps - 1, 0, steps // 2, steps - 2, 7):
        assert_same(resumed.batch(step), whole[step])
        assert_same(fresh().batch(step), whole[step])
    assert whole[0].input_ids.tobytes() != Batches(sequences, 4000, seed=12).batch(0).input_ids.tobytes()
    assert all((batch.labels != -100).any() for batch in whole)
    orders = {tuple(running.plan(epoch)[0].tolist()) for epoch in range(3)}
    assert len(orders) == 3


def test_masked_and_plain_batches_hold_the_same_text(sequences: Sequences) -> None:
    plain = Batches(sequences, 1000, seed=4).batch(3)
    masked = Batches(sequences, 1000, seed=4, masking=masking_rule(SPECIAL, VOCABULARY)).batch(3)
    chosen = masked.labels != -100
    np.testing.assert_array_equal(np.where(chosen, masked.labels, masked.input_ids), plain.input_ids)
    assert not np.isin(plain.input_ids[chosen], SPECIAL).any()


def test_padded_form_packs_back(encoded: list[EncodedDocument]) -> None:
    made = make_sequences(encoded[:2], SPECIAL, 64, next_sentence=True)
    batch = Batches(made, 700, seed=2, masking=masking_rule(SPECIAL, VOCABULARY)).batch(1)
    padded = pad(batch, SPECIAL.pad)
    real = padded["attention_mask"] == 1
    assert real.shape == (len(batch.cu_seqlens) - 1, np.diff(batch.cu_seqlens).max())
    np.testing.assert_array_equal(real.sum(axis=1), np.diff(batch.cu_seqlens))
    for name in ("input_ids", "token_type_ids", "labels"):
        np.testing.assert_array_equal(padded[name][real], getattr(batch, name))
    assert (padded["input_ids"][~real] == SPECIAL.pad).all() and (padded["labels"][~real] == -100).all()
    assert padded["next_sentence_label"] is batch.next_sentence_label


def test_unusable_settings_are_one_line(sequences: Sequences, encoded: list[EncodedDocument]) -> None:
    for message, call in {
        "tokens_per_batch of at least 128": lambda: Batches(sequences, 127),
        "seed from 0": lambda: Batches(sequences, 1000, seed=-1),
        "max_seq_length of at least 3": lambda: make_sequences(encoded, SPECIAL, 2),
        "max_seq_length of at least 5": lambda: make_sequences(encoded, SPECIAL, 4, next_sentence=True),
        "gives no tokens": lambda: make_sequences([], SPECIAL, 128),
        "gives no tokens:": lambda: split([], 0.1, 0),
        "share between 0 and 1": lambda: split(encoded, 1.0, 0),
        "one token": lambda: split(toy([1]), 0.5, 0),
        "two documents or three sentences": lambda: make_sequences(toy([4, 4]), SPECIAL, 32, next_sentence=True),
        "rate between 0 and 1": lambda: masking_rule(SPECIAL, 50, 1.0),
        "got the size 5": lambda: masking_rule(SPECIAL, 5),
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
