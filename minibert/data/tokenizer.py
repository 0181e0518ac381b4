"""WordPiece, as BERT cuts words (Devlin et al. 2018; Wu et al. 2016), by the `tokenizers` library."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minibert.data.text import AnyPath, Document
from minibert.errors import UserError

SHIPPED_VOCABULARY = Path(__file__).resolve().parent.parent / "assets" / "vocab.txt"

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 .. 4 of a vocabulary trained here
CONTINUES = "##"  # marks a piece that does not begin a word
ALPHABET_LIMIT = 5000  # characters kept: every one of an alphabetic script, the frequent ones of Chinese
LONGEST_WORD = 100  # characters; a longer word is [UNK], as in BERT


class SpecialIds(NamedTuple):
    """The ids of the five special tokens."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Raises UserError naming the special token that the vocabulary lacks."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    missing = [token for token in SPECIAL_TOKENS if token not in ids]
    if missing:
        raise UserError(f"expected BERT's special tokens in the vocabulary, but {', '.join(missing)} missing: add them")
    return SpecialIds(*(ids[token] for token in SPECIAL_TOKENS))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files in a folder that a tokenizer can be read from, the better one first."""
    return [folder / name for name in ("tokenizer.json", "vocab.txt") if (folder / name).is_file()]


def load_tokenizer(folder_or_file: AnyPath) -> Tokenizer:
    """The tokenizer of a folder with `tokenizer.json` or `vocab.txt`, or of one of these files itself.

    Padding and truncation are switched off. Raises UserError where the file is missing, broken or no BERT vocabulary.
    """
    path = Path(folder_or_file)
    if path.is_dir():
        found = tokenizer_files(path)
        if not found:
            raise UserError(f"expected tokenizer.json or vocab.txt in {path}, found neither: name another folder")
        path = found[0]
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}: expected a folder with tokenizer.json or vocab.txt, or such a file")
    tokenizer = tokenizer_from_json(path) if path.suffix == ".json" else tokenizer_from_vocabulary(path)
    special_ids(tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def tokenizer_from_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no tokenizer.json that the tokenizers library can read: {reason}") from None


def tokenizer_from_vocabulary(path: Path) -> Tokenizer:
    """vocab.txt: one token a line, its line number its id; casing as `tokenizer_config.json` beside it says."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the vocabulary {path}: {error}") from None
    # Only a line feed ends a line: some vocabularies hold U+2028 or U+0085 as a token.
    tokens = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    if twice:
        raise UserError(f"expected each token once in {path}, but {twice[0]!r} occurs twice: remove one")
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise UserError(f"expected a BERT vocabulary, one token a line, in {path}, but {missing[0]} is missing: add it")
    return build_tokenizer(tokens, read_tokenizer_config(path.with_name("tokenizer_config.json")))


def read_tokenizer_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"expected a JSON object in {path}, got {type(config).__name__}")
    return config


def build_tokenizer(tokens: Sequence[str], config: dict[str, Any]) -> Tokenizer:
    """BERT's pipeline on a vocabulary: clean and lower-case, cut at spaces and punctuation, longest piece first."""
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.WordPiece(
            ids, unk_token="[UNK]", continuing_subword_prefix=CONTINUES, max_input_chars_per_word=LONGEST_WORD
        )
    )
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),  # None: as lowercase
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUES)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def train_tokenizer(documents: Sequence[Document], vocab_size: int, lowercase: bool = True) -> Tokenizer:
    """A WordPiece vocabulary of at most `vocab_size` tokens, the special ones first; the same on every run.

    Raises UserError where `vocab_size` cannot hold the special tokens and the text's characters.
    """
    tokenizer = build_tokenizer(SPECIAL_TOKENS, {"do_lower_case": lowercase})
    begin, go_on = alphabet(documents, tokenizer)
    # The trainer numbers the pieces "##x" in the order of a hash table seeded anew in each process, and ties between
    # merges go by number. Handed over as "special tokens" they are numbered first and in order: the run repeats.
    fixed = [*SPECIAL_TOKENS, *(CONTINUES + character for character in go_on)]
    needed = len(fixed) + len(begin)
    if vocab_size < needed:
        raise UserError(
            f"expected a vocabulary of at least {needed}, for this text's single characters, got {vocab_size}: raise it"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=fixed,
        initial_alphabet=begin,
        limit_alphabet=len(begin),
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
    )
    tokenizer.train_from_iterator((s for document in documents for s in document), trainer)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    return build_tokenizer(sorted(ids, key=ids.__getitem__), {"do_lower_case": lowercase})


def alphabet(documents: Sequence[Document], tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """The characters of the text, sorted; and those of them that occur within a word, past its first place."""
    counts: Counter[str] = Counter()
    words: set[str] = set()
    for document in documents:
        text = tokenizer.normalizer.normalize_str("\n".join(document))
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text):
            words.add(word)
            counts.update(word)
    frequent = sorted(counts, key=lambda character: (-counts[character], character))[:ALPHABET_LIMIT]
    within = {character for word in words for character in word[1:]}
    return sorted(frequent), sorted(within.intersection(frequent))


def save_tokenizer(tokenizer: Tokenizer, folder: AnyPath) -> None:
    """Write tokenizer.json, vocab.txt and tokenizer_config.json, as transformers' AutoTokenizer reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if sorted(ids.values()) == list(range(len(ids))):  # vocab.txt cannot express gaps; tokenizer.json can
        write_vocabulary(tokenizer, folder / "vocab.txt")
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": getattr(tokenizer.normalizer, "lowercase", True),
        **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True)),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_vocabulary(tokenizer: Tokenizer, path: AnyPath) -> None:
    """vocab.txt: one token a line, in the order of their ids."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    Path(path).write_bytes("".join(token + "\n" for token in sorted(ids, key=ids.__getitem__)).encode())


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError where the tokenizer can give an id for which the weights have no row."""
    token, largest = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise UserError(
            f"expected token ids below vocab_size {vocab_size}, but the vocabulary gives {token!r} the id {largest}: "
            "use the tokenizer that the weights were trained with"
        )
