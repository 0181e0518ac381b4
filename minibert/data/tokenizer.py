"""Tokenizers on disk, by the `tokenizers` library: what transformers reads is read here, and what is saved reads alike.

A folder holds tokenizer.json, which says everything about cutting a text, or vocab.txt, which says the rest by
tokenizer_config.json (`tokenizer_config.py`); the pipeline that vocab.txt stands for is in `wordpiece.py`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, normalizers

from minibert.data.lines import AnyPath, decode
from minibert.data.panics import no_panic
from minibert.data.tokenizer_config import (
    ADDED_TOKENS,
    CONFIG,
    FLAGS,
    SPECIAL_TOKENS,
    SPECIAL_TOKENS_MAP,
    Added,
    as_token,
    place,
    read_config,
)
from minibert.data.wordpiece import build_tokenizer
from minibert.errors import UserError, path_of
from minibert.model.checkpoint import CONFIG as MODEL_CONFIG
from minibert.model.checkpoint import make_folder, write_atomically

SHIPPED_VOCABULARY = Path(__file__).resolve().parent.parent / "assets" / "vocab.txt"
SERIALIZED, VOCABULARY = "tokenizer.json", "vocab.txt"
FILES = (SERIALIZED, VOCABULARY, CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS)  # all that a tokenizer is read from

GENERAL_CLASS = "PreTrainedTokenizerFast"  # transformers' class that follows tokenizer.json alone
GENERAL_CLASSES = (GENERAL_CLASS, "PreTrainedTokenizer", "TokenizersBackend")
# The classes of transformers whose vocab.txt is cut as BERT cuts; "Fast" may follow.
BERTS_CLASSES = {
    *("BertTokenizer", "ConvBertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "FunnelTokenizer"),
    *("LayoutLMTokenizer", "LxmertTokenizer", "MobileBertTokenizer", "RealmTokenizer", "RetriBertTokenizer"),
    "SqueezeBertTokenizer",
}
# What BertJapaneseTokenizer and its kind can do otherwise -> BERT's own way.
CUTTING = {"word_tokenizer_type": "basic", "subword_tokenizer_type": "wordpiece"}
# Field of the normalizer in tokenizer.json -> key of tokenizer_config.json.
CLEANING = {
    "lowercase": "do_lower_case",
    "strip_accents": "strip_accents",
    "handle_chinese_chars": "tokenize_chinese_chars",
}


class SpecialIds(NamedTuple):
    """The ids of the five special tokens."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


class Settings(NamedTuple):
    """What a tokenizer was loaded with besides the way it cuts; a save writes it again."""

    config: dict[str, Any]  # of tokenizer_config.json, the names of the special tokens among it
    lengths: dict[str, Any]  # padding and truncation of tokenizer.json: switched off here


def settings_of(tokenizer: Tokenizer) -> Settings:
    """BERT's own for a tokenizer that was not loaded. (The library's class takes attributes, but no subclasses.)"""
    settings: Settings = getattr(tokenizer, "settings", Settings(dict(SPECIAL_TOKENS), {}))
    return settings


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The ids of the special tokens, by the names that the tokenizer's files give them.

    Raises UserError naming the one that the vocabulary lacks.
    """
    return find_special(tokenizer.get_vocab(with_added_tokens=True), settings_of(tokenizer).config, "the vocabulary")


def find_special(ids: Mapping[str, int], config: Mapping[str, Any], where: AnyPath) -> SpecialIds:
    missing = [f"{config[key]} ({key})" for key in SPECIAL_TOKENS if config[key] not in ids]
    if missing:
        raise UserError(
            f"expected BERT's special tokens in {where}, but it lacks {', '.join(missing)}: say in {CONFIG} what they "
            "are called, or add them at the end, where no other id changes"
        )
    return SpecialIds(*(ids[config[key]] for key in SPECIAL_TOKENS))


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The rows that a model needs for it: one more than the largest id. A vocabulary with gaps has fewer tokens."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError where the tokenizer can give an id for which the weights have no row."""
    token, largest = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise UserError(
            f"expected token ids below vocab_size {vocab_size}, but the vocabulary gives {token!r} the id {largest}: "
            "use the tokenizer that the weights were trained with"
        )


# ----------------------------------------------------------------------------------------------------------- loading


def tokenizer_files(folder: Path) -> list[Path]:
    """The files in a folder that a tokenizer can be read from, the better one first."""
    return [folder / name for name in (SERIALIZED, VOCABULARY) if (folder / name).is_file()]


def load_tokenizer(folder_or_file: AnyPath) -> Tokenizer:
    """The tokenizer of a folder with `tokenizer.json` or `vocab.txt`, or of one of these files itself.

    What stands beside the file is read too. Padding and truncation are switched off, until a save. Raises UserError
    where a file is missing, broken or no BERT vocabulary.
    """
    path = path_of(folder_or_file, "a tokenizer's folder or file")
    if path.is_dir():
        found = tokenizer_files(path)
        if not found:
            raise UserError(f"expected tokenizer.json or vocab.txt in {path}, found neither: name another folder")
        path = found[0]
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}: expected a folder with tokenizer.json or vocab.txt, or such a file")
    with no_panic(f"the tokenizers library fails on {path}", silent=True):
        tokenizer, settings = (from_json if path.suffix == ".json" else from_vocabulary)(path)
    tokenizer.settings = settings  # type: ignore[attr-defined]
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = settings.config.get("split_special_tokens", False)
    return tokenizer


def read_text(path: Path) -> str:
    try:
        return decode(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def parse(text: str, path: Path) -> Tokenizer:
    failure = f"{path} is no tokenizer.json that the tokenizers library can read"
    try:
        with no_panic(failure, silent=True):
            return Tokenizer.from_str(text)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{failure}: {' '.join(str(error).split())}") from None


def from_json(path: Path) -> tuple[Tokenizer, Settings]:
    """tokenizer.json as it is; where tokenizer_config.json says otherwise, that is followed, as transformers does."""
    text = read_text(path)
    parse(text, path)
    content = json.loads(text)
    lengths = {key: content.get(key) for key in ("padding", "truncation")}
    serialized = [Added(as_token(entry, special=False), entry["id"]) for entry in content.get("added_tokens", ())]
    config, added = read_config(path.parent, serialized)
    vocabulary = content["model"]["vocab"]
    if not isinstance(vocabulary, dict):  # Unigram: pieces with their scores, in the order of their ids
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    special_among(vocabulary, added, config, path)
    unknown = content["model"].get("unk_token")
    if unknown is not None and unknown not in vocabulary:
        raise UserError(f"{path} calls an unknown word {unknown!r}, which is not in its vocabulary: correct unk_token")
    placed, tokens = place(vocabulary, added, path)
    if placed != vocabulary:
        if content["model"]["vocab"] is not vocabulary:
            raise UserError(f"the added tokens in {path} do not follow its vocabulary without a gap: number them so")
        content["model"]["vocab"] = placed
    tokenizer = parse(json.dumps(content | {"added_tokens": []}), path)
    tokenizer.add_tokens(tokens)
    follow_config(tokenizer, config, path)
    if cuts_as_bert(tokenizer, config):
        warn_of_another_kind(config, path)
    elif class_named(config) in BERTS_CLASSES:
        warnings.warn(
            f"{path} is followed, but transformers 5 forgets how it cuts where {CONFIG} does not say the same: other "
            "ids there, until it is saved from here",
            stacklevel=3,
        )
    return tokenizer, Settings(config, lengths)


def special_among(ids: Mapping[str, int], added: Iterable[Added], config: Mapping[str, Any], path: Path) -> SpecialIds:
    """The ids of the special tokens in a vocabulary, or as its files say. Raises UserError for one without an id:
    transformers gives it the next, for which no weights have a row.
    """
    return find_special(
        {each.token.content: each.id for each in added if each.id is not None} | dict(ids), config, path
    )


def follow_config(tokenizer: Tokenizer, config: Mapping[str, Any], path: Path) -> None:
    """Clean text as tokenizer_config.json says where it contradicts tokenizer.json, and warn."""
    normalizer = json.loads(tokenizer.normalizer.__getstate__()) if tokenizer.normalizer else {}
    if normalizer.get("type") != "BertNormalizer" or config.get("tokenizer_class") in GENERAL_CLASSES:
        return
    said = {field: config.get(key, normalizer[field]) for field, key in CLEANING.items()}
    changed = [key for field, key in CLEANING.items() if said[field] != normalizer[field]]
    if changed:
        tokenizer.normalizer = normalizers.BertNormalizer(normalizer["clean_text"], **said)
        what = ", ".join(f"{key} is {json.dumps(config[key])}" for key in changed)
        warnings.warn(f"{path.with_name(CONFIG)}, where {what}, is followed against {path.name}", stacklevel=4)


def class_named(config: Mapping[str, Any]) -> str:
    """The class of transformers that the files name, without "Fast"; BERT's where they name none."""
    return str(config.get("tokenizer_class") or "BertTokenizer").removesuffix("Fast")


def is_of_another_kind(config: Mapping[str, Any]) -> bool:
    """Whether the class named is one whose vocab.txt is cut otherwise than BERT's."""
    return class_named(config) not in {*BERTS_CLASSES, *GENERAL_CLASSES}


def warn_of_another_kind(config: Mapping[str, Any], path: Path) -> None:
    """Warn where the files name another way to cut than BERT's."""
    others = [class_named(config)] if is_of_another_kind(config) else []
    others += [f"{key} {config[key]}" for key, own in CUTTING.items() if config.get(key) not in (None, own)]
    if others:
        beside = f"{CONFIG} and {MODEL_CONFIG} beside it"
        warnings.warn(f"{path} is cut as BertTokenizer does, not {' with '.join(others)}: see {beside}", stacklevel=4)


def from_vocabulary(path: Path) -> tuple[Tokenizer, Settings]:
    """vocab.txt: BERT's pipeline on it, cleaning text as `tokenizer_config.json` beside it says."""
    config, added = read_config(path.parent)
    warn_of_another_kind(config, path)
    vocabulary = parse_vocabulary(read_text(path))
    special = special_among(vocabulary, added, config, path)
    vocabulary |= {config[key]: number for key, number in zip(SPECIAL_TOKENS, special, strict=True)}
    ids, tokens = place(vocabulary, added, path)
    if "do_lower_case" not in config and is_cased(vocabulary):
        warnings.warn(
            f"{path} has words in upper case, but text is made lower case, as BERT's vocabularies want it where no "
            f'{CONFIG} says otherwise: put {{"do_lower_case": false}} there if the model is a cased one',
            stacklevel=3,
        )
    tokenizer = build_tokenizer(ids, config)
    tokenizer.add_tokens(tokens)
    return tokenizer, Settings(config, {})


def is_cased(tokens: Iterable[str]) -> bool:
    """Whether more words have capitals, [unused1] and its kind left out, than chance explains."""
    words = [token for token in tokens if not token.startswith("[")]
    return sum(word != word.lower() for word in words) > max(100, len(words) // 20)


def parse_vocabulary(text: str) -> dict[str, int]:
    """One token a line, its line number its id, spaces at its end dropped. Of equal lines the last one counts: no id
    after them moves. Only a line feed ends a line: some vocabularies hold U+2028 or U+0085 as a token.
    """
    return {line.rstrip(): number for number, line in enumerate(text.removesuffix("\n").split("\n"))}


# ------------------------------------------------------------------------------------------------------------ saving


def save_tokenizer(tokenizer: Tokenizer, folder: AnyPath, model_max_length: int | None = None) -> None:
    """Write tokenizer.json, tokenizer_config.json and, where it says the same, vocab.txt, as AutoTokenizer reads them.

    `model_max_length` is what the model can take: written unless less was loaded. Raises UserError where a file cannot
    be written; each is written whole or not at all.
    """
    folder = Path(folder)
    settings = settings_of(tokenizer)
    content = json.loads(tokenizer.to_str()) | settings.lengths
    config = dict(settings.config)
    # A class that cuts as the weights want it, if not here: transformers goes on with it, and the next load warns too.
    kept = is_of_another_kind(config) and cuts_as_bert(tokenizer, config, decodes_too=True)
    if not kept and (cleaning := content["normalizer"] or {}).get("type") == "BertNormalizer":
        config |= {key: cleaning[field] for field, key in CLEANING.items()}
    own = kept or cuts_as_bert(tokenizer, config, decodes_too=True)
    if not kept and config.get("tokenizer_class") not in GENERAL_CLASSES:
        config["tokenizer_class"] = "BertTokenizer" if own else GENERAL_CLASS
        if not own:  # the general class gives no token types unless told to
            config.setdefault("model_input_names", ["input_ids", "token_type_ids", "attention_mask"])
    lengths = (model_max_length, config.get("model_max_length"), config.get("max_len"))
    if known := [length for length in lengths if length is not None]:
        config["model_max_length"] = min(known)
    config["added_tokens_decoder"] = {
        str(number): {"content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    make_folder(folder)
    write(folder / SERIALIZED, json.dumps(content, indent=2, ensure_ascii=False))
    write(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    if own and (text := vocabulary_text(content["model"]["vocab"])):
        write(folder / VOCABULARY, text)


def cuts_as_bert(tokenizer: Tokenizer, config: Mapping[str, Any], decodes_too: bool = False) -> bool:
    """Whether a text has the ids that BERT's pipeline under this config gives: all that BertTokenizer follows.

    And, where `decodes_too`, ids their text.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True)
    own = build_tokenizer({config[key]: ids[config[key]] for key in SPECIAL_TOKENS}, config)
    empty = own.encode("", add_special_tokens=False)

    def cutting(tokenizer: Tokenizer) -> list[Any]:
        content = json.loads(tokenizer.to_str())
        model = {key: value for key, value in content["model"].items() if key != "vocab"}
        normalizer = content["normalizer"]
        if normalizer and normalizer["type"] == "BertNormalizer" and normalizer["strip_accents"] is None:
            normalizer["strip_accents"] = normalizer["lowercase"]
        process = tokenizer.post_processor.process if tokenizer.post_processor else (lambda first, second=None: first)
        around = [(each.ids, each.type_ids) for each in (process(empty), process(empty, empty))]
        return [model, normalizer, content["pre_tokenizer"], around, decodes_too and content["decoder"]]

    return cutting(tokenizer) == cutting(own)


def vocabulary_text(ids: Mapping[str, int]) -> str | None:
    """vocab.txt. An id without a token repeats the token of the next one: its last line counts. None where the lines
    would not read as these ids: tokens that end in a space, ids far beyond the others.
    """
    token_of = {number: token for token, number in ids.items()}
    last = max(token_of)
    if last >= 2 * len(ids):
        return None
    lines = [token_of[last]]
    for number in range(last - 1, -1, -1):
        lines.append(token_of.get(number, lines[-1]))
    text = "".join(f"{token}\n" for token in reversed(lines))
    return text if parse_vocabulary(text) == ids else None


def write_vocabulary(tokenizer: Tokenizer, path: AnyPath) -> None:
    """vocab.txt: one token a line, its line number its id. Raises UserError where it cannot hold this vocabulary."""
    text = vocabulary_text(tokenizer.get_vocab(with_added_tokens=False))
    if text is None:
        raise UserError(f"{path} cannot hold this vocabulary: its tokens end in spaces, or its ids have gaps; save all")
    write(Path(path), text)


def write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))
