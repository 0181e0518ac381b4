"""WordPiece: trained here, saved, loaded, and the same as transformers' tokenizer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
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
    vocabulary_size,
)
from minibert.data.assets import VOCABULARY_SIZE
from minibert.data.tokenizer import write_vocabulary
from minibert.errors import UserError, pip_install

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason=f"transformers is not installed: {pip_install('[parity]')}"
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
        subprocess.run([sys.executable, "-c", script, str(target)], check=True, env=environment, timeout=600)
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
        ("vocab.txt", WHOLE.replace("[MASK]\n", ""), r"lacks \[MASK\] \(mask_token\)"),
        ("vocab.txt", b"\xff\xfe", "expected UTF-8 in .*vocab.txt, but byte 0 "),
        ("vocab.txt", "", r"lacks \[PAD\]"),
        ("tokenizer.json", b"\xff", "expected UTF-8 in .*tokenizer.json"),
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


IDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "word": 5}


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        (WHOLE, IDS),
        (WHOLE.removesuffix("\n"), IDS),
        ("\ufeff" + WHOLE, IDS),
        (WHOLE.replace("\n", "\r\n"), IDS),
        (WHOLE.replace("\n", " \t\n"), IDS),
        (WHOLE + "word\nend\n", IDS | {"word": 6, "end": 7}),
        (WHOLE + "\n\nend\n\n", IDS | {"": 9, "end": 8}),
        (WHOLE + "a\u2028b\nend\n", IDS | {"a\u2028b": 6, "end": 7}),
    ],
)
def test_a_line_number_is_an_id_and_the_last_of_equal_lines_counts(
    tmp_path: Path, content: str, ids: dict[str, int]
) -> None:
    (tmp_path / "vocab.txt").write_bytes(content.encode())
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == ids
    assert vocabulary_size(loaded) == max(ids.values()) + 1
    save_tokenizer(loaded, tmp_path / "saved")
    for file in ("tokenizer.json", "vocab.txt"):
        assert load_tokenizer(tmp_path / "saved" / file).get_vocab() == ids


Files = dict[str, object]  # name, without .json -> content


def with_config(folder: Path, **files: object) -> Path:
    """A folder with vocab.txt and JSON files beside it."""
    (folder / "vocab.txt").write_text(WHOLE)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_all_that_a_config_says_comes_back_from_a_save(tmp_path: Path) -> None:
    said = {
        "model_max_length": 77, "never_split": ["word"], "do_basic_tokenize": True, "padding_side": "left",
        "strip_accents": False, "tokenize_chinese_chars": False, "bos_token": None, "somebody's": {"own": [1, None]},
        "additional_special_tokens": ["word"],
    }  # fmt: skip
    loaded = load_tokenizer(with_config(tmp_path, tokenizer_config=said))
    for given, written in ((None, 77), (512, 77), (64, 64)):
        save_tokenizer(loaded, tmp_path / "saved", model_max_length=given)
        config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
        assert config | said == config | {"model_max_length": 77}
        assert config["model_max_length"] == written
    assert config["added_tokens_decoder"]["5"]["content"] == "word" and config["do_lower_case"] is True


def test_the_model_gives_the_length_that_no_config_gives(shipped: Tokenizer, tmp_path: Path) -> None:
    for given in (None, 512):
        save_tokenizer(shipped, tmp_path, model_max_length=given)
        assert json.loads((tmp_path / "tokenizer_config.json").read_text()).get("model_max_length") == given


def test_padding_and_truncation_come_back_from_a_save(shipped: Tokenizer, tmp_path: Path) -> None:
    content = json.loads(shipped.to_str())
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "[PAD]",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    save_tokenizer(load_tokenizer(tmp_path), tmp_path / "saved")
    saved = Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert len(saved.encode("the").ids) == len(saved.encode("the " * 20).ids) == 8


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config", {"do_lower_case": "false"}, "true or false for 'do_lower_case' in .*, got \"false\""),
        ("tokenizer_config", {"do_lower_case": None}, "'do_lower_case' in .*tokenizer_config.json, got null"),
        ("tokenizer_config", {"strip_accents": 1}, "true, false or null for 'strip_accents' in .*, got 1"),
        ("tokenizer_config", {"tokenize_chinese_chars": []}, r"'tokenize_chinese_chars' in .*, got \[\]"),
        ("tokenizer_config", {"model_max_length": "512"}, "a number above 0, or null for 'model_max_length'"),
        ("tokenizer_config", {"model_max_length": True}, "'model_max_length' in .*, got true"),
        ("tokenizer_config", {"pad_token": 0}, "a token, .* for 'pad_token' in .*, got 0"),
        ("tokenizer_config", {"mask_token": {"lstrip": True}}, "'mask_token'"),
        ("tokenizer_config", {"mask_token": {"content": "[MASK]", "lstrip": "yes"}}, "'mask_token'"),
        ("tokenizer_config", {"cls_token": "\ud800"}, "'cls_token'"),
        ("tokenizer_config", {"additional_special_tokens": "[E]"}, "a list .* for 'additional_special_tokens'"),
        ("tokenizer_config", {"extra_special_tokens": [7]}, "'extra_special_tokens' in .*, got \\[7\\]"),
        ("tokenizer_config", {"added_tokens_decoder": ["[E]"]}, "'added_tokens_decoder'"),
        ("tokenizer_config", {"added_tokens_decoder": {"six": {"content": "[E]"}}}, "'added_tokens_decoder'"),
        ("tokenizer_config", {"added_tokens_decoder": {"5": {"content": "[E]"}}}, "same id 5"),
        ("tokenizer_config", {"never_split": "word"}, "'never_split'"),
        ("tokenizer_config", {"padding_side": "middle"}, "'padding_side'"),
        ("tokenizer_config", {"tokenizer_class": ["BertTokenizer"]}, "'tokenizer_class'"),
        ("config", {"tokenizer_class": 7}, "a name, or null for 'tokenizer_class' in .*config.json, got 7"),
        ("tokenizer_config", {"split_special_tokens": "no"}, "true or false for 'split_special_tokens'"),
        ("tokenizer_config", {"word_tokenizer_type": 1}, "'word_tokenizer_type'"),
        ("tokenizer_config", ["do_lower_case"], "expected a JSON object in .*tokenizer_config.json, got list"),
        ("special_tokens_map", {"sep_token": ["[SEP]"]}, "'sep_token' in .*special_tokens_map.json"),
        ("special_tokens_map", {"sep_token": "[END]"}, r"lacks \[END\] \(sep_token\)"),
        ("added_tokens", {"[E]": "6"}, "an id for '.E.' in .*added_tokens.json"),
        ("added_tokens", {"[E]": -1}, "an id for"),
        ("added_tokens", {"[E]": 5}, "'word' have the same id 5|'.E.' and 'word'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_line(tmp_path: Path, file: str, content: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(with_config(tmp_path, **{file: content}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [6, 7, 20])
def test_an_added_token_has_the_id_that_its_file_says(tmp_path: Path, number: int) -> None:
    loaded = load_tokenizer(with_config(tmp_path, added_tokens={"[E]": number}))
    save_tokenizer(loaded, tmp_path / "saved")
    for tokenizer in (loaded, load_tokenizer(tmp_path / "saved")):
        assert ids_of(tokenizer, "word[E]word") == [5, number, 5]
        assert vocabulary_size(tokenizer) == number + 1


def test_what_is_cut_in_an_unexpected_way_is_said(shipped: Tokenizer, tmp_path: Path) -> None:
    """A cased vocabulary without a config, a config against tokenizer.json, a tokenizer of another kind."""
    (tmp_path / "vocab.txt").write_text(WHOLE + "".join(f"Word{number}\n" for number in range(200)))
    with pytest.warns(UserWarning, match="has words in upper case"):
        load_tokenizer(tmp_path)
    with pytest.warns(UserWarning, match="cut as BertTokenizer does, not BertJapaneseTokenizer"):
        load_tokenizer(with_config(tmp_path, tokenizer_config={"tokenizer_class": "BertJapaneseTokenizer"}))
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    (tmp_path / "tokenizer.json").write_text(shipped.to_str(), encoding="utf-8")
    with pytest.warns(UserWarning, match="tokenizer_config.json, where do_lower_case is false, is followed against"):
        assert ids_of(load_tokenizer(tmp_path), "The") != ids_of(shipped, "The")


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"config": {"tokenizer_class": "BertJapaneseTokenizer"}}, "not BertJapaneseTokenizer: see"),
        (
            {"tokenizer_config": {"word_tokenizer_type": "mecab", "subword_tokenizer_type": "wordpiece"}},
            "not word_tokenizer_type mecab: see",
        ),
        (
            {
                "config": {"tokenizer_class": "BertTokenizer"},
                "tokenizer_config": {"tokenizer_class": "BertJapaneseTokenizer", "subword_tokenizer_type": "character"},
            },
            "not BertJapaneseTokenizer with subword_tokenizer_type character: see",
        ),
    ],
)
def test_a_folder_of_another_kind_is_said_wherever_it_is_named(tmp_path: Path, files: Files, what: str) -> None:
    with pytest.warns(UserWarning, match=f"vocab.txt is cut as BertTokenizer does, {what}"):
        loaded = load_tokenizer(with_config(tmp_path, **files))
    save_tokenizer(loaded, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert ("do_lower_case" in saved) == (saved["tokenizer_class"] == "BertTokenizer")  # Japanese ones default to false
    assert saved["tokenizer_class"] in what or "Japanese" not in what
    for name in ("tokenizer.json", "vocab.txt"):
        with pytest.warns(UserWarning, match=f"{name} is cut as BertTokenizer does, {what}"):
            load_tokenizer(tmp_path / "saved" / name)


@pytest.mark.parametrize("files", [{"tokenizer_class": "BertTokenizerFast"}, {"tokenizer_class": None}, {}])
def test_the_class_in_the_models_config_may_be_berts(tmp_path: Path, files: Files) -> None:
    load_tokenizer(with_config(tmp_path, config=files, tokenizer_config={"word_tokenizer_type": "basic"}))


def test_special_tokens_in_a_text_are_split_where_the_config_says_so(tmp_path: Path) -> None:
    (folder := with_config(tmp_path, tokenizer_config={"split_special_tokens": True})).joinpath("vocab.txt").write_text(
        WHOLE + "[\n]\nmask\n"
    )
    save_tokenizer(loaded := load_tokenizer(folder), tmp_path / "saved")
    for tokenizer in (loaded, load_tokenizer(tmp_path / "saved")):
        assert tokenizer.encode("word [MASK]").ids == [2, 5, 6, 8, 7, 3]


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"special_tokens_map": {"additional_special_tokens": ["<new>"]}}, [6, 6, 4, 1, 1, 1]),
        ({"special_tokens_map": {"extra_special_tokens": ["<new>"]}}, [6, 1, 1, 1, 4, 1, 1, 1]),
        ({"tokenizer_config": {"additional_special_tokens": ["<new>"]}}, [6, 1, 1, 1, 4, 1, 1, 1]),
        ({"added_tokens": {"<new>": 6, "[MASK]": 4}}, [6, 6, 4, 4]),
        (
            {"added_tokens": {"<new>": 6, "[MASK]": 4}, "special_tokens_map": {"mask_token": "[MASK]"}},
            [6, 6, 4, 1, 1, 1],
        ),
    ],
)
def test_added_tokens_that_no_file_calls_special_in_time_are_found_in_clean_text(
    tmp_path: Path, files: Files, ids: list[int]
) -> None:
    """As in transformers 5, which reads additional_special_tokens of the map too late: see the parity tests."""
    save_tokenizer(
        loaded := load_tokenizer(with_config(tmp_path, **{"added_tokens": {"<new>": 6}, **files})), tmp_path / "saved"
    )
    for tokenizer in (loaded, load_tokenizer(tmp_path / "saved")):
        assert ids_of(tokenizer, "<new><New>[MASK][Mask]") == ids


@pytest.mark.parametrize(
    ("parts", "config", "warned"),
    [
        ({"normalizer": {"lowercase": False}}, {}, True),
        ({"normalizer": {"lowercase": False}}, {"do_lower_case": False}, False),
        ({"normalizer": {"lowercase": False}}, {"tokenizer_class": "PreTrainedTokenizerFast"}, False),
        ({"normalizer": {"strip_accents": False}}, {}, True),
        ({"normalizer": {"strip_accents": True}}, {}, False),
        ({"normalizer": {"type": "Lowercase"}}, {"do_lower_case": True}, True),
        ({"model": {"max_input_chars_per_word": 20}}, {}, True),
        ({"decoder": {"cleanup": False}}, {}, False),
        ({"post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}}, {}, False),
        ({"post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[PAD]", 0]}}, {}, True),
        ({"padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                      "pad_type_id": 0, "pad_token": "[PAD]"}}, {}, False),
    ],
)  # fmt: skip
def test_a_json_that_transformers_cuts_otherwise_is_said_until_it_is_saved(
    shipped: Tokenizer, tmp_path: Path, parts: dict[str, dict[str, object]], config: dict[str, object], warned: bool
) -> None:
    content = json.loads(shipped.to_str())
    content |= {part: (content[part] or {}) | changed for part, changed in parts.items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_tokenizer(tmp_path)
        assert ["transformers 5 forgets how it cuts" in str(each.message) for each in caught] == [True] * warned
        save_tokenizer(loaded, tmp_path / "saved")
        load_tokenizer(tmp_path / "saved")
    assert len(caught) == warned


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


def test_json_whose_model_cannot_say_unknown_is_refused(shipped: Tokenizer, tmp_path: Path) -> None:
    content = json.loads(shipped.to_str())
    content["model"]["unk_token"] = "<unk>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="calls an unknown word '<unk>'"):
        load_tokenizer(tmp_path)


def test_json_without_bert_tokens_is_refused(shipped: Tokenizer, tmp_path: Path) -> None:
    content = shipped.to_str().replace("[MASK]", "<mask>")
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"lacks \[MASK\] \(mask_token\)"):
        load_tokenizer(tmp_path)
