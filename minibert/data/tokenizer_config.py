"""What stands beside a vocabulary: tokenizer_config.json, special_tokens_map.json, added_tokens.json, config.json.

They say how text is cleaned, which names the special tokens go by, and which tokens were added later. Read in the
order in which transformers 5 reads them. Keys without a meaning here are kept: a save writes them again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from tokenizers import AddedToken

from minibert.errors import UserError
from minibert.model.checkpoint import CONFIG as MODEL_CONFIG

CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"

# Key of the config -> name of the token where it gives none; in a vocabulary trained here their ids are 0 .. 4.
SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
MOST_IDS = 2**24  # the library counts up to the largest id, and notes each that is missing


class Added(NamedTuple):
    """A token that is found before the text is cleaned and cut, and its id if a file says it."""

    token: AddedToken
    id: int | None


# ---------------------------------------------------------------------------------------------------------- checking


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


def is_text(value: Any) -> TypeGuard[str]:
    """Half of a surrogate pair is no text, but JSON can write it."""
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value


def is_token(value: Any) -> bool:
    """A token's text, or the object that transformers writes for an AddedToken."""
    if isinstance(value, dict):
        return is_text(value.get("content")) and all(is_flag(value[flag]) for flag in FLAGS if flag in value)
    return is_text(value) and value != ""


def is_list_of_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_token, value))


def is_object_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


def is_length(value: Any) -> bool:
    return isinstance(value, int | float) and not is_flag(value) and value > 0


class Kind(NamedTuple):
    """What a key may hold, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


FLAG = Kind("true or false", is_flag)
LENGTH = Kind("a number above 0, or null", lambda value: value is None or is_length(value))
SIDE = Kind('"left" or "right"', lambda value: value in ("left", "right"))
NAMES = Kind(
    "a list of texts, or null",
    lambda value: value is None or (isinstance(value, list) and all(map(is_text, value))),
)
NAME = Kind("a name, or null", lambda value: value is None or is_text(value))
TOKEN = Kind("a token, as text or as an object with content", lambda value: value is None or is_token(value))
TOKENS = Kind(
    "a list or an object of tokens",
    lambda value: value is None or is_list_of_tokens(value) or is_object_of(is_token)(value),
)
KINDS = {
    "do_lower_case": FLAG,
    "tokenize_chinese_chars": FLAG,
    "strip_accents": Kind("true, false or null", lambda value: value is None or is_flag(value)),
    "do_basic_tokenize": FLAG,
    "never_split": NAMES,
    "split_special_tokens": FLAG,
    "word_tokenizer_type": NAME,
    "subword_tokenizer_type": NAME,
    "tokenizer_class": NAME,
    "model_max_length": LENGTH,
    "max_len": LENGTH,
    "padding_side": SIDE,
    "truncation_side": SIDE,
    "model_input_names": NAMES,
    "added_tokens_decoder": Kind(
        "an object from ids to tokens",
        lambda value: value is None or (all(map(str.isdecimal, value)) if is_object_of(is_token)(value) else False),
    ),
    "additional_special_tokens": TOKENS,
    "extra_special_tokens": TOKENS,
    **dict.fromkeys(("bos_token", "eos_token", *SPECIAL_TOKENS), TOKEN),
}


def read_checked(path: Path, kinds: Mapping[str, Kind], other: Kind | None = None) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no file; values of the wrong kind are a UserError."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"expected a JSON object in {path}, got {type(values).__name__}")
    for key, value in values.items():
        if not is_text(key):
            raise UserError(f"{path} has a key that is no text, {key!a}: correct it")
        kind = kinds.get(key, other)
        if kind is not None and not kind.holds(value):
            shown = json.dumps(value)
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise UserError(f"expected {kind.words} for {key!r} in {path}, got {shown}: correct it")
    return values


# ----------------------------------------------------------------------------------------------------------- reading


def as_token(value: Any, special: bool) -> AddedToken:
    """An added token from its text or its object."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    return AddedToken(value["content"], **{"special": special} | {flag: value[flag] for flag in FLAGS if flag in value})


def text_of(value: Any) -> Any:
    """Tokens as their texts, wherever objects of them stand."""
    if isinstance(value, dict):
        return value["content"] if "content" in value else {key: text_of(each) for key, each in value.items()}
    return [text_of(each) for each in value] if isinstance(value, list) else value


def extra_tokens(config: Mapping[str, Any]) -> list[Any]:
    """The special tokens beyond the named ones, as text or as objects."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return list(extra.values() if isinstance(extra, dict) else extra)


def read_config(folder: Path, serialized: Iterable[Added] = ()) -> tuple[dict[str, Any], list[Added]]:
    """The config of the tokenizer in a folder, its tokens named as texts, and all added tokens.

    `serialized` are those that tokenizer.json lists. Raises UserError for a file that is no JSON object, and for a
    value of the wrong type: the key, what was expected, what came, and the file.
    """
    config = read_checked(folder / CONFIG, KINDS)
    model = read_checked(folder / MODEL_CONFIG, {"tokenizer_class": NAME})
    if named_class := config.get("tokenizer_class") or model.get("tokenizer_class"):
        config["tokenizer_class"] = named_class
    decoder = config.pop("added_tokens_decoder", None)
    added = {each.token.content: each for each in serialized}
    early = extra_tokens(config)
    if decoder is None:
        about = read_checked(folder / SPECIAL_TOKENS_MAP, KINDS)
        config |= about
        early += extra_tokens({"extra_special_tokens": about.get("extra_special_tokens")})
    named = {key: value for key, value in config.items() if key.endswith("_token") and is_token(value)}
    named = {key: named[key] for key in dict.fromkeys(("bos_token", "eos_token", *named)) if key in named}
    extra = extra_tokens(config)
    if decoder is None:
        # As transformers 5 does: what no file has called special by now - one of BERT's own names, or in the map
        # additional_special_tokens - is found after the text is cleaned: where that lower-cases, "[Mask]" is [MASK].
        special = set(text_of([*named.values(), *early]))
        ids = read_checked(folder / ADDED_TOKENS, {}, Kind("an id", is_id))
        listed = {text: AddedToken(text, special=text in special, normalized=text not in special) for text in ids}
        added = {text: Added(token, ids[text]) for text, token in listed.items()} | added
    else:
        declared = [Added(as_token(value, special=False), int(number)) for number, value in decoder.items()]
        added |= {each.token.content: each for each in declared}

    for key in ("extra_special_tokens", "additional_special_tokens"):
        if key in config:
            config[key] = text_of(config[key])
    config |= {key: text_of(value) for key, value in named.items()}
    config |= {key: token for key, token in SPECIAL_TOKENS.items() if config.get(key) is None}
    named |= {key: config[key] for key in SPECIAL_TOKENS if key not in named}
    for value in named.values():
        added.setdefault(text_of(value), Added(as_token(value, special=True), None)).token.special = True
    for value in extra:
        added.setdefault(text_of(value), Added(as_token(value, special=True), None))
    return config, list(added.values())


def place(ids: Mapping[str, int], added: Iterable[Added], where: Path) -> tuple[dict[str, int], list[AddedToken]]:
    """Give each added token its id - the vocabulary's, else the one that its file says, else the next - in that order.

    The library numbers added tokens itself, upwards from the count of its vocabulary; where a file says otherwise, or
    the vocabulary has gaps, they are put into the vocabulary, whose ids stay. Raises UserError for an id given twice.
    """
    given: dict[str, int] = {}
    taken = {number: token for token, number in ids.items()}
    following = max(taken, default=-1) + 1
    tokens = {each.token.content: each.token for each in added}
    for token, said in added:
        number = ids.get(token.content, following if said is None else said)
        if taken.setdefault(number, token.content) != token.content:
            raise UserError(f"{token.content!r} and {taken[number]!r} have the same id {number} in {where}: correct it")
        given[token.content] = number
        following = max(following, number + 1)
    if max(taken, default=0) >= MOST_IDS:
        raise UserError(
            f"{taken[max(taken)]!r} has the id {max(taken)} in {where}: expected ids below {MOST_IDS}; correct it"
        )
    beyond = sorted(number for token, number in given.items() if token not in ids)
    natural = beyond == list(range(len(ids), len(ids) + len(beyond)))
    return dict(ids) | ({} if natural else given), [tokens[token] for token in sorted(given, key=given.__getitem__)]
