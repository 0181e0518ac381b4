"""Embeddings: an encoder of sentences trained so that texts that belong together have vectors near each other.

    train = read_texts("questions.csv", "embed")               # anchor, positive and perhaps negative; or a score
    task = Embed.of(train, "folder")
    model, _ = load_model(task, "folder", "numba")             # and on as in `finetune.py`

S examples of K texts each: anchor, positive and, where there is one, negative. C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from minibert import backends
from minibert.backends import Backend
from minibert.errors import UserError
from minibert.model.config import BertConfig
from minibert.model.losses import cosine_similarity_loss, multiple_negatives_ranking_loss
from minibert.model.packing import Packed
from minibert.model.sentence import SentenceBert
from minibert.model.sentence_config import MODULES, SentenceConfig, read_sentence_folder
from minibert.model.tensor import Tensor
from minibert.tasks.encoding import encode_texts
from minibert.tasks.examples import TextExamples
from minibert.tasks.metrics import MAIN, Scores, finite, rank_metrics, ranks, similarity_metrics
from minibert.tasks.sentences import SentenceTransformer
from minibert.tasks.tables import wrong_line
from minibert.tasks.task import Prepared, Task

EXAMPLES_AT_ONCE = 16  # in evaluation, whatever the batches of training: losses of several runs can be compared
QUESTIONS_AT_ONCE = 1024  # whose scores are in memory


class Embed(Task):
    """Vectors of texts, compared by cosine.

    Pairs and triplets are trained on by `multiple_negatives_ranking_loss`: the positives and negatives of a batch's
    other examples are negatives of each, so that no text may be in a batch twice. Pairs with a score, from -1 to 1, by
    `cosine_similarity_loss`.
    """

    task_type = "FEATURE_EXTRACTION"
    in_batch = True

    def __init__(self, sentence_config: SentenceConfig | None = None) -> None:
        super().__init__()
        self.sentence_config = sentence_config or SentenceConfig()
        self.max_seq_length = self.sentence_config.max_seq_length or Task.max_seq_length

    @classmethod
    def of(cls, examples: TextExamples, folder: str | Path | None, pooling: str | None = None) -> Embed:
        """The task that examples to train on set, for the encoder in a folder; None: for a new one, which takes means.

        Raises UserError for examples of which nothing can be learned, and for scores that no cosine can reach.
        """
        if examples.labels is None:
            for column, texts in (("text", examples.texts), ("pair", examples.pairs)):
                if len(set(texts or ())) < 2:
                    raise UserError(
                        f"{examples.name}: the column {getattr(examples.columns, column)!r} holds one text only: "
                        "expected several, of which the others of a batch are told apart"
                    )
        for score, line in zip(examples.labels or (), examples.lines, strict=False):
            if abs(score) > 1:
                wrong_line(
                    examples.name, line, f"expected a score from -1 to 1, as a cosine is, got {score:g}: divide all "
                    "scores by the highest"
                )  # fmt: skip
        return cls() if folder is None else cls(sentence_config_in(folder, pooling))

    @classmethod
    def model_class(cls, config: BertConfig) -> Any:
        """As `Task.model_class`. Raises UserError for the config of an ELECTRA."""
        if config.model_type != BertConfig.model_type:
            raise UserError(f"embed: expected a BERT's config, got one of {config.model_type}")
        return SentenceBert

    def labels(self) -> dict[str, Any]:
        """There are none."""
        return {}

    def load(self, folder: str | Path, backend: str | Backend, dtype: str = "float32", seed: int = 0) -> SentenceBert:
        """The encoder in a folder."""
        pooling, normalize = self.sentence_config.pooling, self.sentence_config.normalize
        return SentenceBert.from_pretrained(folder, backend, dtype, seed, pooling=pooling, normalize=normalize)

    def check(self, config: Any, prepared: Prepared) -> None:
        """As `Task.check`. Raises UserError for what would not do what it says."""
        if config.peft:
            raise UserError(f"peft: expected none with embed, whose folder holds a whole encoder, got {config.peft}")
        if config.gradient_accumulation_steps > 1 and prepared.examples.labels is None:
            raise UserError(
                f"gradient_accumulation_steps: expected 1 with pairs without scores, got "
                f"{config.gradient_accumulation_steps}: the passes of an update are not each other's negatives; raise "
                "per_device_train_batch_size, with checkpoint_activations where memory is short"
            )

    def prepare(self, examples: TextExamples, tokenizer: Tokenizer, max_seq_length: int) -> Prepared:
        """Targets are the scores, (S,) float32, or (S, 0) where there are none."""
        if examples.labels is not None and examples.negatives is not None:
            raise UserError(f"{examples.name}: expected a negative or a score beside a pair, got both: name one")
        assert examples.pairs is not None
        columns = [column for column in (examples.texts, examples.pairs, examples.negatives) if column is not None]
        prompt = self.sentence_config.prompt(self.sentence_config.default_prompt_name)
        texts = [self.sentence_config.as_read(text, prompt) for row in zip(*columns, strict=True) for text in row]
        encoded = encode_texts(tokenizer, texts, None, max_seq_length)
        none = np.zeros((len(examples), 0), np.float32)
        targets = none if examples.labels is None else np.array(examples.labels, np.float32)
        notes = (f"{encoded.truncated} of {len(texts)} texts were cut",) if encoded.truncated else ()
        numbers = text_numbers(encoded.sequences.ids, encoded.sequences.offsets).reshape(len(examples), len(columns))
        return Prepared(examples, encoded.sequences, targets, numbers, notes, len(columns))

    def batches(self, prepared: Prepared, order: np.ndarray, size: int) -> list[np.ndarray]:
        """As `Task.batches`, but that no text is in a batch twice, where that would make it a negative of its own."""
        if prepared.examples.labels is not None:
            return super().batches(prepared, order, size)
        return without_repeats(prepared.encoded, order, size)

    def forward(
        self,
        model: Any,
        packed: Packed,
        targets: np.ndarray | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The vectors of a batch's texts, (S K, C), and their loss."""
        vectors = model(packed)
        return vectors, None if targets is None else self.loss(vectors, targets, class_weights)

    def loss(self, vectors: Tensor, targets: np.ndarray, class_weights: Sequence[float] | None = None) -> Tensor:
        count, channels = len(targets), vectors.shape[1]
        rows = vectors.reshape(count, -1)  # (S, K C)
        columns = [rows.slice(1, start, start + channels) for start in range(0, rows.shape[1], channels)]
        if targets.ndim == 1:
            return cosine_similarity_loss(columns[0], columns[1], targets)
        return multiple_negatives_ranking_loss(*columns)

    def mean_loss(self, prepared: Prepared, outputs: np.ndarray) -> float | None:
        """In batches of `EXAMPLES_AT_ONCE`, in order; None where there are scores that no cosine can reach."""
        assert prepared.targets is not None
        if prepared.targets.ndim == 1 and np.abs(prepared.targets).max(initial=0) > 1:
            return None
        total, place = 0.0, backends.get("numpy")
        for chosen in self.batches(prepared, np.arange(prepared.count), EXAMPLES_AT_ONCE):
            vectors = Tensor(place.asarray(outputs[prepared.sequences_of(chosen)]), place)
            total += self.loss(vectors, prepared.targets[chosen]).item() * len(chosen)
        return finite(total / prepared.count)

    def no_outputs(self, prepared: Prepared) -> np.ndarray:
        return np.zeros((len(prepared.sequences), 1), np.float32)

    def scores(self, prepared: Prepared, outputs: np.ndarray) -> Scores:
        """Where there are scores, their correlations with the cosines; else how high each positive stands among all."""
        lengths = np.sqrt((outputs**2).sum(axis=1, keepdims=True))
        vectors = (outputs / np.maximum(lengths, 1e-12)).reshape(prepared.count, prepared.texts, -1)
        anchors, positives = vectors[:, 0], vectors[:, 1]
        if prepared.examples.labels is None:
            return rank_metrics(positive_ranks(prepared.encoded, anchors, positives))
        return similarity_metrics(np.array(prepared.examples.labels), (anchors * positives).sum(axis=1))

    def main_metric(self, prepared: Prepared) -> str:
        return MAIN["search" if prepared.examples.labels is None else "similarity"]

    def save(self, model: Any, tokenizer: Tokenizer, folder: Path, max_seq_length: int) -> None:
        """A folder of sentence-transformers, which cuts texts as they were cut here."""
        model.sentence_config = replace(model.sentence_config, max_seq_length=max_seq_length)
        SentenceTransformer(model, tokenizer).save_pretrained(folder)

    def description(self, prepared: Prepared) -> str:
        """How the encoder pools, and which loss such examples are trained on by."""
        if prepared.examples.labels is not None:
            return f"{self.sentence_config}; loss: squared error between cosine and score (cosine similarity)"
        others = "positives and negatives" if prepared.texts > 2 else "positives"
        return f"{self.sentence_config}; loss: the positive among all {others} of a batch (multiple negatives ranking)"


def sentence_config_in(folder: str | Path, pooling: str | None = None) -> SentenceConfig:
    """How the encoder in a folder makes vectors; one of no sentences: by the mean, not normalised, at any length."""
    plain = not (Path(folder) / MODULES).is_file()
    found = read_sentence_folder(
        folder, pooling=pooling or ("mean" if plain else None), normalize=False if plain else None
    )
    positions = found.config.max_position_embeddings
    return replace(found.sentence_config, max_seq_length=found.sentence_config.max_seq_length or positions)


def text_numbers(ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(S K,) int64: a number for each sequence, the same for those of the same tokens."""
    known: dict[bytes, int] = {}
    sequences = (ids[a:b].tobytes() for a, b in pairwise(offsets))
    return np.array([known.setdefault(sequence, len(known)) for sequence in sequences], np.int64)


def without_repeats(numbers: np.ndarray, order: np.ndarray, size: int) -> list[np.ndarray]:
    """Examples in batches of at most `size`, in which no text is in two of them: an example goes into the first batch
    with room behind those that have a text of its own.

    numbers (S, K): the texts of each example, equal where they are the same.
    """
    batches: list[list[int]] = []
    ahead: list[int] = []  # of a full batch, one behind it that may have room
    behind: dict[int, int] = {}  # by text: the batch behind the last that it is in
    for example, texts in zip(order.tolist(), numbers[order].tolist(), strict=True):
        place = max(behind.get(text, 0) for text in texts)
        full = []
        while place < len(batches) and len(batches[place]) == size:
            full.append(place)
            place = ahead[place]
        for other in full:  # so that none is asked often
            ahead[other] = place
        if place == len(batches):
            batches.append([])
            ahead.append(place + 1)
        batches[place].append(example)
        behind |= dict.fromkeys(texts, place + 1)
    return [np.array(batch) for batch in batches]


def positive_ranks(numbers: np.ndarray, anchors: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """(S,) the place of each positive among all different ones, by cosine; 1 is the best.

    Other positives of the same anchor, and the anchor itself, are left out: they are no wrong answers. numbers (S, K)
    as in `without_repeats`; vectors (S, C) of length 1.
    """
    documents, first, own = np.unique(numbers[:, 1], return_index=True, return_inverse=True)
    vectors, column = positives[first], {number: place for place, number in enumerate(documents.tolist())}
    left_out: dict[int, set[int]] = {}
    for anchor, place in zip(numbers[:, 0].tolist(), own.tolist(), strict=True):
        left_out.setdefault(anchor, {column[anchor]} if anchor in column else set()).add(place)
    found = []
    for start in range(0, len(anchors), QUESTIONS_AT_ONCE):
        block = slice(start, start + QUESTIONS_AT_ONCE)
        scores = anchors[block] @ vectors.T
        for row, (anchor, place) in enumerate(zip(numbers[block, 0].tolist(), own[block].tolist(), strict=True)):
            scores[row, list(left_out[anchor] - {place})] = -np.inf
        found.append(ranks(scores, own[block]))
    return np.concatenate(found)
