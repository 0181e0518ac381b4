"""What is saved here is cut by transformers as it is cut here: many tokenizers, nasty texts, all ids equal."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from minibert.data import load_tokenizer, save_tokenizer, special_ids
from minibert.data.wordpiece import build_tokenizer
from minibert.errors import pip_install

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None,
        reason=f"transformers is not installed: {pip_install('[parity]')}",
    ),
]

LINES = """
[PAD] [UNK] [CLS] [SEP] [MASK] [unused1] the union people state of The UNION Schön schön schon Straße straße ß i İ ı
istanbul café cafe e é u ü ##e ##é ##u ##ü a b c d f g h n o s t x y z ##a ##b ##c ##d ##h ##i ##n ##o ##s ##t ##x
##the ##ing 国 家 国家 中 文 ##文 한국어 각 한 ##국 สวัสดี ##ครับ 😀 ##😀 foo Foo bar ##bar ent mask don 3 14 ' . , ! ? - _
( ) # [ ] < > / \ufffd
"""
WORDS = LINES.split()
IDS = {word: number for number, word in enumerate(WORDS)}
RENAMED = {"[PAD]": "<pad>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}
NEXT = len(WORDS)  # the first free id

TEXTS = [
    "",
    " \t\r\n ",
    "The UNION of the People's states",
    "Ünïcödé café schön Schön Straße STRASSE — “quoted” … [sic] 3.14% e-mail@x.org",
    "国家 talks; 中文字 mixed with English 日本語カタカナ",
    "İstanbul ıiİI ẞß ﬁne ſK",
    "สวัสดีครับ ภาษาไทย नमस्ते العربية עברית Ελληνικά Кириллица",
    "한국어 각 \u1112\u1161\u11ab\u1100\u116e\u11a8",
    "e\u0301a\u0308\u0323 \u0301alone u\u0308",
    "a\u200bb\u200cc\u200dd\ufefff\u2060g",
    "a\x00b\x01c\x7fd\x85e\u2028f\u2029g\ufffdh",
    "👩‍👩‍👧‍👦 😀😀 🇩🇪 \U0001d400\U00010400\ue000\U0010ffff",
    " ".join(letter * count for letter, count in zip("xyabé", (19, 99, 100, 101, 100), strict=True)),
    "[CLS] a [SEP] b [MASK] [UNK] [PAD] [mask] [Mask]the[MASK]the  [MASK] <mask> <pad> </s> [unused1]",
    "!!!???...---___((()))##the##",
    "don't<ent>the <ENT>a [E1] Foo foo FOO foobar foo bar\u00a0bar\u3000bar",
]


class Case(NamedTuple):
    """The files of a folder; whether BERT's own class can follow them; whether transformers reads them as we do."""

    files: dict[str, Any]
    berts: bool = True
    source: bool = True


def vocabulary(*words: str, end: str = "\n", **config: Any) -> dict[str, Any]:
    """vocab.txt, and a config beside it if there is something to say."""
    return {"vocab.txt": "\n".join(words or WORDS) + end} | ({"tokenizer_config.json": config} if config else {})


def renamed(**config: Any) -> dict[str, Any]:
    return vocabulary(*(RENAMED.get(word, word) for word in WORDS), **config)


def serialized(*added: dict[str, Any], config: dict[str, Any] | None = None, **parts: Any) -> dict[str, Any]:
    """tokenizer.json of BERT's pipeline with some parts of it changed and tokens added."""
    content = json.loads(build_tokenizer(IDS, {}).to_str()) | parts
    content["added_tokens"] += [PLAIN | token for token in added]
    return {"tokenizer.json": content} | ({"tokenizer_config.json": config} if config else {})


PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
ENTITY = PLAIN | {"content": "<ent>", "lstrip": True}  # takes the space before it
MASK = ENTITY | {"content": "<mask>"}
NAMES = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
DOUBLE = [*WORDS[:9], "the", "", "union", "", *WORDS[9:]]
GENERAL = {"tokenizer_class": "PreTrainedTokenizerFast"}
BERT = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
WORDPIECE = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}

CASES = {
    "plain": Case(vocabulary()),
    "cased": Case(vocabulary(do_lower_case=False, model_max_length=128)),
    "accents kept": Case(vocabulary(strip_accents=False)),
    "accents stripped from cased text": Case(vocabulary(do_lower_case=False, strip_accents=True)),
    "no Chinese": Case(vocabulary(tokenize_chinese_chars=False, never_split=["foo"], do_basic_tokenize=True)),
    "names in the config": Case(renamed(**NAMES, mask_token=MASK | {"__type": "AddedToken"})),
    "names in the map": Case(
        renamed(do_lower_case=False, pad_token="[overridden]")
        | {"special_tokens_map.json": NAMES | {"mask_token": MASK | {"special": True}}}
    ),
    "added_tokens.json": Case(
        vocabulary()
        | {"added_tokens.json": {"[E1]": NEXT + 1, "<ent>": NEXT}}
        | {"special_tokens_map.json": {"additional_special_tokens": ["[E1]"]}}
    ),
    "additional_special_tokens of the map": Case(
        vocabulary()
        | {"added_tokens.json": {"<ent>": NEXT}}
        | {"special_tokens_map.json": {"additional_special_tokens": ["<ent>"]}}
    ),
    "special tokens in added_tokens.json": Case(
        vocabulary() | {"added_tokens.json": {"[CLS]": 2, "[MASK]": 4, "<ent>": NEXT}}
    ),
    "special tokens are split": Case(vocabulary(split_special_tokens=True)),
    "special tokens of a json are split": Case(serialized(config={"split_special_tokens": True})),
    # transformers leaves [UNK] out of what WordPiece can give, and fails at the first unknown word.
    "special tokens among the added": Case(
        vocabulary(*WORDS[4:]) | {"added_tokens.json": {word: NEXT - 4 + IDS[word] for word in WORDS[:4]}}, source=False
    ),
    "added_tokens_decoder": Case(
        vocabulary(
            added_tokens_decoder={
                "4": ENTITY | {"content": "[MASK]"},
                str(NEXT): ENTITY,
                str(NEXT + 1): {"content": "Foo"},
            }
        )
    ),
    "more special tokens": Case(
        vocabulary(additional_special_tokens=["<ent>", "[unused1]"], bos_token="[E1]", eos_token=None)
    ),
    "double and empty lines": Case(vocabulary(*DOUBLE, end="\n\n")),
    "spaces at the end of lines": Case(vocabulary(*(f"{word} \r" for word in WORDS), "the\t")),
    "no line end at the end": Case(vocabulary(end="")),
    # transformers gives the added token the id of another one.
    "double lines and an added token": Case(
        vocabulary(*DOUBLE) | {"added_tokens.json": {"<ent>": len(DOUBLE)}}, source=False
    ),
    # transformers looks for [PAD], finds \ufeff[PAD], and adds one beyond the weights.
    "byte order mark": Case({"vocab.txt": "\ufeff" + "\n".join(WORDS)}, source=False),
    "json": Case(serialized()),
    "json, added tokens": Case(
        serialized(ENTITY | {"id": NEXT}, {"content": "foo", "id": IDS["foo"], "single_word": True})
    ),
    "json, a gap before an added token": Case(serialized(ENTITY | {"id": NEXT + 7}), source=False),
    "json, against its config": Case(serialized(config={"do_lower_case": False, "strip_accents": True})),
    # Unless the config names its general class, transformers takes the words of these and forgets the rest.
    "json, cased": Case(serialized(normalizer=BERT | {"lowercase": False}), source=False),
    "json, no normalizer": Case(serialized(normalizer=None, config=GENERAL), berts=False),
    "json, other normalizers": Case(
        serialized(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}),
        berts=False,
        source=False,
    ),
    "json, cut at spaces": Case(serialized(pre_tokenizer={"type": "WhitespaceSplit"}, config=GENERAL), berts=False),
    "json, words of 20 characters": Case(
        serialized(model=WORDPIECE | {"max_input_chars_per_word": 20, "vocab": IDS}, config=GENERAL), berts=False
    ),
    "json, no [CLS] and [SEP] around": Case(serialized(post_processor=None), berts=False, source=False),
    "json of whole words": Case(
        serialized(model={"type": "WordLevel", "unk_token": "[UNK]", "vocab": IDS}, config=GENERAL), berts=False
    ),
    "json of Unigram": Case(
        serialized(model={"type": "Unigram", "unk_id": 1, "vocab": [[word, -IDS[word]] for word in WORDS]}),
        berts=False,
        source=False,
    ),
}


def write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_bytes(text.encode())
    return folder


@pytest.mark.filterwarnings("ignore:.*followed against tokenizer.json", "ignore:.*forgets how it cuts")
@pytest.mark.parametrize("name", CASES)
def test_transformers_cuts_a_saved_tokenizer_as_we_do(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertTokenizerFast

    case = CASES[name]
    source = write(tmp_path / "source", case.files | {"config.json": {"model_type": "bert"}})
    saved, again = tmp_path / "saved", tmp_path / "again"
    ours = load_tokenizer(source)
    expected = [encoding.ids for encoding in ours.encode_batch(TEXTS)]
    pair = ours.encode(TEXTS[2], TEXTS[3])
    save_tokenizer(ours, saved, model_max_length=512)

    theirs = [AutoTokenizer.from_pretrained(saved)]
    write(saved, {"config.json": {"model_type": "bert"}})
    theirs += [
        AutoTokenizer.from_pretrained(saved),
        *([BertTokenizerFast.from_pretrained(saved)] if case.berts else ()),
    ]
    for each in theirs:
        assert [each(text)["input_ids"] for text in TEXTS] == expected
        both = each(TEXTS[2], TEXTS[3], return_token_type_ids=True)
        assert (both["input_ids"], both["token_type_ids"]) == (pair.ids, pair.type_ids)
        assert ("token_type_ids" in each.model_input_names) == (case.files.get("tokenizer_config.json") != GENERAL)
        special = (each.pad_token_id, each.unk_token_id, each.cls_token_id, each.sep_token_id, each.mask_token_id)
        assert special == special_ids(ours)
        assert each.model_max_length == case.files.get("tokenizer_config.json", {}).get("model_max_length", 512)
        assert set(each.get_vocab().items()) == set(ours.get_vocab().items())
        assert ours.decode(expected[3]) == each.decode(expected[3], skip_special_tokens=True)
    if case.source:
        assert [AutoTokenizer.from_pretrained(source)(text)["input_ids"] for text in TEXTS] == expected

    for part in (saved, *([saved / "vocab.txt"] if case.berts else ())):
        assert [encoding.ids for encoding in load_tokenizer(part).encode_batch(TEXTS)] == expected
    save_tokenizer(load_tokenizer(saved), again)
    for file in again.iterdir():
        assert file.read_bytes() == (saved / file.name).read_bytes()
