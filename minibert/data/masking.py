"""Which tokens are hidden from the model and must be predicted: the masked language model's task.

Devlin et al. 2018, section 3.1 and appendix A.1: 15 % of the tokens are chosen; of these 80 % become [MASK], 10 % a
random token, 10 % stay. Drawn by Philox from (seed, step) and compared as integers: the same bits on every machine.
With whole-word masking (google-research/bert, create_pretraining_data.py, do_whole_word_mask) words are chosen, and all
pieces of a chosen one are predicted; what becomes of each is still drawn by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from minibert.data.tokenizer import SpecialIds, vocabulary_size
from minibert.data.wordpiece import CONTINUES
from minibert.errors import UserError
from minibert.kernels.philox import Stream, random_words, threshold
from minibert.model.packing import IGNORE

# The streams of random words, one number for each use, so that no two uses share words.
# Initialisation of weights takes 3, dropout takes 16 and above.
MASKING_STREAM = 1
SHUFFLE_STREAM = 2
PAIRING_STREAM = 4
SPLIT_STREAM = 5


class MaskingRule(NamedTuple):
    """What may be chosen and what may stand in for it."""

    mask_id: int
    special: np.ndarray  # (V,) bool: never chosen
    ordinary: np.ndarray  # (V - specials,) int32: the ids that a random replacement is drawn from
    rate: float
    continues: np.ndarray | None = (
        None  # (V,) bool: goes on with the word before it; None: tokens are chosen, not words
    )


def masking_rule(
    special: SpecialIds, vocab_size: int, rate: float = 0.15, continues: np.ndarray | None = None
) -> MaskingRule:
    """The rule for a vocabulary, with `continues` (`continuing_pieces`) for whole words.

    Raises UserError where `rate` is no share or nothing but special tokens is left.
    """
    if not 0.0 < rate < 1.0:
        raise UserError(f"expected a masking rate between 0 and 1, got {rate}")
    is_special = np.zeros(max(vocab_size, max(special) + 1), dtype=bool)
    is_special[list(special)] = True
    ordinary = np.flatnonzero(~is_special[:vocab_size]).astype(np.int32)
    if len(is_special) > vocab_size or len(ordinary) == 0:
        raise UserError(
            f"expected a vocabulary with words and the special ids {tuple(special)}, got the size {vocab_size}"
        )
    return MaskingRule(special.mask, is_special, ordinary, rate, continues)


def continuing_pieces(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) bool: the pieces that go on with a word, as `##ing` does. Raises UserError where a vocabulary has none."""
    prefix = getattr(tokenizer.model, "continuing_subword_prefix", None) or CONTINUES
    continues = np.zeros(vocabulary_size(tokenizer), dtype=bool)
    continues[[number for piece, number in tokenizer.get_vocab().items() if piece.startswith(prefix)]] = True
    if not continues.any():
        raise UserError(
            f"whole_word_mask: expected pieces that go on with a word, as {prefix}ing, but the vocabulary has none, so "
            "that each token is a word: leave it out"
        )
    return continues


def mask_tokens(input_ids: np.ndarray, rule: MaskingRule, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) ids -> the ids the model sees (N,) int32 and labels (N,) int64, `IGNORE` where nothing is predicted.

    Each ordinary token, or each word, is chosen with probability `rate`, and at least one is. Raises UserError where
    there is none.
    """
    allowed = ~rule.special[input_ids]
    if not allowed.any():
        raise UserError("nothing to predict: the batch has special tokens only; does the vocabulary fit the text?")
    choice, action, word = (random_words(Stream(seed, MASKING_STREAM, step, use), len(input_ids)) for use in range(3))
    first = (
        np.arange(len(input_ids)) if rule.continues is None else first_pieces(input_ids, rule.special, rule.continues)
    )
    choice = choice[first]
    chosen = allowed & (choice < threshold(rule.rate))
    if not chosen.any():
        chosen = first == first[np.argmin(np.where(allowed, choice.astype(np.uint64), 2**32))]

    masked = chosen & (action < threshold(0.8))
    replaced = chosen & ~masked & (action < threshold(0.9))
    visible = np.where(masked, np.int32(rule.mask_id), input_ids.astype(np.int32))
    visible[replaced] = rule.ordinary[below(word[replaced], len(rule.ordinary))]
    return visible, np.where(chosen, input_ids.astype(np.int64), IGNORE)


def first_pieces(input_ids: np.ndarray, special: np.ndarray, continues: np.ndarray) -> np.ndarray:
    """(N,) int64: where the word of each token begins. What follows a special token begins one: no word spans two
    sequences, and the rest of a word that was cut between two is a word.
    """
    begins = ~continues[input_ids]
    begins[1:] |= special[input_ids[:-1]]
    begins[:1] = True
    return np.maximum.accumulate(np.where(begins, np.arange(len(input_ids)), 0))


def below(words: np.ndarray, limit: int) -> np.ndarray:
    """Random 32-bit words -> integers in [0, limit), by the high half of a product: even to limit / 2^32."""
    return ((words.astype(np.uint64) * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)


def shuffled(count: int, stream: Stream) -> np.ndarray:
    """A random order of `count` things, (count,) int64: sorted by their random words, ties in the old order."""
    return np.argsort(random_words(stream, count), kind="stable")


def check_seed(seed: int) -> None:
    """A seed is one 32-bit word of Philox's key."""
    if not 0 <= seed < 2**32:
        raise UserError(f"expected a seed from 0 to {2**32 - 1}, got {seed}")
