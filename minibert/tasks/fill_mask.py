"""The words that a masked language model puts in the place of masks, as transformers' fill-mask pipeline gives them.

    model = load_masked_lm("folder", backend="numba")
    fill_mask(model, load_tokenizer("folder"), "The Senate has [MASK] the bill.")

Each mask is filled by itself, whatever the others become: probabilities of single tokens, not of a whole text.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from minibert.data import check_vocabulary, special_ids
from minibert.data.sequences import ids_of
from minibert.data.tokenizer import settings_of
from minibert.data.tokenizer_config import is_text
from minibert.errors import UserError, warn
from minibert.kernels.softmax import softmax
from minibert.model.bert import HEAD_ROWS, BertForMaskedLM
from minibert.model.checkpoint import read_config
from minibert.model.config import ElectraConfig
from minibert.model.electra import ElectraForMaskedLM
from minibert.model.electra_pair import GENERATOR
from minibert.model.matching import named
from minibert.model.tensor import apply, no_grad

BATCH_TOKENS = 4096  # of a batch, unless another number is given

Filling = dict[str, Any]  # score: its probability; token: its id; token_str; sequence: the text with it in place


def load_masked_lm(folder: str | Path, backend: Any = "numba", dtype: str = "float32") -> BertForMaskedLM:
    """The model in a folder. Raises UserError where a weight is missing: `from_pretrained` would draw it at random."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(missing|unexpected): ")  # other heads are of no use here
        kind = ElectraForMaskedLM if isinstance(read_config(folder), ElectraConfig) else BertForMaskedLM
        model, info = kind.from_pretrained(folder, backend, dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if any(name.startswith(("cls.predictions", "generator_")) for name in missing):
        beside = Path(folder) / GENERATOR
        raise UserError(
            f"{folder} holds no masked-language-model head ({named(missing)}): name "
            + (
                f"its generator, {beside}"
                if beside.is_dir()
                else f"the folder of a model that was pretrained, and saved with its head, as {kind.__name__}"
            )
        )
    if missing:
        raise UserError(f"{folder}: weights are missing: {named(missing)}: get the whole model")
    model.prepack()
    return model


def fill_mask(
    model: BertForMaskedLM, tokenizer: Tokenizer, texts: str | Iterable[str], top_k: int = 5,
    targets: str | Sequence[str] | None = None, *, batch_tokens: int = BATCH_TOKENS,
) -> list[Any]:  # fmt: skip
    """Of each text the `top_k` likeliest tokens in place of its mask, in the form of transformers' pipeline.

    Of a text with one mask a list of {"score", "token", "token_str", "sequence"}, the likeliest first; with several a
    list of such lists. Of one text, a str, just that; of others a list. Options and errors are those of `fill_masks`.
    """
    if isinstance(texts, str):
        return fill_mask(model, tokenizer, [texts], top_k, targets, batch_tokens=batch_tokens)[0]
    filled = fill_masks(model, tokenizer, texts, top_k, targets, batch_tokens=batch_tokens)
    return [masks[0] if len(masks) == 1 else masks for masks in filled]


def fill_masks(
    model: BertForMaskedLM, tokenizer: Tokenizer, texts: Iterable[str], top_k: int = 5,
    targets: str | Sequence[str] | None = None, *, batch_tokens: int = BATCH_TOKENS,
) -> Iterator[list[list[Filling]]]:  # fmt: skip
    """Of each text in turn, of each of its masks, the likeliest tokens; no more texts in memory than a batch needs.

    A batch takes texts until the next would exceed `batch_tokens`; the head runs on the masks alone. With `targets`
    only these words are looked at, with the scores that they have among all tokens; one that is not in the vocabulary
    stands for its first piece, and a warning says so, as in transformers. Raises UserError for a text without a mask or
    with more tokens than the model has positions, naming its number, when those before it are done.
    """
    check_vocabulary(tokenizer, model.config.vocab_size)
    candidates = np.arange(model.config.vocab_size) if targets is None else target_ids(tokenizer, targets)
    if not 1 <= top_k <= model.config.vocab_size:
        raise UserError(f"expected a top_k from 1 to {model.config.vocab_size}, the vocabulary, got {top_k}")
    if batch_tokens < 1:
        raise UserError(f"expected batch_tokens of 1 or more, got {batch_tokens}")
    filler = Filler(model, tokenizer, candidates, min(top_k, len(candidates)))
    batch: list[np.ndarray] = []
    size = 0
    for number, text in enumerate(texts, 1):
        try:
            ids = filler.encode(text, number)
        except UserError:
            yield from filler.fill(batch)
            raise
        if size + len(ids) > batch_tokens:
            yield from filler.fill(batch)
            batch, size = [], 0
        batch.append(ids)
        size += len(ids)
        if size >= batch_tokens:  # full: whoever types a text a line waits for the answer before the next
            yield from filler.fill(batch)
            batch, size = [], 0
    yield from filler.fill(batch)


def target_ids(tokenizer: Tokenizer, targets: str | Sequence[str]) -> np.ndarray:
    """(K,) the ids of words, each once, ascending. Raises UserError where none is left."""
    found = set()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    for target in [targets] if isinstance(targets, str) else targets:
        if target not in vocabulary:
            pieces = [str(tokenizer.id_to_token(number)) for ids in ids_of([target], tokenizer) for number in ids]
            instead = f"its first piece, {pieces[0]!r}, stands for it" if pieces else "it is left out"
            warn(f"the target {target!r} is not in the vocabulary: {instead}")
            if not pieces:
                continue
            target = pieces[0]
        found.add(vocabulary[target])
    if not found:
        raise UserError(f"expected at least one target that the vocabulary knows, got {targets!r}")
    return np.array(sorted(found))


class Filler:
    """A model and its tokenizer, and what of them is asked for."""

    def __init__(self, model: BertForMaskedLM, tokenizer: Tokenizer, candidates: np.ndarray, top_k: int) -> None:
        self.model, self.tokenizer, self.candidates, self.top_k = model, tokenizer, candidates, top_k
        self.special = special_ids(tokenizer)

    def encode(self, text: str, number: int) -> np.ndarray:
        """(n,) int32: [CLS] text [SEP]. Raises UserError for what cannot be filled."""
        if not is_text(text):
            what = "half of a surrogate pair" if isinstance(text, str) else type(text).__name__
            raise UserError(f"text {number}: expected text, got {what}")
        (ids,) = ids_of([text], self.tokenizer)
        if self.special.mask not in ids:
            mask = settings_of(self.tokenizer).config["mask_token"]
            raise UserError(f"text {number} has no {mask}: put one where a word is to be filled in")
        longest = self.model.config.max_position_embeddings
        if len(ids) + 2 > longest:
            raise UserError(
                f"text {number} is too long: {len(ids) + 2} tokens with {self.special_names}, and the model has "
                f"{longest} positions; shorten it around its mask"
            )
        return np.array([self.special.cls, *ids, self.special.sep], dtype=np.int32)

    @property
    def special_names(self) -> str:
        config = settings_of(self.tokenizer).config
        return f"{config['cls_token']} and {config['sep_token']}"

    def fill(self, batch: list[np.ndarray]) -> Iterator[list[list[Filling]]]:
        """Of each sequence (n,), of each of its masks, the likeliest tokens."""
        if not batch:
            return
        ids = np.concatenate(batch)
        scores, tokens = self.likeliest(ids, np.cumsum([0, *map(len, batch)]), np.flatnonzero(ids == self.special.mask))
        found = zip(scores.tolist(), tokens.tolist(), strict=True)  # mask by mask
        for sequence in batch:
            places = np.flatnonzero(sequence == self.special.mask).tolist()
            yield [
                [
                    self.filling(sequence, place, *each, single=len(places) == 1)
                    for each in zip(*next(found), strict=True)
                ]
                for place in places
            ]

    def likeliest(self, ids: np.ndarray, cu_seqlens: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the packed rows `masks` (M,) scores and ids (M, top_k) of the likeliest tokens; of equals the first."""
        training, scores, tokens = self.model.training, [], []
        self.model.eval()
        try:
            with no_grad():
                out = self.model(ids, cu_seqlens=cu_seqlens, return_dict=True)
                for start, stop in pairwise([*range(0, len(masks), HEAD_ROWS), len(masks)]):
                    found = apply(softmax, out.logits_at(masks[start:stop])).numpy()[:, self.candidates]
                    if not np.isfinite(found).all():
                        raise UserError("the model's scores are not finite: its weights are damaged, or try float32")
                    best = ranked(found, self.top_k)
                    scores.append(np.take_along_axis(found, best, axis=1).astype(np.float64))
                    tokens.append(self.candidates[best])
        finally:
            self.model.train(training)
        return np.concatenate(scores), np.concatenate(tokens)

    def filling(self, ids: np.ndarray, place: int, score: float, token: int, *, single: bool) -> Filling:
        """As transformers puts it: the other masks stay to be seen, and so do [CLS] and [SEP] beside them."""
        filled = ids.copy()
        filled[place] = token
        kept = filled[filled != self.special.pad].tolist()
        return {
            "score": score,
            "token": token,
            "token_str": self.tokenizer.decode([token], skip_special_tokens=False),
            "sequence": self.tokenizer.decode(kept, skip_special_tokens=single),
        }


def ranked(scores: np.ndarray, count: int) -> np.ndarray:
    """(M, count): where in each row of `scores` (M, K) the largest are, in order; of equals the first."""
    some = np.sort(np.argpartition(-scores, count - 1, axis=1)[:, :count], axis=1)
    order = np.argsort(-np.take_along_axis(scores, some, axis=1), axis=1, kind="stable")
    return np.take_along_axis(some, order, axis=1)
