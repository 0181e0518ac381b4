"""BERT with a head for a task, under transformers' names: classify a text, tag its tokens, find an answer in it.

One letter per axis: B sequences, T positions, N packed tokens, C channels, K labels. A head's dropout comes before its
classifier, at `classifier_dropout`, or `hidden_dropout_prob` where that is None.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from minibert.errors import UserError
from minibert.kernels.dropout import dropout
from minibert.model.bert import CLASSIFIER_STREAM, WithEncoder
from minibert.model.config import BertConfig
from minibert.model.losses import problem_type, sequence_loss, weighed_cross_entropy
from minibert.model.nn import Linear, Module, Place
from minibert.model.outputs import BertOutput
from minibert.model.packing import IGNORE, as_array, class_numbers
from minibert.model.tensor import Tensor, apply


class ClassifierOutput(BertOutput):
    """With the logits of a head: (B, K); or of each token, (B, T, K), and (N, K) for packed input."""

    names: tuple[str, ...] = ("loss", "logits", "hidden_states", "attentions")
    packed_logits: Tensor  # (B, K) or (N, K)

    @classmethod
    def of(cls, encoded: BertOutput, logits: Tensor) -> Any:
        out = cls.__new__(cls)
        vars(out).update(vars(encoded), packed_logits=logits)
        return out

    @property
    def logits(self) -> Tensor:
        return self.packed_logits


class TokenClassifierOutput(ClassifierOutput):
    @cached_property
    def logits(self) -> Tensor:
        """(B, T, K), zero where the batch was padded; (N, K) for packed input."""
        return self._batch.padded(self.packed_logits)


class QuestionAnsweringOutput(ClassifierOutput):
    """`start_logits` and `end_logits` are (B, T), very low where there is no token; of packed input too."""

    names: tuple[str, ...] = ("loss", "start_logits", "end_logits", "hidden_states", "attentions")

    @cached_property
    def start_logits(self) -> Tensor:
        return self._scores(0)

    @cached_property
    def end_logits(self) -> Tensor:
        return self._scores(1)

    def _scores(self, column: int) -> Tensor:
        spread = self._batch.by_sequence(self.packed_logits.slice(1, column, column + 1))
        return self._batch.or_least(self._batch.real, spread.reshape(*spread.shape[:2]))


class BertWithClassifier(WithEncoder):
    """An encoder, and one linear layer over what it made of a sequence or of each token."""

    head = "classifier"
    each_token = False  # is classified, or each sequence

    def add_head(self, config: BertConfig, place: Place) -> None:
        setattr(self, self.head, Linear(config.hidden_size, config.num_labels, place))

    def classified(self, x: Tensor, encoded: BertOutput) -> Tensor:  # (B or N, C) -> (B or N, K)
        before = encoded._batch.packed.part.row if self.each_token else None
        return getattr(self, self.head)(head_dropout(x, encoded, self.dropout_rate, before=before))

    @property
    def dropout_rate(self) -> float:
        """Of the dropout before the classifier."""
        rate = self.config.classifier_dropout
        return self.config.hidden_dropout_prob if rate is None else rate


def head_dropout(
    x: Tensor, encoded: BertOutput, rate: float, layer: int = 0, before: int | None = None
) -> Tensor:  # fmt: skip
    """The dropout of a head, where the model is in training; `layer` tells several apart.

    `before` is how many rows of the whole stand before a part of a batch: as many as sequences, if not given.
    """
    batch = encoded._batch
    before = batch.packed.part.sequence if before is None else before
    params = batch.dropout(rate, CLASSIFIER_STREAM, layer, x.shape[1], before=before)
    return apply(dropout, x, **params) if params["rate"] else x


class BertForSequenceClassification(BertWithClassifier):
    """BERT with a classifier over the pooled output of each sequence."""

    pooled = True

    def summary(self, encoded: BertOutput) -> Tensor:  # (B, C)
        pooled = encoded.pooler_output
        assert pooled is not None
        return pooled

    def __call__(
        self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None, position_ids: Any = None,
        *, labels: Any = None, return_dict: bool | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """As `BertModel`; `out.logits` is (B, K), and `labels` give `out.loss`, by the config's `problem_type`.

        Where that is None the first labels decide, as in transformers, and the config keeps it: "regression" where
        there is one output (mean squared error), "single_label_classification" of whole numbers (B,) (cross entropy;
        -100 does not count), "multi_label_classification" of floats (B, K) (binary cross entropy with logits). Raises
        UserError for labels that do not fit.
        """
        encoded = self.base_model.encode(input_ids, attention_mask, token_type_ids, position_ids, **options)
        out = ClassifierOutput.of(encoded, self.classified(self.summary(encoded), encoded))
        if labels is not None:
            kind = problem_type(self.config, as_array("labels", labels, "an array of numbers"))
            self.config = replace(self.config, problem_type=kind)
            out.loss = sequence_loss(out.packed_logits, labels, kind, counted=encoded._batch.packed.not_empty)
        return out.in_form(return_dict)


class BertForTokenClassification(BertWithClassifier):
    """BERT with a classifier over every token: named entities, parts of speech."""

    each_token = True

    def __call__(
        self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None, position_ids: Any = None,
        *, labels: Any = None, return_dict: bool | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """As `BertModel`; `out.logits` is (B, T, K), and `labels` (B, T) give `out.loss`, the mean cross entropy.

        -100 does not count, nor does a label on padding; where none counts the loss is 0. Raises UserError for labels
        that are out of range or of another shape.
        """
        encoded = self.base_model.encode(
            input_ids, attention_mask, token_type_ids, position_ids, labels=labels, num_labels=self.config.num_labels,
            **options,
        )  # fmt: skip
        out = TokenClassifierOutput.of(encoded, self.classified(encoded._layers[-1], encoded))
        if (counted := encoded._batch.packed.labels) is not None:
            out.loss = weighed_cross_entropy(out.packed_logits, counted)
        return out.in_form(return_dict)


class BertForQuestionAnswering(BertWithClassifier):
    """BERT with the start and the end of an answer marked in the text (Devlin et al. 2019, section 4.2)."""

    head = "qa_outputs"

    def add_head(self, config: BertConfig, place: Place) -> None:
        self.qa_outputs = Linear(config.hidden_size, 2, place)  # row 0: start, row 1: end

    def __call__(
        self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None, position_ids: Any = None,
        *, start_positions: Any = None, end_positions: Any = None, return_dict: bool | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """As `BertModel`; `out.start_logits` and `out.end_logits` are (B, T), the scores of an answer's two ends.

        `start_positions` and `end_positions` (B,), columns of the tokens, give `out.loss`: the mean of both cross
        entropies over a sequence's tokens (transformers counts padding among them). A position of T or more, and -100,
        does not count. Raises UserError for one that stands on padding, or is negative otherwise.
        """
        if (start_positions is None) != (end_positions is None):
            raise UserError("expected start_positions and end_positions together, got one of them")
        encoded = self.base_model.encode(input_ids, attention_mask, token_type_ids, position_ids, **options)
        out = QuestionAnsweringOutput.of(encoded, self.qa_outputs(encoded._layers[-1]))
        if start_positions is not None:
            real, losses = encoded._batch.real, []
            ends = (
                ("start_positions", start_positions, out.start_logits),
                ("end_positions", end_positions, out.end_logits),
            )
            for name, positions, logits in ends:
                losses.append(weighed_cross_entropy(logits, _columns(name, positions, real)))
            out.loss = (losses[0] + losses[1]) * 0.5
        return out.in_form(return_dict)


def _columns(name: str, given: Any, real: np.ndarray) -> np.ndarray:
    """(B,) columns of tokens, -100 where none counts."""
    columns = as_array(name, given, "an array of integers")
    longest = real.shape[1]
    if columns.dtype.kind in "iu":
        columns = np.where(columns >= longest, IGNORE, columns)
    columns = class_numbers(name, columns, len(real), longest)
    kept = columns != IGNORE
    padding = np.flatnonzero(kept)[~real[kept, columns[kept]]]
    if len(padding):
        raise UserError(f"{name}: {columns[padding[0]]} stands on padding in sequence {padding[0]}")
    return columns


class NextSentenceHead(Module):
    """`cls` of a model that has the next-sentence head alone."""

    def __init__(self, config: BertConfig, place: Place) -> None:
        self.seq_relationship = Linear(config.hidden_size, 2, place)


class BertForNextSentencePrediction(WithEncoder):
    """BERT with the next-sentence head of its pretraining."""

    pooled = True

    def add_head(self, config: BertConfig, place: Place) -> None:
        self.cls = NextSentenceHead(config, place)

    def __call__(
        self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None, position_ids: Any = None,
        *, labels: Any = None, return_dict: bool | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """As `BertModel`; `out.logits` is (B, 2), and `labels` (B,) give `out.loss`, the mean cross entropy.

        0: the second segment follows the first, 1: it does not, -100: does not count.
        """
        encoded = self.base_model.encode(input_ids, attention_mask, token_type_ids, position_ids, **options)
        pooled = encoded.pooler_output
        assert pooled is not None
        out = ClassifierOutput.of(encoded, self.cls.seq_relationship(pooled))
        if labels is not None:
            counted = encoded._batch.packed.not_empty
            out.loss = sequence_loss(out.packed_logits, labels, "single_label_classification", counted=counted)
        return out.in_form(return_dict)
