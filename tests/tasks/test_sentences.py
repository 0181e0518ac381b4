"""Texts to vectors: order, packing, truncation, prompts, folders that sentence-transformers reads."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.data import train_tokenizer, vocabulary_size
from minibert.errors import UserError, pip_install
from minibert.model.sentence import SentenceBert
from minibert.model.sentence_config import SentenceConfig
from minibert.tasks import SentenceTransformer
from tests.emulator_device import needs_compiler

TEXTS = ["the cat sat", "", "a dog ran over the hill and far away and over the hill again", "the dog", "cats"] * 3
PROMPTS = {"query": "the hill ", "passage": ""}


def encoder_on(backend: str, **about: Any) -> SentenceTransformer:
    tokenizer = train_tokenizer([["the cat sat on the hill", "a dog ran far away and over the hill again"]], 120)
    config = mb.BertConfig(
        vocab_size=vocabulary_size(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    about = {"normalize": True, "max_seq_length": 12, "prompts": PROMPTS, **about}
    return SentenceTransformer(SentenceBert(config, backend, sentence_config=SentenceConfig(**about)), tokenizer)


@pytest.fixture(scope="module")
def encoder() -> SentenceTransformer:
    return encoder_on("numba")


@pytest.fixture(scope="module")
def vectors(encoder: SentenceTransformer) -> np.ndarray:
    """Each text by itself."""
    return np.stack([encoder.encode(text) for text in TEXTS])


@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])
def test_vectors_come_in_the_order_of_the_texts_however_they_are_packed(
    batch_tokens: int, encoder: SentenceTransformer, vectors: np.ndarray
) -> None:
    found = encoder.encode(TEXTS, batch_tokens=batch_tokens)
    assert found.dtype == np.float32 and found.shape == (15, 32)
    np.testing.assert_allclose(found, vectors, atol=2e-6)
    assert np.abs(vectors[0] - vectors[3]).max() > 0.01, "texts that differ have vectors that differ"


@pytest.mark.parametrize(
    ("backend", "dtype", "apart"),
    [("numpy", "float64", 2e-6)]
    + [pytest.param("emulator", d, a, marks=needs_compiler) for d, a in (("float32", 2e-6), ("float16", 5e-3))],
)
def test_every_backend_gives_them(
    backend: str, dtype: str, apart: float, encoder: SentenceTransformer, vectors: np.ndarray, tmp_path: Path
) -> None:
    encoder.save_pretrained(tmp_path)
    there = SentenceTransformer.from_pretrained(tmp_path, backend, dtype)
    found = there.encode(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, vectors, atol=apart)
    np.testing.assert_allclose(there.similarity(found, found[:2]), vectors @ vectors[:2].T, atol=4 * apart)


def test_long_texts_are_cut_and_counted(encoder: SentenceTransformer) -> None:
    embedded = list(encoder.stream(TEXTS[:3]))
    assert [e.truncated for e in embedded] == [False, False, True]
    assert [e.tokens for e in embedded][1:] == [2, 12]
    ids = encoder.tokenizer.encode(TEXTS[2]).ids
    with mb.no_grad():
        cut = encoder.model(np.array([[*ids[:11], ids[-1]]])).numpy()[0]
    np.testing.assert_allclose(embedded[2].vector, cut, atol=2e-6)


def test_a_stream_does_not_wait_for_texts_that_it_does_not_need(encoder: SentenceTransformer) -> None:
    read = []

    def texts() -> Any:
        for number in range(10**6):
            read.append(number)
            yield "the hill " * 2000

    next(encoder.stream(texts(), batch_tokens=24))
    assert len(read) < 1000


def test_prompts_stand_before_each_text(encoder: SentenceTransformer) -> None:
    plain = encoder.encode("the hill the cat")
    np.testing.assert_array_equal(encoder.encode("the cat", prompt_name="query"), plain)
    np.testing.assert_array_equal(encoder.encode("the cat", prompt="the hill "), plain)
    by_default = SentenceTransformer(encoder.model.as_it_is(), encoder.tokenizer)
    by_default.model.sentence_config = replace(encoder.config, default_prompt_name="query")
    np.testing.assert_array_equal(by_default.encode("the cat"), plain)
    np.testing.assert_array_equal(by_default.encode("the cat", prompt_name="passage"), encoder.encode("the cat"))
    with pytest.raises(UserError, match="no prompt is called 'title': there are query, passage"):
        encoder.encode("the cat", prompt_name="title")


def test_texts_may_be_made_lower_case_first() -> None:
    lower, cased = (encoder_on("numpy", do_lower_case=flag) for flag in (True, False))
    np.testing.assert_array_equal(lower.encode("THE [MASK] CAT"), cased.encode("the [mask] cat"))
    assert np.any(cased.encode("THE [MASK] CAT") != cased.encode("the [mask] cat"))


def test_dropout_is_off_while_texts_are_encoded_and_then_on_again(
    encoder: SentenceTransformer, vectors: np.ndarray
) -> None:
    encoder.model.train()
    try:
        np.testing.assert_array_equal(encoder.encode(TEXTS[0]), vectors[0])
        assert encoder.model.training and encoder.model.bert.training
    finally:
        encoder.model.eval()


def test_how_alike_vectors_are() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 32)), rng.standard_normal((4, 32))
    length = [np.linalg.norm(x, axis=1) for x in (a, b)]
    for name, expected in {"cosine": a @ b.T / np.outer(*length), "dot": a @ b.T}.items():
        encoder = encoder_on("numba", similarity_fn_name=name)
        np.testing.assert_allclose(encoder.similarity(a, b), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(encoder.similarity_pairwise(a, b), np.diag(expected), rtol=1e-4, atol=1e-5)
    assert encoder.similarity(a).shape == (4, 4)
    with pytest.raises(UserError, match=r"b: expected vectors, \(n, 32\), got shape \(4, 3\)"):
        encoder.similarity(a, b[:, :3])
    with pytest.raises(UserError, match="as many vectors in b as in a"):
        encoder.similarity_pairwise(a, b[:2])


@pytest.mark.parametrize(("text", "what"), [(3, "int"), ("\ud800", "half of a surrogate pair")])
def test_what_is_no_text_is_refused(text: Any, what: str, encoder: SentenceTransformer) -> None:
    with pytest.raises(UserError, match=f"texts: expected text, but number 1 is {what}"):
        encoder.encode(["a", text])


def test_no_texts_are_no_vectors(encoder: SentenceTransformer) -> None:
    assert encoder.encode([]).shape == (0, 32)


@pytest.mark.parity
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sentence_transformers_reads_the_folder_and_gives_the_same_vectors(pooling: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip(f"needs sentence-transformers: {pip_install('sentence-transformers')}")
    from sentence_transformers import SentenceTransformer as Theirs

    mine = encoder_on("numba", pooling=pooling, normalize=pooling == "mean")
    mine.save_pretrained(tmp_path / "ours")
    theirs = Theirs(str(tmp_path / "ours"), device="cpu")
    assert theirs.max_seq_length == 12
    np.testing.assert_allclose(theirs.encode(TEXTS), mine.encode(TEXTS), atol=2e-6)
    np.testing.assert_allclose(
        theirs.encode(TEXTS, prompt_name="query"), mine.encode(TEXTS, prompt_name="query"), atol=2e-6
    )
    theirs.save(str(tmp_path / "theirs"))  # in the form of its own release
    again = SentenceTransformer.from_pretrained(tmp_path / "theirs")
    np.testing.assert_allclose(again.encode(TEXTS), mine.encode(TEXTS), atol=2e-6)
    assert again.config.prompts["query"] == PROMPTS["query"]
