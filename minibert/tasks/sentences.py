"""Texts to vectors: a tokenizer and an encoder of sentences, packed batches, texts in any number and in their order.

encoder = SentenceTransformer.from_pretrained("folder", backend="numba")
vectors = encoder.encode(["A dog runs.", "A hound is running."])    # (2, C) float32
encoder.similarity(vectors)                                          # (2, 2)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from minibert.data import check_vocabulary, load_tokenizer, save_tokenizer, special_ids
from minibert.data.sequences import ids_of
from minibert.data.tokenizer_config import is_text
from minibert.errors import UserError
from minibert.kernels.elementwise import mul
from minibert.kernels.linear import matmul
from minibert.kernels.pooling import normalize
from minibert.kernels.reduction import reduce_sum
from minibert.model.packing import as_array
from minibert.model.sentence import SentenceBert
from minibert.model.sentence_config import SentenceConfig, encoder_folder
from minibert.model.tensor import no_grad

BATCH_TOKENS = 4096  # of a batch, unless another number is given


class Embedded(NamedTuple):
    """What became of one text."""

    vector: np.ndarray  # (C,) float32
    tokens: int  # that were read
    truncated: bool  # whether there were more


class SentenceTransformer:
    """An encoder of sentences with its tokenizer."""

    def __init__(self, model: SentenceBert, tokenizer: Tokenizer) -> None:
        """Raises UserError where the tokenizer gives ids for which the model has no row."""
        check_vocabulary(tokenizer, model.config.vocab_size)
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, backend: Any = "numba", dtype: str = "float32", seed: int = 0,
        *, pooling: str | None = None, normalize: bool | None = None,
    ) -> SentenceTransformer:  # fmt: skip
        """Load a folder of sentence-transformers, or any BERT's: as `SentenceBert.from_pretrained`, and its tokenizer.

        Raises UserError where something is missing, naming it.
        """
        model = SentenceBert.from_pretrained(folder, backend, dtype, seed, pooling=pooling, normalize=normalize)
        model.prepack()
        return cls(model, load_tokenizer(encoder_folder(folder)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that sentence-transformers of any release reads: the same vectors there."""
        self.model.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder, self.model.max_seq_length)

    @property
    def config(self) -> SentenceConfig:
        """How texts are pooled, cut and compared."""
        return self.model.sentence_config

    def stream(
        self, texts: Iterable[str], *, batch_tokens: int = BATCH_TOKENS, prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> Iterator[Embedded]:  # fmt: skip
        """Each text in turn, with no more of them in memory than a batch needs.

        A batch takes texts until the next would exceed `batch_tokens`; one that is longer goes alone. Before each text
        stands `prompt`, or the one that the folder calls `prompt_name`, or its default. What is longer than the model's
        `max_seq_length` is cut. Raises UserError for what is no text and for an unknown prompt.
        """
        if batch_tokens < 1:
            raise UserError(f"batch_tokens: expected a number above 0, got {batch_tokens}")
        if prompt is None:
            prompt = self.config.prompt(self.config.default_prompt_name if prompt_name is None else prompt_name)
        special, room = special_ids(self.tokenizer), self.model.max_seq_length - 2
        batch: list[np.ndarray] = []
        cut: list[bool] = []
        size = 0
        for ids in ids_of(self._read(texts, prompt), self.tokenizer):
            kept = np.concatenate([[special.cls], ids[:room], [special.sep]]).astype(np.int32)
            if batch and size + len(kept) > batch_tokens:
                yield from self._embed(batch, cut)
                batch, cut, size = [], [], 0
            batch.append(kept)
            cut.append(len(ids) > room)
            size += len(kept)
        if batch:
            yield from self._embed(batch, cut)

    def encode(self, texts: str | Sequence[str], **options: Any) -> np.ndarray:
        """(n, C) float32 in the order of the texts, or (C,) of one text. The options are those of `stream`."""
        if isinstance(texts, str):
            return self.encode([texts], **options)[0]
        vectors = [embedded.vector for embedded in self.stream(texts, **options)]
        return np.stack(vectors) if vectors else np.zeros((0, self.model.config.hidden_size), np.float32)

    def similarity(self, a: Any, b: Any = None) -> np.ndarray:
        """(n, m) float32: the cosine of each row of a (n, C) and each of b (m, C), which is a where it is not given.

        Or the product, where the model's config says "dot". Raises UserError for arrays of other shapes.
        """
        backend = self.model.backend
        left, right = self._rows("a", a), self._rows("b", a if b is None else b)
        return np.asarray(backend.numpy(backend.run(matmul, left, right.swapaxes(0, 1))))

    def similarity_pairwise(self, a: Any, b: Any) -> np.ndarray:
        """(n,) float32: as `similarity`, of each row of a (n, C) and the row of b (n, C) beside it."""
        backend = self.model.backend
        left, right = self._rows("a", a), self._rows("b", b)
        if left.shape != right.shape:
            raise UserError(f"expected as many vectors in b as in a, got {right.shape} and {left.shape}")
        return np.asarray(backend.numpy(backend.run(reduce_sum, backend.run(mul, left, right), axis=1)))

    def _rows(self, name: str, given: Any) -> Any:
        """(n, C) on the backend, of length 1 where cosines are asked for."""
        array, channels = as_array(name, given, "an array of vectors"), self.model.config.hidden_size
        if array.ndim != 2 or array.shape[1] != channels:
            raise UserError(f"{name}: expected vectors, (n, {channels}), got shape {array.shape}")
        rows = self.model.backend.asarray(np.ascontiguousarray(array), dtype=np.float32)
        return self.model.backend.run(normalize, rows)[0] if self.config.similarity_fn_name == "cosine" else rows

    def _read(self, texts: Iterable[str], prompt: str) -> Iterator[str]:
        for number, text in enumerate(texts):
            if not is_text(text):
                what = "half of a surrogate pair" if isinstance(text, str) else type(text).__name__
                raise UserError(f"texts: expected text, but number {number} is {what}")
            yield self.config.as_read(text, prompt)

    def _embed(self, batch: list[np.ndarray], cut: list[bool]) -> Iterator[Embedded]:
        lengths = [len(ids) for ids in batch]
        training = self.model.training
        self.model.eval()
        try:
            with no_grad():
                vectors = self.model(np.concatenate(batch), cu_seqlens=np.cumsum([0, *lengths]))
        finally:
            self.model.train(training)
        values = np.asarray(self.model.backend.numpy(vectors.data), np.float32)
        return map(Embedded, values, lengths, cut)
