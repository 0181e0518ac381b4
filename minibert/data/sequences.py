"""Documents to sequences of tokens: encoded, split into training and held-out parts, cut at sentence ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from tokenizers import Encoding, Tokenizer

from minibert.data.masking import PAIRING_STREAM, SPLIT_STREAM, below, check_seed, shuffled
from minibert.data.panics import no_panic
from minibert.data.text import Document, in_pieces
from minibert.data.tokenizer import SpecialIds
from minibert.errors import UserError
from minibert.kernels.philox import Stream, random_words

EncodedDocument = list[np.ndarray]  # its sentences, each (n,) int32 with n >= 1, no special tokens added
CHARACTERS_AT_ONCE = 2**18  # bounds the memory of the tokenizer's own result objects, 100 to 500 bytes a character


@dataclass(frozen=True)
class Sequences:
    """S sequences, `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`, one after the other."""

    ids: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (S + 1,) int64: sequence i is ids[offsets[i] : offsets[i + 1]]
    second: np.ndarray  # (S,) int32: where B begins within its sequence; its length where there is no B
    documents: np.ndarray  # (S,) int32: the document that A was cut from
    next_sentence_labels: np.ndarray | None = None  # (S,) int64: 0 where B follows A, 1 where it was drawn at random

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:  # (S,) int64
        return np.diff(self.offsets)


def encode(documents: Sequence[Document], tokenizer: Tokenizer) -> list[EncodedDocument]:
    """Token ids of every sentence; sentences that give no token, and documents without any, are left out."""
    ids = ids_of((sentence for document in documents for sentence in document), tokenizer)
    encoded = ([next(ids) for _ in document] for document in documents)
    with_tokens = ([sentence for sentence in document if len(sentence)] for document in encoded)
    return [document for document in with_tokens if document]


def ids_of(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """(n,) int32 of each text. Raises UserError where the tokenizer fails."""
    counts: deque[int] = deque()  # of pieces, of each text that is being encoded

    def pieces() -> Iterator[str]:
        for text in texts:
            cut = list(in_pieces(text))
            counts.append(len(cut))
            yield from cut

    parts: list[np.ndarray] = []
    for encoding in encodings_of(pieces(), tokenizer):
        parts.append(np.array(encoding.ids, dtype=np.int32))
        if len(parts) == counts[0]:
            yield np.concatenate(parts)
            counts.popleft()
            parts = []


def ids_and_spans(text: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(n,) int32 of a text, and (n, 2) int32: where each token begins and ends in it, in characters."""
    ids, spans, begin = [], [], 0
    for piece in in_pieces(text):
        for encoding in encodings_of([piece], tokenizer):
            ids.append(np.array(encoding.ids, dtype=np.int32))
            spans.append(np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2) + np.int32(begin))
        begin += len(piece)
    return np.concatenate(ids), np.concatenate(spans)


def encodings_of(texts: Iterable[str | Sequence[str]], tokenizer: Tokenizer, words: bool = False) -> Iterator[Encoding]:
    """What the tokenizer makes of each text, or with `words` of each list of words, no special tokens added.

    The texts are no longer than `in_pieces` makes them: a result takes some hundred bytes a character.
    """
    batch: list[str | Sequence[str]] = []
    size = 0
    for text in chain(texts, [None]):
        if text is not None:
            batch.append(text)
            size += sum(map(len, text)) if words else len(text)
        if text is None or size > CHARACTERS_AT_ONCE:
            with no_panic("the tokenizer fails on this text"):
                encodings = tokenizer.encode_batch(batch, is_pretokenized=words, add_special_tokens=False)
            yield from encodings
            batch, size = [], 0


def split(
    documents: Sequence[EncodedDocument], held_out: float, seed: int
) -> tuple[list[EncodedDocument], list[EncodedDocument]]:
    """Set whole documents, drawn by `seed`, aside until they hold the share `held_out` of the tokens: train, held out.

    Where the last of them would make it more than half as much again, or there is only one, it is cut at a sentence's
    end and only its tail held out. Raises UserError where there is too little to cut.
    """
    check_seed(seed)
    if not 0.0 < held_out < 1.0:
        raise UserError(f"expected a held-out share between 0 and 1, got {held_out}")
    if not documents:
        raise UserError("expected text to train on, but it gives no tokens: does the vocabulary fit the text?")
    sizes = np.array([sum(map(len, document)) for document in documents])
    order = shuffled(len(documents), Stream(seed, SPLIT_STREAM))
    ends, target = np.cumsum(sizes[order]), held_out * sizes.sum()
    last = min(int(np.searchsorted(ends, target)), len(documents) - 1)
    chosen = set(order[: last + 1].tolist())
    train = [document for i, document in enumerate(documents) if i not in chosen]
    kept = [document for i, document in enumerate(documents) if i in chosen]
    if ends[last] > 1.5 * target or not train:
        number = int(order[last])
        head, tail = cut_document(documents[number], float((target - ends[last] + sizes[number]) / sizes[number]))
        train.append(head)
        kept = [document for i, document in enumerate(documents) if i in chosen and i != number] + [tail]
    return train, kept


def cut_document(document: EncodedDocument, held_out: float) -> tuple[EncodedDocument, EncodedDocument]:
    """Head and tail of one document, the tail with about the share `held_out` of its tokens."""
    ends = np.cumsum([len(sentence) for sentence in document])
    if ends[-1] < 2:
        raise UserError("expected text enough for training and a held-out part, but it is one token: give more text")
    kept = (1.0 - held_out) * ends[-1]
    if len(document) == 1:  # no sentence end to cut at
        sentence = document[0]
        place = min(max(round(kept), 1), len(sentence) - 1)
        return [sentence[:place]], [sentence[place:]]
    place = min(max(int(np.searchsorted(ends, kept, side="right")), 1), len(document) - 1)
    return document[:place], document[place:]


def make_sequences(
    documents: Sequence[EncodedDocument],
    special: SpecialIds,
    max_seq_length: int,
    next_sentence: bool = False,
    seed: int = 0,
) -> Sequences:
    """Fill sequences of at most `max_seq_length` tokens with whole sentences, in order, never past a document's end.

    A sentence that is too long alone is cut. With `next_sentence` each sequence is a pair, by `seed` (`pairs`).
    """
    check_seed(seed)
    specials = 3 if next_sentence else 2
    room = max_seq_length - specials
    if room < specials - 1:
        raise UserError(f"expected a max_seq_length of at least {2 * specials - 1}, got {max_seq_length}")
    longest = room // 2 if next_sentence else room  # so that one sentence leaves room for another
    pieces = [[part for sentence in document for part in cut(sentence, longest)] for document in documents]
    if not any(pieces):
        raise UserError("expected text, but it gives no tokens: does the vocabulary fit the text?")
    cls, sep = np.array([special.cls], np.int32), np.array([special.sep], np.int32)
    parts: list[np.ndarray] = []
    lengths, second, origins, labels = [], [], [], []
    for a, b, origin, label in pairs(pieces, room, seed) if next_sentence else singles(pieces, room):
        added = [cls, *a, sep] if b is None else [cls, *a, sep, *b, sep]
        parts += added
        lengths.append(sum(map(len, added)))
        second.append(lengths[-1] if b is None else 2 + sum(map(len, a)))
        origins.append(origin)
        labels.append(label)
    return Sequences(
        ids=np.concatenate(parts),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        second=np.array(second, dtype=np.int32),
        documents=np.array(origins, dtype=np.int32),
        next_sentence_labels=np.array(labels, dtype=np.int64) if next_sentence else None,
    )


Segment = list[np.ndarray]
Cut = tuple[Segment, Segment | None, int, int]  # A, B, document, next-sentence label


def cut(sentence: np.ndarray, longest: int) -> list[np.ndarray]:
    return [sentence[i : i + longest] for i in range(0, len(sentence), longest)]


def fill(pieces: Segment, start: int, room: int) -> Segment:
    """As many whole pieces from `start` on as there is room for."""
    end = start
    while end < len(pieces) and len(pieces[end]) <= room:
        room -= len(pieces[end])
        end += 1
    return pieces[start:end]


def singles(documents: list[Segment], room: int) -> Iterator[Cut]:
    for number, pieces in enumerate(documents):
        start = 0
        while start < len(pieces):
            segment = fill(pieces, start, room)
            start += len(segment)
            yield segment, None, number, 0


def pairs(documents: list[Segment], room: int, seed: int) -> Iterator[Cut]:
    """Sentence pairs for next-sentence prediction (Devlin et al. 2018, section 3.1, and google-research/bert,
    create_pretraining_data.py): sentences that fill a sequence are cut at a random one into A and B; half of the
    times B is text from a random place of another document instead, and what it displaced begins the next pair.
    """
    if len(documents) == 1 and len(documents[0]) < 3:
        raise UserError("next-sentence prediction needs two documents or three sentences at least: give more text")
    for number, pieces in enumerate(documents):
        words = random_words(Stream(seed, PAIRING_STREAM, number), 4 * len(pieces)).reshape(-1, 4)
        start = 0
        while start < len(pieces):
            coin, *draws = words[start]
            chunk = fill(pieces, start, room)
            a = chunk[: 1 + pick(draws[0], len(chunk) - 1)] if len(chunk) > 1 else chunk
            follows = len(chunk) > 1 and coin < 2**31
            b = chunk[len(a) :] if follows else elsewhere(documents, number, start + len(a), draws[1:])
            left = room - sum(map(len, a))
            yield a, b if follows else (fill(b, 0, left) or [b[0][:left]]), number, 0 if follows else 1
            start += len(chunk) if follows else len(a)


def elsewhere(documents: list[Segment], number: int, avoid: int, draws: list[np.uint32]) -> Segment:
    """Text from a random place in another document; in a single one, from any place but `avoid`."""
    if len(documents) == 1:
        places = [place for place in range(len(documents[0])) if place != avoid]
        return documents[0][places[pick(draws[0], len(places))] :]
    other = pick(draws[0], len(documents) - 1)
    pieces = documents[other + (other >= number)]
    return pieces[pick(draws[1], len(pieces)) :]


def pick(word: np.uint32, limit: int) -> int:
    return int(below(np.asarray(word), limit))
