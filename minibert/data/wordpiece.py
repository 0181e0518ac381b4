"""BERT's way to cut words (Devlin et al. 2018; Wu et al. 2016): its pipeline, and vocabularies trained for it."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minibert.data.text import Document, in_pieces
from minibert.data.tokenizer_config import SPECIAL_TOKENS
from minibert.errors import UserError

CONTINUES = "##"  # marks a piece that does not begin a word
ALPHABET_LIMIT = 5000  # characters kept: every one of an alphabetic script, the frequent ones of Chinese
LONGEST_WORD = 100  # characters; a longer word is [UNK], as in BERT
LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD + 1}}}")


def build_tokenizer(ids: Mapping[str, int], config: Mapping[str, Any]) -> Tokenizer:
    """BERT's pipeline on a vocabulary: clean and lower-case, cut at spaces and punctuation, longest piece first.

    `config` is a tokenizer_config.json. The ids must hold the special tokens, under the names that it gives them.
    """
    special = {key: config.get(key, token) for key, token in SPECIAL_TOKENS.items()}
    cls, sep = special["cls_token"], special["sep_token"]
    tokenizer = Tokenizer(
        models.WordPiece(
            dict(ids),
            unk_token=special["unk_token"],
            continuing_subword_prefix=CONTINUES,
            max_input_chars_per_word=LONGEST_WORD,
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
        single=[cls, "$A", sep],
        pair=[cls, "$A", sep, "$B:1", f"{sep}:1"],
        special_tokens=[(token, ids[token]) for token in dict.fromkeys((cls, sep))],
    )
    tokenizer.add_special_tokens(list(special.values()))
    return tokenizer


def train_tokenizer(documents: Sequence[Document], vocab_size: int, lowercase: bool = True) -> Tokenizer:
    """A WordPiece vocabulary of at most `vocab_size` tokens, the special ones first; the same on every run.

    Raises UserError where `vocab_size` cannot hold the special tokens and the text's characters.
    """
    special = list(SPECIAL_TOKENS.values())
    config = {"do_lower_case": lowercase}
    ids = {token: number for number, token in enumerate(special)}
    tokenizer, cutter = build_tokenizer(ids, config), build_tokenizer(ids, config)  # one is locked while it is trained
    begin, go_on = alphabet(documents, cutter)
    # The trainer numbers the pieces "##x" in the order of a hash table seeded anew in each process, and ties between
    # merges go by number. Handed over as "special tokens" they are numbered first and in order: the run repeats.
    fixed = [*special, *(CONTINUES + character for character in go_on)]
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
    heeding_signals(lambda: tokenizer.train_from_iterator(without_long_words(documents, cutter), trainer))
    return build_tokenizer(tokenizer.get_vocab(with_added_tokens=True), config)


def heeding_signals(call: Callable[[], Any]) -> None:
    """Let another thread make a long call of a library that heeds no signal, so that this one can be interrupted."""
    raised: list[BaseException] = []

    def calling() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=calling, daemon=True)  # an end of the process does not wait for it
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def without_long_words(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[str]:
    """The sentences, in pieces, less the words that are [UNK] for their length: training takes the square of it."""
    for document in documents:
        for sentence in document:
            for piece in in_pieces(sentence):
                if LONG_RUN.search(piece):
                    yield " ".join(word for word in words_in(piece, tokenizer) if len(word) <= LONGEST_WORD)
                else:
                    yield piece


def words_in(text: str, tokenizer: Tokenizer) -> list[str]:
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))]


def alphabet(documents: Sequence[Document], tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """The characters of the text, sorted; and those of them that occur within a word, past its first place."""
    counts: Counter[str] = Counter()
    within: set[str] = set()
    for text in without_long_words(documents, tokenizer):
        for word in words_in(text, tokenizer):
            counts.update(word)
            within.update(word[1:])
    frequent = sorted(counts, key=lambda character: (-counts[character], character))[:ALPHABET_LIMIT]
    return sorted(frequent), sorted(within.intersection(frequent))
