"""Entities from tags, against seqeval, and where they stand in the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minibert.data import SHIPPED_VOCABULARY, load_tokenizer
from minibert.errors import pip_install
from minibert.tasks import encode_words
from minibert.tasks.tags import Entity, entities, entity_words, is_entity_tag, to_iob2, word_tags

TAGS = st.lists(st.sampled_from(["O", *(f"{letter}-{kind}" for letter in "BIES" for kind in ("X", "Y-Z")), "B", "I"]))


@given(TAGS)
def test_entities_are_those_of_seqeval(tags: list[str]) -> None:
    seqeval = pytest.importorskip("seqeval.metrics", reason=f"needs seqeval: {pip_install('[tasks]')}")
    assert entity_words(tags) == seqeval.sequence_labeling.get_entities(tags)


@given(TAGS)
def test_iob2_says_the_same_and_is_valid(tags: list[str]) -> None:
    written = to_iob2(tags)
    assert entity_words(written) == entity_words(tags)
    assert to_iob2(written) == written
    for before, tag in zip(["O", *written], written, strict=False):
        assert tag[0] in "OBI"
        assert tag[0] != "I" or (before[0] in "BI" and before[1:] == tag[1:])


def test_bilou_is_read_too() -> None:
    tags = ["B-X", "I-X", "L-X", "U-X", "U-Y", "L-Y"]
    assert entity_words(tags) == [("X", 0, 2), ("X", 3, 3), ("Y", 4, 4), ("Y", 5, 5)]
    assert to_iob2(tags) == ["B-X", "I-X", "I-X", "B-X", "B-Y", "B-Y"]


def test_what_is_no_entity_s_tag() -> None:
    assert [tag for tag in ("O", "B", "B-X", "S-a b", "", "NOUN", "OO", "B-", "b-X") if is_entity_tag(tag)] == [
        *("O", "B", "B-X", "S-a b"),
    ]
    with pytest.raises(ValueError, match="expected O, or a tag such as B-PER, got 'NOUN'"):
        entity_words(["NOUN"])


def test_entities_stand_in_their_text() -> None:
    text = "New York's  mayor"
    spans = [(0, 3), (4, 8), (8, 10), (12, 17)]
    found = entities(["B-LOC", "I-LOC", "O", "I-PER"], spans, text, [0.5, 1.0, 0.9, 0.25])
    assert found == [Entity("LOC", 0, 1, 0, 8, "New York", 0.75), Entity("PER", 3, 3, 12, 17, "mayor", 0.25)]
    assert found[0].as_dict() == {"entity_group": "LOC", "word": "New York", "start": 0, "end": 8, "score": 0.75}
    assert "score" not in entities(["B-LOC"], spans, text)[0].as_dict()
    assert entities([], [], "") == []


def test_words_beyond_the_cut_are_outside() -> None:
    tokenizer = load_tokenizer(SHIPPED_VOCABULARY)
    sentences = [["unquestionably", "the", "people"], ["union"]]
    encoded = encode_words(tokenizer, sentences, max_seq_length=5)
    predicted = np.ones(len(encoded.words), int)
    assert word_tags(encoded, predicted, ["O", "B-X"], [3, 1]) == [["B-X", "B-X", "O"], ["B-X"]]
