"""Texts, words and questions as sequences of tokens: cuts, labels on first pieces, windows and where answers stand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from minibert.data import SHIPPED_VOCABULARY, load_tokenizer, save_tokenizer
from minibert.data.batching import pack
from minibert.errors import UserError
from minibert.tasks import Windows, encode_questions, encode_texts, encode_words

TEXTS = [
    "the people", "The Union, of the States; and a café!", "", "government " * 12, "unquestionably so", "国家 of law",
    "a b c d e f g h i j k",
]  # fmt: skip
CONTEXT = "Fourscore and seven years ago, our fathers brought forth — upon this continent — a new nation: naïve 国家?"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(SHIPPED_VOCABULARY)


def tokens(tokenizer: Tokenizer, sequences: Any, number: int) -> list[str]:
    ids = sequences.ids[sequences.offsets[number] : sequences.offsets[number + 1]]
    return [tokenizer.id_to_token(i) for i in ids]


def test_texts_and_pairs_are_packed_as_the_model_takes_them(tokenizer: Tokenizer) -> None:
    one = encode_texts(tokenizer, ["the people", ""], max_seq_length=8)
    assert tokens(tokenizer, one.sequences, 0) == ["[CLS]", "the", "people", "[SEP]"]
    assert tokens(tokenizer, one.sequences, 1) == ["[CLS]", "[SEP]"]
    two = encode_texts(tokenizer, ["the people"], ["of the union of the people"], max_seq_length=8)
    assert tokens(tokenizer, two.sequences, 0) == ["[CLS]", "the", "people", "[SEP]", "of", "the", "union", "[SEP]"]
    assert pack(two.sequences, np.array([0])).token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (one.truncated, two.truncated) == (0, 1)


def test_a_long_pair_is_cut_without_making_what_is_cut_off(tokenizer: Tokenizer) -> None:
    long = "the people of " * 30_000  # every combination of its pieces would be a hundred million
    assert encode_texts(tokenizer, [long], [long], max_seq_length=16).sequences.lengths.tolist() == [16]


def test_labels_stand_on_first_pieces_and_lost_words_are_known(tokenizer: Tokenizer) -> None:
    sentences = [["unquestionably", "the", "\x01", "people"], [], ["of", "the", "unquestionably", "union"]]
    encoded = encode_words(tokenizer, sentences, max_seq_length=6)
    assert tokens(tokenizer, encoded.sequences, 0)[-1] == "[SEP]"
    assert tokens(tokenizer, encoded.sequences, 0)[1:3] == ["unquest", "##ionably"]
    assert encoded.sequences.lengths.tolist() == [6, 2, 6]
    assert encoded.words.tolist() == [-1, 0, -1, 1, 3, -1, -1, -1, -1, 0, 1, 2, -1, -1]
    assert encoded.lost == [[2], [], [3]]
    labels = encoded.labels([[10, 11, 12, 13], [], [20, 21, 22, 23]])
    assert labels.tolist() == [-100, 10, -100, 11, 13, *[-100] * 4, 20, 21, 22, -100, -100]
    back = encoded.per_word(labels, [4, 0, 4], missing=0)
    assert [values.tolist() for values in back] == [[10, 11, 0, 13], [], [20, 21, 22, 0]]


def naive_positions(windows: Windows, window: int, answer: tuple[int, int]) -> tuple[int, int]:
    """transformers' run_qa.py, its loops."""
    spans = windows.spans[windows.sequences.offsets[window] : windows.sequences.offsets[window + 1]].tolist()
    inside = [place for place, (begin, _) in enumerate(spans) if begin >= 0]
    start, end = inside[0], inside[-1]
    if not (spans[start][0] <= answer[0] and spans[end][1] >= answer[1]):
        return 0, 0
    while start <= inside[-1] and spans[start][0] <= answer[0]:
        start += 1
    while spans[end][1] >= answer[1]:
        end -= 1
    return start - 1, end + 1


@pytest.mark.parametrize("doc_stride", [0, 3, 7])
def test_windows_cover_the_context_and_hold_the_answer(tokenizer: Tokenizer, doc_stride: int) -> None:
    question = "what did our fathers bring forth?"
    windows = encode_questions(tokenizer, [question] * 2, [CONTEXT, "Nothing."], 24, doc_stride)
    whole = tokenizer.encode(CONTEXT, add_special_tokens=False)
    of = windows.sequences.documents
    assert of.tolist() == sorted(of.tolist())
    assert set(of) == {0, 1}
    covered = {tuple(span) for span in windows.spans[windows.spans[:, 0] >= 0].tolist()}
    assert set(whole.offsets) <= covered
    for begin in range(0, len(CONTEXT), 3):
        for end in range(begin + 1, len(CONTEXT) + 1, 5):
            starts, ends = windows.answer_positions([(begin, end), None])
            for window, question_number in enumerate(of):
                expected = naive_positions(windows, window, (begin, end)) if question_number == 0 else (0, 0)
                assert (starts[window], ends[window]) == expected


def test_an_answer_is_found_again_through_its_window(tokenizer: Tokenizer) -> None:
    windows = encode_questions(tokenizer, ["what?"], [CONTEXT], 20, 8)
    begin = CONTEXT.index("naïve 国")
    starts, ends = windows.answer_positions([(begin, begin + 7)])
    found = np.flatnonzero(starts)
    assert len(found) > 0
    for window in found:
        spans = windows.spans[windows.sequences.offsets[window] :]
        assert CONTEXT[spans[starts[window], 0] : spans[ends[window], 1]] == "naïve 国"


def test_a_question_is_cut_and_must_leave_room(tokenizer: Tokenizer) -> None:
    windows = encode_questions(tokenizer, ["the " * 20], [CONTEXT], 24, 4, max_query_length=6)
    assert windows.cut_questions == 1
    assert tokens(tokenizer, windows.sequences, 0)[:8] == ["[CLS]", *["the"] * 6, "[SEP]"]
    with pytest.raises(UserError, match=r"max_seq_length above doc_stride 15 \+ 6 tokens of a question \+ 3, got 24"):
        encode_questions(tokenizer, ["the " * 20], [CONTEXT], 24, 15, max_query_length=6)


def test_nothing_to_encode_and_no_room(tokenizer: Tokenizer) -> None:
    assert len(encode_texts(tokenizer, []).sequences) == 0
    assert len(encode_words(tokenizer, []).words) == 0
    assert encode_questions(tokenizer, [], []).spans.shape == (0, 2)
    for encode, least in (
        (lambda: encode_texts(tokenizer, ["a"], max_seq_length=2), 3),
        (lambda: encode_texts(tokenizer, ["a"], ["b"], max_seq_length=4), 5),
        (lambda: encode_words(tokenizer, [["a"]], max_seq_length=2), 3),
    ):
        with pytest.raises(UserError, match=rf"expected a max_seq_length of at least {least}, got {least - 1}"):
            encode()


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, folder)
    return BertTokenizerFast.from_pretrained(folder)


def flat(rows: list[list[Any]]) -> list[Any]:
    return [value for row in rows for value in row]


@pytest.mark.parity
@pytest.mark.parametrize("length", [5, 6, 7, 12, 64])
def test_truncation_is_that_of_transformers(tokenizer: Tokenizer, theirs: Any, length: int) -> None:
    given = theirs(TEXTS, truncation=True, max_length=length)
    ours = encode_texts(tokenizer, TEXTS, max_seq_length=length)
    assert ours.sequences.ids.tolist() == flat(given["input_ids"])
    assert ours.truncated == sum(len(theirs(text)["input_ids"]) > length for text in TEXTS)
    first, second = [a for a in TEXTS for _ in TEXTS], TEXTS * len(TEXTS)
    given = theirs(first, second, truncation=True, max_length=length)
    ours = encode_texts(tokenizer, first, second, max_seq_length=length)
    batch = pack(ours.sequences, np.arange(len(first)))
    assert batch.input_ids.tolist() == flat(given["input_ids"])
    assert batch.token_type_ids.tolist() == flat(given["token_type_ids"])
    whole = theirs(first, second)["input_ids"]
    assert ours.truncated == sum(len(ids) > length for ids in whole)


@pytest.mark.parity
@pytest.mark.parametrize("length", [3, 5, 9, 64])
def test_word_numbers_are_those_of_transformers(tokenizer: Tokenizer, theirs: Any, length: int) -> None:
    sentences = [text.split() for text in TEXTS if text] + [["New York", "\x01", "[SEP]", "e\u0301a"]]
    given = theirs(sentences, is_split_into_words=True, truncation=True, max_length=length)
    ours = encode_words(tokenizer, sentences, max_seq_length=length)
    assert ours.sequences.ids.tolist() == flat(given["input_ids"])
    expected = []
    for number in range(len(sentences)):
        ids = given.word_ids(number)
        expected += [-1 if i is None or i == before else i for before, i in zip([None, *ids], ids, strict=False)]
    assert ours.words.tolist() == expected


@pytest.mark.parity
@pytest.mark.parametrize(("length", "stride"), [(20, 0), (20, 5), (23, 6), (384, 128)])
def test_windows_are_those_of_transformers(tokenizer: Tokenizer, theirs: Any, length: int, stride: int) -> None:
    questions = ["what did our fathers bring?", "who?", "why so", "how?"]
    contexts = [CONTEXT, CONTEXT * 3, "Nothing.", "the people of the union and the states of the people " * 2]
    given = theirs(
        questions, contexts, truncation="only_second", max_length=length, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    ours = encode_questions(tokenizer, questions, contexts, length, stride)
    assert ours.sequences.documents.tolist() == given["overflow_to_sample_mapping"]
    assert ours.sequences.ids.tolist() == flat(given["input_ids"])
    spans = [
        span if sequence == 1 else (-1, -1)
        for number, row in enumerate(given["offset_mapping"])
        for span, sequence in zip(row, given.sequence_ids(number), strict=True)
    ]
    assert ours.spans.tolist() == [list(span) for span in spans]
