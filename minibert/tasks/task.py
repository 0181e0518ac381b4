"""A task: the model for it, how examples become sequences and targets, the loss, and how good an answer is.

S sequences of N tokens in all, K labels. Outputs and targets have a row for each sequence, or for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from minibert.data import Sequences
from minibert.errors import UserError
from minibert.model.config import BertConfig, ElectraConfig
from minibert.model.electra import (
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
)
from minibert.model.heads import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertWithClassifier,
)
from minibert.model.losses import sequence_loss, weighed_cross_entropy
from minibert.model.packing import IGNORE, Packed
from minibert.model.tensor import Tensor
from minibert.tasks.answers import answers_from
from minibert.tasks.encoding import EncodedWords, Windows, encode_questions, encode_texts, encode_words
from minibert.tasks.examples import MULTI, REGRESSION, SINGLE, TextExamples
from minibert.tasks.labels import names_of
from minibert.tasks.metrics import (
    MAIN,
    Scores,
    answer_metrics,
    class_metrics,
    multi_label_metrics,
    regression_metrics,
    tag_metrics,
)
from minibert.tasks.questions import QuestionExamples
from minibert.tasks.tags import is_entity_tag, word_tags
from minibert.tasks.words import WordExamples

ON_ELECTRA: dict[type[BertWithClassifier], type[BertWithClassifier]] = {
    BertForSequenceClassification: ElectraForSequenceClassification,
    BertForTokenClassification: ElectraForTokenClassification,
    BertForQuestionAnswering: ElectraForQuestionAnswering,
}


@dataclass(frozen=True)
class Prepared:
    """Examples as a model takes them."""

    examples: Any
    sequences: Sequences
    targets: np.ndarray | None  # None where the examples have no labels
    encoded: Any  # how sequences and examples belong together, where that is not one to one
    notes: tuple[str, ...]  # what was lost on the way
    texts: int = 1  # sequences of one thing that is trained on, one after the other

    @property
    def count(self) -> int:
        """How many things there are to train on: examples, or windows of them."""
        return len(self.sequences) // self.texts

    def sequences_of(self, chosen: np.ndarray) -> np.ndarray:
        """The numbers of the sequences of some of them."""
        return (chosen[:, None] * self.texts + np.arange(self.texts)).reshape(-1)

    @property
    def lengths(self) -> np.ndarray:
        """(count,) their tokens."""
        return self.sequences.lengths.reshape(-1, self.texts).sum(axis=1)


class Task:
    """What a fine-tuned model does. `names` are its K labels, in the order of its outputs."""

    architecture: type[BertWithClassifier]
    task_type = ""  # as PEFT names it
    of_tokens = False  # a row of outputs and targets for each token
    in_batch = False  # the loss of an example depends on those that it is in a batch with
    max_seq_length = 128

    def __init__(self, names: Sequence[str] = (), problem_type: str | None = None) -> None:
        self.names, self.problem_type = list(names), problem_type

    @classmethod
    def model_class(cls, config: BertConfig) -> type[BertWithClassifier]:
        """The model for the task, on the encoder of a config."""
        return ON_ELECTRA[cls.architecture] if config.model_type == ElectraConfig.model_type else cls.architecture

    def labels(self) -> dict[str, Any]:
        """Fields of the model's config that belong to the task."""
        return {"id2label": dict(enumerate(self.names)), "problem_type": self.problem_type}

    def prepare(self, examples: Any, tokenizer: Tokenizer, max_seq_length: int) -> Prepared:
        raise NotImplementedError

    def forward(
        self,
        model: Any,
        packed: Packed,
        targets: np.ndarray | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The logits of a batch; and with targets their loss, the mean over what counts."""
        logits = model(packed, return_dict=True).packed_logits
        return logits, None if targets is None else self.loss(logits, targets, class_weights)

    def loss(self, logits: Tensor, targets: np.ndarray, class_weights: Sequence[float] | None) -> Tensor:
        raise NotImplementedError

    def counted(self, targets: np.ndarray) -> int:
        """What the loss is the mean of."""
        return len(targets)

    def check(self, config: Any, prepared: Prepared) -> None:
        """Raise UserError for a FineTuningConfig of which this task cannot heed something."""

    def batches(self, prepared: Prepared, order: np.ndarray, size: int) -> list[np.ndarray]:
        """All that there is, in an order, `size` at a time."""
        return [order[start : start + size] for start in range(0, len(order), size)]

    def save(self, model: Any, tokenizer: Tokenizer, folder: Path, max_seq_length: int) -> None:
        """Write the model into a folder in which its tokenizer is."""
        model.save_pretrained(folder)

    def mean_loss(self, prepared: Prepared, outputs: np.ndarray) -> float | None:
        """Where the loss is `in_batch`: that of the outputs of all rows."""
        raise NotImplementedError

    def no_outputs(self, prepared: Prepared) -> np.ndarray:
        """Outputs of zeros for all rows."""
        rows = len(prepared.sequences.ids) if self.of_tokens else len(prepared.sequences)
        return np.zeros((rows, len(self.names) or 2), np.float32)

    def scores(self, prepared: Prepared, outputs: np.ndarray) -> Scores:
        """How good the outputs of all rows are."""
        raise NotImplementedError

    def main_metric(self, prepared: Prepared) -> str:
        """The figure of such examples that tells which checkpoint is the best; higher is better."""
        raise NotImplementedError


class Classify(Task):
    """One class of several, any of several, or a number, of a text or a pair."""

    architecture = BertForSequenceClassification
    task_type = "SEQ_CLS"

    @classmethod
    def of(cls, examples: TextExamples, names: Sequence[str] = ()) -> Classify:
        """The task that labelled examples set, with labels in a given order or their own."""
        return cls(names or own_names(examples), examples.problem_type)

    def prepare(self, examples: TextExamples, tokenizer: Tokenizer, max_seq_length: int) -> Prepared:
        encoded = encode_texts(tokenizer, examples.texts, examples.pairs, max_seq_length)
        targets = None if examples.labels is None else examples.targets(self.names)
        notes = (f"{encoded.truncated} of {len(examples)} texts were cut",) if encoded.truncated else ()
        return Prepared(examples, encoded.sequences, targets, encoded, notes)

    def loss(self, logits: Tensor, targets: np.ndarray, class_weights: Sequence[float] | None) -> Tensor:
        return sequence_loss(logits, targets, str(self.problem_type), class_weights)

    def counted(self, targets: np.ndarray) -> int:
        return targets.size if self.problem_type == REGRESSION else int((targets != IGNORE).sum())

    def scores(self, prepared: Prepared, outputs: np.ndarray, rows: Any = slice(None)) -> Scores:
        """How good the outputs of some rows are, of all where none are named."""
        assert prepared.targets is not None
        targets, outputs = prepared.targets[rows], outputs[rows]
        if self.problem_type == REGRESSION:
            return regression_metrics(targets, outputs[:, 0])
        if self.problem_type == MULTI:
            return multi_label_metrics(targets, probabilities(outputs, MULTI), self.names)
        return class_metrics(targets, outputs.argmax(axis=-1), self.names)

    def main_metric(self, prepared: Prepared) -> str:
        return MAIN[str(self.problem_type)]


class Tag(Task):
    """A label for each word."""

    architecture = BertForTokenClassification
    task_type = "TOKEN_CLS"
    of_tokens = True

    def prepare(self, examples: WordExamples, tokenizer: Tokenizer, max_seq_length: int) -> Prepared:
        encoded = encode_words(tokenizer, examples.words, max_seq_length)
        labelled = all(sentence.tags is not None for sentence in examples.sentences)
        targets = encoded.labels(examples.targets(self.names)) if labelled else None
        lost = sum(map(len, encoded.lost))
        notes = (f"{lost} words lie beyond {max_seq_length} tokens, or have no token: taken for O",) if lost else ()
        return Prepared(examples, encoded.sequences, targets, encoded, notes)

    def loss(self, logits: Tensor, targets: np.ndarray, class_weights: Sequence[float] | None) -> Tensor:
        return weighed_cross_entropy(logits, targets, class_weights)

    def counted(self, targets: np.ndarray) -> int:
        return int((targets != IGNORE).sum())

    def tags(self, prepared: Prepared, outputs: np.ndarray) -> list[list[str]]:
        """The tag of each word, by sentence."""
        encoded: EncodedWords = prepared.encoded
        counts = [len(sentence.words) for sentence in prepared.examples.sentences]
        return word_tags(encoded, outputs.argmax(axis=-1), self.names, counts)

    def scores(self, prepared: Prepared, outputs: np.ndarray) -> Scores:
        return tag_metrics(prepared.examples.tags, self.tags(prepared, outputs))

    def main_metric(self, prepared: Prepared) -> str:
        return MAIN["entities" if all(map(is_entity_tag, self.names)) else "tags"]


class Answer(Task):
    """The part of a context that answers a question, or none."""

    architecture = BertForQuestionAnswering
    task_type = "QUESTION_ANS"
    of_tokens = True
    max_seq_length = 384
    doc_stride = 128

    def prepare(self, examples: QuestionExamples, tokenizer: Tokenizer, max_seq_length: int) -> Prepared:
        """Targets are (S, 2): where the answer begins and ends in each window."""
        questions = [one.question for one in examples.questions]
        stride = min(self.doc_stride, max_seq_length // 3)
        encoded = encode_questions(tokenizer, questions, examples.contexts, max_seq_length, stride)
        targets = np.stack(encoded.answer_positions(examples.answer_spans), axis=-1)
        notes = (f"{encoded.cut_questions} questions were cut",) if encoded.cut_questions else ()
        return Prepared(examples, encoded.sequences, targets, encoded, notes)

    def labels(self) -> dict[str, Any]:
        return {}

    def forward(
        self,
        model: Any,
        packed: Packed,
        targets: np.ndarray | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        ends = {} if targets is None else {"start_positions": targets[:, 0], "end_positions": targets[:, 1]}
        out = model(packed, **ends, return_dict=True)
        return out.packed_logits, out.loss

    def scores(self, prepared: Prepared, outputs: np.ndarray) -> Scores:
        examples: QuestionExamples = prepared.examples
        windows: Windows = prepared.encoded
        found = answers_from(windows, examples.contexts, outputs[:, 0], outputs[:, 1])
        return answer_metrics(examples.answers, [each.text for each in found])

    def main_metric(self, prepared: Prepared) -> str:
        return MAIN["answers"]


def own_names(examples: Any) -> list[str]:
    """The labels of examples; of numbers the name that transformers gives to a single output."""
    if getattr(examples, "problem_type", None) == REGRESSION:
        return ["LABEL_0"]
    return list(examples.label_names())


def most_tokens(model: Any) -> int:
    """Of a sequence: the model's positions, but those that a prefix takes."""
    prefix = getattr(getattr(model, "peft_config", None), "num_virtual_tokens", 0)
    return int(model.config.max_position_embeddings - prefix)


def probabilities(logits: np.ndarray, problem_type: str = SINGLE) -> np.ndarray:
    """(M, K): softmax over the classes of a row, or each class's own sigmoid."""
    logits = logits.astype(np.float64)
    if problem_type == MULTI:
        return 1 / (1 + np.exp(-logits))
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def architecture_of(config: BertConfig) -> str:
    """The class of the model, as config.json names it; "" where it does not."""
    named = config.others.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def label_names(config: BertConfig) -> list[str]:
    """The labels in the order of the outputs. Raises UserError where their numbers have a gap."""
    return names_of(config.id2label) or ["LABEL_0", "LABEL_1"]


def task_of(config: BertConfig, architecture: str) -> Task | None:
    """The task of a fine-tuned model, by its config.json; None for another kind.

    Raises UserError where the labels do not fit what they are for.
    """
    names = label_names(config)
    if architecture == Classify.model_class(config).__name__:
        kind = config.problem_type or (REGRESSION if len(names) == 1 else SINGLE)
        if kind != MULTI and (kind == REGRESSION) != (len(names) == 1):
            expected = "a single label" if kind == REGRESSION else "two labels or more"
            raise UserError(f"config: expected {expected} with problem_type {kind}, got {len(names)}")
        return Classify(names, kind)
    if architecture == Tag.model_class(config).__name__:
        return Tag(names)
    return Answer() if architecture == Answer.model_class(config).__name__ else None
