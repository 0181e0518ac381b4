"""Examples to sequences of tokens: texts and pairs, words with labels on their first pieces, questions in windows.

All give `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]` as `Sequences`, and arrays beside its `ids`, one value a token.
Pieces, offsets and word numbers are the tokenizer's. It is not told to truncate: of a pair the library also makes every
combination of what is cut off (a third of a second for twice 20 thousand characters), and it panics where a stride
finds no room. Lengths are cut here by the same rules.

S sequences of N tokens in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from minibert.data.sequences import CHARACTERS_AT_ONCE, Sequences, encodings_of, ids_and_spans, ids_of
from minibert.data.text import LONGEST_PIECE
from minibert.data.tokenizer import SpecialIds, special_ids
from minibert.errors import UserError
from minibert.model.packing import IGNORE

NOWHERE = -1  # the place in a text, or the word, of a token that has none


@dataclass(frozen=True)
class EncodedTexts:
    """A sequence for each text or pair."""

    sequences: Sequences
    truncated: int  # how many of them lost tokens


@dataclass(frozen=True)
class EncodedWords:
    """A sequence for each list of words."""

    sequences: Sequences
    words: np.ndarray  # (N,) int32: the number of the word whose first piece a token is, else -1
    lost: list[list[int]]  # of each list, the words without a piece: beyond the cut, or of no character that counts

    def labels(self, targets: Sequence[Sequence[int]]) -> np.ndarray:
        """(N,) int64: of each first piece its word's label, by sequence and word; of every other token -100."""
        flat = np.array([label for labels in targets for label in labels], dtype=np.int64)
        begins = np.concatenate([[0], np.cumsum([len(labels) for labels in targets])])
        first = self.words >= 0
        sequence = np.repeat(np.arange(len(self.sequences)), self.sequences.lengths)
        labels = np.full(len(self.words), IGNORE, dtype=np.int64)
        labels[first] = flat[begins[sequence[first]] + self.words[first]]
        return labels

    def per_word(self, values: np.ndarray, counts: Sequence[int], missing: int) -> list[np.ndarray]:
        """(N,) values of tokens -> for each list its (words,) values, those of first pieces; `missing` for lost words.

        `counts` are the lengths of the lists.
        """
        found = [np.full(count, missing, dtype=values.dtype) for count in counts]
        for number, (a, b) in enumerate(zip(self.sequences.offsets, self.sequences.offsets[1:], strict=False)):
            first = self.words[a:b] >= 0
            found[number][self.words[a:b][first]] = values[a:b][first]
        return found


@dataclass(frozen=True)
class Windows:
    """Questions about contexts, in windows: `sequences.documents` says which question each is of."""

    sequences: Sequences
    spans: np.ndarray  # (N, 2) int32: where a token of the context begins and ends in it, in characters; else (-1, -1)
    cut_questions: int  # how many questions lost tokens

    def answer_positions(self, answers: Sequence[tuple[int, int] | None]) -> tuple[np.ndarray, np.ndarray]:
        """(S,) int64 each: the tokens at which the answer to each window's question begins and ends in its sequence.

        `answers` are, by question, (begin, end) in characters of the context, or None. 0, the [CLS], where there is
        none or the window does not hold the whole of it (Devlin et al. 2018, section 4.3; transformers' run_qa.py).
        """
        starts, ends = np.zeros(len(self.sequences), np.int64), np.zeros(len(self.sequences), np.int64)
        for window, question in enumerate(self.sequences.documents):
            answer = answers[question]
            spans = self.spans[self.sequences.offsets[window] : self.sequences.offsets[window + 1]]
            places = np.flatnonzero(spans[:, 0] >= 0)
            if answer is None or len(places) == 0:
                continue
            begins, finishes = spans[places].T
            if begins[0] <= answer[0] and finishes[-1] >= answer[1]:
                starts[window] = places[np.searchsorted(begins, answer[0], side="right") - 1]
                ends[window] = places[np.searchsorted(finishes, answer[1])]
        return starts, ends


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None = None, max_seq_length: int = 128
) -> EncodedTexts:
    """[CLS] text [SEP], or [CLS] text [SEP] pair [SEP], each of at most `max_seq_length` tokens, the longer cut first.

    As Hugging Face's `truncation="longest_first"`. Raises UserError where `max_seq_length` leaves no room.
    """
    room = room_in(max_seq_length, 2 if pairs is None else 3, 1 if pairs is None else 2)
    first = list(ids_of(texts, tokenizer))
    second = [None] * len(first) if pairs is None else list(ids_of(pairs, tokenizer))
    builder, truncated = Builder(special_ids(tokenizer)), 0
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        keep_a, keep_b = longest_first(len(a), 0 if b is None else len(b), room)
        truncated += len(a) > keep_a or (b is not None and len(b) > keep_b)
        builder.add(number, a[:keep_a], None if b is None else b[:keep_b])
    return EncodedTexts(builder.sequences(), truncated)


def encode_words(tokenizer: Tokenizer, sentences: Sequence[Sequence[str]], max_seq_length: int = 128) -> EncodedWords:
    """[CLS] pieces [SEP] of each list of words, cut at `max_seq_length` tokens."""
    room = room_in(max_seq_length, 2, 1)
    builder = Builder(special_ids(tokenizer))
    words, lost = [], []
    for number, encoding in enumerate(encodings_of(map(within_reach, sentences), tokenizer, words=True)):
        builder.add(number, np.array(encoding.ids[:room], dtype=np.int32))
        of = np.array([NOWHERE, *encoding.word_ids[:room], NOWHERE], dtype=np.int32)
        of[1:][of[1:] == of[:-1]] = NOWHERE
        words.append(of)
        lost.append(sorted(set(range(len(sentences[number]))).difference(of.tolist())))
    return EncodedWords(builder.sequences(), np.concatenate([np.zeros(0, np.int32), *words]), lost)


def within_reach(words: Sequence[str]) -> Sequence[str]:
    """The first of a sentence's words: more characters than any sequence has room for."""
    ends = np.cumsum([len(word) for word in words])
    near = int(np.searchsorted(ends, CHARACTERS_AT_ONCE))
    return words if near == len(words) else [*words[:near], words[near][:LONGEST_PIECE]]


def encode_questions(
    tokenizer: Tokenizer,
    questions: Sequence[str],
    contexts: Sequence[str],
    max_seq_length: int = 384,
    doc_stride: int = 128,
    max_query_length: int = 64,
) -> Windows:
    """[CLS] question [SEP] a part of the context [SEP], as many windows as the context needs.

    `doc_stride` is what two windows share, in tokens, as in transformers' run_qa.py; Google's run_squad.py calls the
    step from one to the next so. A question is cut at `max_query_length` tokens, as there. Raises UserError where a
    question leaves no room for a window that moves on.
    """
    room = room_in(max_seq_length, 3, 2)
    builder, spans, cut = Builder(special_ids(tokenizer)), [], 0
    asked = ids_of(questions, tokenizer)
    encoded: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # SQuAD asks several questions of a context in a row
    for number, (ids, context) in enumerate(zip(asked, contexts, strict=True)):
        cut += len(ids) > max_query_length
        question = ids[:max_query_length]
        if context not in encoded:
            encoded = {context: ids_and_spans(context, tokenizer)}
        text, offsets = encoded[context]
        width = room - len(question)
        if width <= doc_stride:
            raise UserError(
                f"expected a max_seq_length above doc_stride {doc_stride} + {len(question)} tokens of a question + 3, "
                f"got {max_seq_length}: raise it, or lower doc_stride or max_query_length"
            )
        for begin in range(0, max(len(text) - doc_stride, 1), width - doc_stride):
            builder.add(number, question, text[begin : begin + width])
            around = np.full((len(question) + 2, 2), NOWHERE, np.int32), np.full((1, 2), NOWHERE, np.int32)
            spans += [around[0], offsets[begin : begin + width], around[1]]
    return Windows(builder.sequences(), np.concatenate([np.zeros((0, 2), np.int32), *spans]), cut)


def room_in(max_seq_length: int, specials: int, least: int) -> int:
    """The tokens of text that a sequence has room for. Raises UserError where they are fewer than `least`."""
    if max_seq_length < specials + least:
        raise UserError(f"expected a max_seq_length of at least {specials + least}, got {max_seq_length}")
    return max_seq_length - specials


def longest_first(a: int, b: int, room: int) -> tuple[int, int]:
    """How many of `a` and of `b` tokens are kept: the longer loses first; of two equals the second keeps more."""
    if a + b <= room:
        return a, b
    short = min(a, b)
    if 2 * short <= room:
        return (short, room - short) if a <= b else (room - short, short)
    half = room // 2
    return (half, room - half) if a <= b else (room - half, half)


class Builder:
    """Sequences, as they are added."""

    def __init__(self, special: SpecialIds) -> None:
        self.cls, self.sep = np.array([special.cls], np.int32), np.array([special.sep], np.int32)
        self.parts: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.second: list[int] = []
        self.documents: list[int] = []

    def add(self, document: int, a: np.ndarray, b: np.ndarray | None = None) -> None:
        added = [self.cls, a, self.sep] if b is None else [self.cls, a, self.sep, b, self.sep]
        self.parts += added
        self.lengths.append(sum(map(len, added)))
        self.second.append(self.lengths[-1] if b is None else len(a) + 2)
        self.documents.append(document)

    def sequences(self) -> Sequences:
        return Sequences(
            ids=np.concatenate(self.parts) if self.parts else np.zeros(0, np.int32),
            offsets=np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64),
            second=np.array(self.second, dtype=np.int32),
            documents=np.array(self.documents, dtype=np.int32),
        )
