"""Tags of words as entities: read as CoNLL's script and seqeval's default do, written as IOB2, placed in the text.

IOB2 (Ramshaw, Marcus 1995; Tjong Kim Sang, Veenstra 1999): B-X begins an entity of type X, I-X goes on with it, O is
in none. E-X and S-X (IOBES), L-X and U-X (BILOU) end one and are one alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minibert.tasks.encoding import EncodedWords

ENTITY_TAG = re.compile(r"O|[BIESLU](-.+)?", re.DOTALL)
OUTSIDE = "O"
ENDS = {"L": "E", "U": "S"}  # BILOU's letters -> those of IOBES


class Entity(NamedTuple):
    """An entity of a sentence: its type, its words, and where it stands in the text."""

    type: str
    first: int  # word
    last: int  # word, the last one inside
    start: int  # character
    end: int  # character after it
    text: str
    score: float | None  # the mean of its words' probabilities

    def as_dict(self) -> dict[str, Any]:
        """As Hugging Face's token-classification pipeline writes it."""
        known = {"entity_group": self.type, "word": self.text, "start": self.start, "end": self.end}
        return known if self.score is None else known | {"score": self.score}


def is_entity_tag(tag: str) -> bool:
    """Whether a tag is O or says that a word begins, is in, or ends an entity."""
    return ENTITY_TAG.fullmatch(tag) is not None


def with_ends(tags: Sequence[str]) -> list[str]:
    """The same tags, BILOU's letters written as those of IOBES."""
    return [ENDS.get(tag[0], tag[0]) + tag[1:] for tag in tags]


def type_of(tag: str) -> str:
    """X of B-X; `_`, as in seqeval, of a bare B."""
    return tag[2:] or "_"


def entity_words(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, last word) of each entity. Raises ValueError for a tag of another kind.

    A word goes on with the entity before it where its tag is I or E of the same type and no E or S came before; any
    other tag but O begins one, so also I after O.
    """
    found: list[tuple[str, int, int]] = []
    before = OUTSIDE
    for word, tag in enumerate(with_ends(tags)):
        if not is_entity_tag(tag):
            raise ValueError(f"expected O, or a tag such as B-PER, got {tag!r}")
        goes_on = tag[0] in "IE" and before[0] in "BI" and type_of(before) == type_of(tag)
        if goes_on:
            found[-1] = (found[-1][0], found[-1][1], word)
        elif tag != OUTSIDE:
            found.append((type_of(tag), word, word))
        before = tag
    return found


def to_iob2(tags: Sequence[str]) -> list[str]:
    """The same entities in IOB2, whatever scheme they were written in, right or not."""
    written = [OUTSIDE] * len(tags)
    for kind, first, last in entity_words(tags):
        of_type = "" if kind == "_" else f"-{kind}"
        written[first : last + 1] = ["B" + of_type] + ["I" + of_type] * (last - first)
    return written


def entities(
    tags: Sequence[str], spans: Sequence[tuple[int, int]], text: str, scores: Sequence[float] | None = None
) -> list[Entity]:
    """The entities of a sentence in its text: `spans` are where its words stand, `scores` how likely their tags are."""
    found = []
    for kind, first, last in entity_words(tags):
        start, end = spans[first][0], spans[last][1]
        score = None if scores is None else float(np.mean(scores[first : last + 1]))
        found.append(Entity(kind, first, last, start, end, text[start:end], score))
    return found


def word_tags(
    encoded: EncodedWords, predicted: np.ndarray, names: Sequence[str], counts: Sequence[int]
) -> list[list[str]]:
    """(N,) predicted numbers of tokens -> the tags of each sentence's words, that of the first piece.

    `counts` are the words of the sentences. A word without a piece, as beyond the cut, is O.
    """
    with_outside = [*names, OUTSIDE]
    numbers = encoded.per_word(np.asarray(predicted, dtype=np.int64), counts, missing=len(names))
    return [[with_outside[number] for number in row] for row in numbers]
