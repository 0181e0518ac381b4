"""WordPiece: trained here, saved, loaded, and the same as transformers' tokenizer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from minibert.data import (
    SHIPPED_TEXT,
    SHIPPED_VOCABULARY,
    Document,
    check_vocabulary,
    load_tokenizer,
    read_documents,
    save_tokenizer,
    special_ids,
    train_tokenizer,
)
from minibert.data.assets import VOCABULARY_SIZE
from minibert.data.tokenizer import write_vocabulary
from minibert.errors import UserError

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install '.[parity]'"
)
STRANGE = [
    "Ünïcödé café naïve — “quoted” … [sic] 3.14% $1,000.00 e-mail@x.org",
    "国家 talks; 中文字 mixed with English",
    "a\u200bb\u00a0c\tno\u0000nsense \U0001f600 ﬁne",
    "x" * 101 + " pneumonoultramicroscopicsilicovolcanoconiosis",
    "",
]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return read_documents(SHIPPED_TEXT)


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return load_tokenizer(SHIPPED_VOCABULARY)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def test_shipped_vocabulary_is_what_training_on_the_shipped_text_gives(
    documents: list[Document], tmp_path: Path
) -> None:
    write_vocabulary(train_tokenizer(documents, VOCABULARY_SIZE), tmp_path / "vocab.txt")
    assert (tmp_path / "vocab.txt").read_bytes() == SHIPPED_VOCABULARY.read_bytes()


def test_special_tokens_come_first(shipped: Tokenizer) -> None:
    assert special_ids(shipped) == (0, 1, 2, 3, 4)
    assert shipped.get_vocab_size() == VOCABULARY_SIZE


def test_training_does_not_depend_on_the_process(tmp_path: Path) -> None:
    """The library's hash tables are seeded anew in each process, Python's by PYTHONHASHSEED."""
    script = (
        "import sys; from minibert.data import *; from minibert.data.tokenizer import write_vocabulary\n"
        "text = read_documents(SHIPPED_TEXT)[:4]\n"
        "write_vocabulary(train_tokenizer(text, 1500), sys.argv[1])"
    )
    for run in range(3):
        target = tmp_path / f"{run}.txt"
        environment = {
            **os.environ,
            "PYTHONHASHSEED": str(run),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        subprocess.run([sys.executable, "-c", script, str(target)], check=True, env=environment)
    first, *others = [(tmp_path / f"{run}.txt").read_bytes() for run in range(3)]
    assert first.count(b"\n") == 1500
    assert others == [first, first]


@pytest.mark.parametrize("lowercase", [True, False])
def test_saved_and_loaded_tokenizers_agree(documents: list[Document], tmp_path: Path, lowercase: bool) -> None:
    trained = train_tokenizer(documents[:3], 1000, lowercase=lowercase)
    save_tokenizer(trained, tmp_path)
    from_json = load_tokenizer(tmp_path)
    from_vocabulary = load_tokenizer(tmp_path / "vocab.txt")
    assert from_json.get_vocab() == from_vocabulary.get_vocab() == trained.get_vocab()
    (tmp_path / "tokenizer.json").unlink()
    from_folder = load_tokenizer(tmp_path)
    for text in documents[5][:50] + STRANGE:
        expected = ids_of(trained, text)
        assert ids_of(from_json, text) == ids_of(from_vocabulary, text) == ids_of(from_folder, text) == expected
    assert (ids_of(trained, "The Union") == ids_of(trained, "the union")) == lowercase


def test_text_comes_back_from_its_tokens(shipped: Tokenizer) -> None:
    text = "the constitution, which the people ordained, is preserved."
    assert shipped.decode(ids_of(shipped, text)) == text


def test_padding_and_truncation_of_a_loaded_file_are_off(shipped: Tokenizer, tmp_path: Path) -> None:
    padding = Tokenizer.from_str(shipped.to_str())
    padding.enable_padding(length=50)
    padding.enable_truncation(4)
    padding.save(str(tmp_path / "tokenizer.json"))
    assert len(ids_of(load_tokenizer(tmp_path), "we the people of the united states")) == 7


@pytest.mark.parity
@needs_transformers
@pytest.mark.parametrize("lowercase", [True, False])
def test_transformers_gives_the_same_tokens(documents: list[Document], tmp_path: Path, lowercase: bool) -> None:
    from transformers import AutoTokenizer, BertTokenizerFast

    save_tokenizer(train_tokenizer(documents, 3000, lowercase=lowercase), tmp_path)
    ours = load_tokenizer(tmp_path / "vocab.txt")
    texts = [sentence for document in documents[::4] for sentence in document[:60]] + STRANGE
    assert sum(len(text.split()) for text in texts) > 5000
    for theirs in (AutoTokenizer.from_pretrained(tmp_path), BertTokenizerFast.from_pretrained(tmp_path)):
        assert (theirs.pad_token, theirs.mask_token, theirs.mask_token_id) == ("[PAD]", "[MASK]", 4)
        assert theirs(texts)["input_ids"] == [encoding.ids for encoding in ours.encode_batch(texts)]
        first, second = texts[0], texts[1]
        pair = ours.encode(first, second)
        assert (theirs(first, second)["input_ids"], theirs(first, second)["token_type_ids"]) == (
            pair.ids,
            pair.type_ids,
        )


def test_a_vocabulary_must_fit_the_weights(shipped: Tokenizer) -> None:
    check_vocabulary(shipped, VOCABULARY_SIZE)
    with pytest.raises(UserError, match=f"below vocab_size {VOCABULARY_SIZE - 1}.*id {VOCABULARY_SIZE - 1}"):
        check_vocabulary(shipped, VOCABULARY_SIZE - 1)


def test_too_small_a_vocabulary_is_refused(documents: list[Document]) -> None:
    with pytest.raises(UserError, match="vocabulary of at least"):
        train_tokenizer(documents, 40)


WHOLE = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", WHOLE.replace("[MASK]\n", ""), r"\[MASK\] is missing"),
        ("vocab.txt", WHOLE + "word\n", "'word' occurs twice"),
        ("vocab.txt", b"\xff\xfe", "cannot read the vocabulary"),
        ("tokenizer.json", "{}", "no tokenizer.json"),
        ("tokenizer.json", "not json", "no tokenizer.json"),
        ("other.txt", "", "expected tokenizer.json or vocab.txt"),
    ],
)
def test_a_broken_tokenizer_is_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_and_a_broken_config_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "vocab.txt").write_text(WHOLE)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        load_tokenizer(tmp_path)


def test_casing_follows_the_config(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text(WHOLE + "Word\n")
    assert ids_of(load_tokenizer(tmp_path), "Word") == [5]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert ids_of(load_tokenizer(tmp_path), "Word") == [6]


def test_json_without_bert_tokens_is_refused(shipped: Tokenizer, tmp_path: Path) -> None:
    content = shipped.to_str().replace("[MASK]", "<mask>")
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"\[MASK\] missing"):
        load_tokenizer(tmp_path)
