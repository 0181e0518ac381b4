"""Heads for texts, tokens and answers: their losses by the formula, what counts in them, and wrong labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.errors import UserError
from minibert.model.heads import (
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from minibert.model.losses import sequence_loss, weighed_cross_entropy
from minibert.model.tensor import Tensor

LABELS = {0: "a", 1: "b", 2: "c"}
CONFIG = mb.BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=12, initializer_range=0.3, id2label=LABELS,
)  # fmt: skip
IDS = np.random.default_rng(1).integers(1, 40, (4, 9))
LENGTHS = np.array([9, 4, 6, 1])
MASK = (np.arange(9) < LENGTHS[:, None]).astype(int)
PACKED = {"input_ids": IDS[MASK == 1], "cu_seqlens": np.concatenate([[0], np.cumsum(LENGTHS)])}
TAGS = np.random.default_rng(2).integers(-1, 3, IDS.shape)
TAGS[TAGS < 0] = -100


def model_of(cls: Any, **changes: Any) -> Any:
    return cls(replace(CONFIG, **changes), "numpy", "float64", seed=2)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def nll(logits: np.ndarray, labels: np.ndarray, weights: Any = (1, 1, 1)) -> float:
    """Mean negative log likelihood of the labels that count, each weighed by its class's weight."""
    counted = labels != -100
    chosen = labels[counted]
    w = np.asarray(weights, np.float64)[chosen]
    return float(-(w * log_softmax(logits[counted])[np.arange(len(chosen)), chosen]).sum() / w.sum())


def by_hand(kind: str, logits: np.ndarray, labels: np.ndarray) -> float:
    if kind == "single_label_classification":
        return nll(logits, labels)
    if kind == "regression":
        return float(((logits - labels.reshape(logits.shape)) ** 2).mean())
    counted = labels != -100
    z, t = logits[counted], labels[counted]
    return float((np.log1p(np.exp(-z)) * t + np.log1p(np.exp(z)) * (1 - t)).mean())


@pytest.mark.parametrize(
    ("labels", "kind", "outputs"),
    [
        ([0, 2, 1, 1], "single_label_classification", 3),
        ([0, -100, 1, -100], "single_label_classification", 3),
        ([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [0.25, 1, -100]], "multi_label_classification", 3),
        ([1.5, -2, 0.25, 3], "regression", 1),
        ([[1.0, 2, 3], [0, 0, 1], [1, 1, 1], [-100, 4, 5]], "regression", 3),
    ],
)
def test_the_labels_say_what_a_classifier_of_texts_is_for(labels: Any, kind: str, outputs: int) -> None:
    given = {"problem_type": kind} if (kind, outputs) == ("regression", 3) else {}
    model = model_of(BertForSequenceClassification, id2label={n: f"LABEL_{n}" for n in range(outputs)}, **given)
    out = model(IDS, MASK, labels=np.array(labels))
    assert model.config.problem_type == kind and out.logits.shape == (4, outputs)
    assert out.loss.item() == pytest.approx(by_hand(kind, out.logits.numpy(), np.array(labels)), rel=1e-12)


@pytest.mark.parametrize("cls", [BertForSequenceClassification, BertForTokenClassification, BertForQuestionAnswering,
                                 BertForNextSentencePrediction])  # fmt: skip
def test_packed_and_padded_are_the_same(cls: Any) -> None:
    model = model_of(cls)
    padded, packed = model(IDS, MASK), model(**PACKED)
    np.testing.assert_allclose(packed.packed_logits.numpy(), padded.packed_logits.numpy(), rtol=1e-12, atol=1e-12)
    if cls is BertForTokenClassification:
        assert packed.logits.shape == (LENGTHS.sum(), 3) and padded.logits.shape == (4, 9, 3)
        assert not padded.logits.numpy()[MASK == 0].any()
        np.testing.assert_array_equal(padded.logits.numpy()[MASK == 1], padded.packed_logits.numpy())
    if cls is BertForQuestionAnswering:
        for out in (padded, packed):
            assert out.start_logits.shape == out.end_logits.shape == (4, 9)
            assert (out.start_logits.numpy()[MASK == 0] <= -1e30).all()


@pytest.mark.parametrize("padding", [-100, 1])
def test_labels_of_tokens_count_but_on_padding(padding: int) -> None:
    model = model_of(BertForTokenClassification)
    tags = np.where(MASK == 1, TAGS, padding)
    out = model(IDS, MASK, labels=tags)
    assert out.loss.item() == pytest.approx(nll(out.logits.numpy()[MASK == 1], TAGS[MASK == 1]), rel=1e-12)
    none = model(IDS, MASK, labels=np.full_like(TAGS, -100)).loss
    none.backward()
    assert none.item() == 0 and not model.classifier.weight.grad.any()


def test_the_loss_of_answers_is_the_mean_of_both_ends_over_real_tokens() -> None:
    model = model_of(BertForQuestionAnswering)
    starts, ends = np.array([2, 0, -100, 0]), np.array([5, 3, 1, 9])  # 9: beyond the tokens, which does not count
    out = model(IDS, MASK, start_positions=starts, end_positions=ends)
    losses = []
    for positions, logits in ((starts, out.start_logits.numpy()), (ends, out.end_logits.numpy())):
        rows = [(n, p) for n, p in enumerate(positions) if 0 <= p < 9]
        losses.append(np.mean([-log_softmax(logits[n, : LENGTHS[n]])[p] for n, p in rows]))
    assert out.loss.item() == pytest.approx(np.mean(losses), rel=1e-12)


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.2, 3, 1], [0, 2, 1]])
def test_class_weights_are_those_of_torch(weights: list[float]) -> None:
    """sum w[y] loss / sum w[y], and its gradient, against central differences."""
    backend = mb.backends.get("numpy")
    logits, labels = np.random.default_rng(4).standard_normal((7, 3)), np.array([0, 1, -100, 2, 1, 0, 1])
    x = Tensor(logits.copy(), backend, requires_grad=True)
    loss = weighed_cross_entropy(x, labels, weights)
    loss.backward()
    assert loss.item() == pytest.approx(nll(logits, labels, weights), rel=1e-12)
    for place in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[place] = 1e-5
        slope = (nll(logits + step, labels, weights) - nll(logits - step, labels, weights)) / 2e-5
        assert x.grad[place] == pytest.approx(slope, abs=1e-8)


def test_class_weights_of_classes_that_do_not_occur() -> None:
    x = Tensor(np.ones((2, 3)), mb.backends.get("numpy"), requires_grad=True)
    assert weighed_cross_entropy(x, np.array([-100, -100]), [1, 2, 3]).item() == 0
    assert weighed_cross_entropy(x, np.array([0, -100]), [0, 2, 3]).item() == 0
    for wrong in ([1, 2], [1, 2, -1], [1, 2, np.nan]):
        with pytest.raises(UserError, match="class_weights: expected 3 numbers of 0 or more"):
            weighed_cross_entropy(x, np.array([0, 1]), wrong)
    with pytest.raises(UserError, match="class_weights: expected none with regression"):
        sequence_loss(x, np.ones((2, 3)), "regression", [1, 2, 3])


@pytest.mark.parametrize("rate", [None, 0.0, 0.5])
def test_dropout_before_the_classifier(rate: float | None) -> None:
    """It has a rate of its own, else that of the encoder; none in evaluation."""
    model = model_of(BertForSequenceClassification, classifier_dropout=rate, hidden_dropout_prob=0.0,
                     attention_probs_dropout_prob=0.0)  # fmt: skip
    still = model(IDS, MASK).logits.numpy()
    model.train()
    first = model(IDS, MASK).logits.numpy()
    model.step = 1
    second = model(IDS, MASK).logits.numpy()
    assert np.array_equal(first, still) == (not rate)
    assert np.array_equal(first, second) == (not rate), "each step has a mask of its own"


@pytest.mark.parametrize(
    ("cls", "arguments", "said"),
    [
        (BertForSequenceClassification, {"labels": [0, 1, 3, 0]}, "labels: 3 is out of range"),
        (BertForSequenceClassification, {"labels": [0, 1]}, "labels: expected one for each of 4 sequences"),
        (
            BertForSequenceClassification,
            {"labels": np.ones((4, 2))},
            r"labels: expected shape \(4, 3\) for multi_label",
        ),
        (BertForSequenceClassification, {"labels": np.full((4, 3), 1.5)}, "labels: expected 0 to 1 for multi_label"),
        (
            BertForSequenceClassification,
            {"labels": np.full((4, 3), np.nan)},
            "labels: expected finite numbers, got nan",
        ),
        (BertForTokenClassification, {"labels": np.full((4, 9), 3)}, "labels: 3 is out of range"),
        (BertForTokenClassification, {"labels": [0, 1, 2, 0]}, "labels: expected the shape of input_ids"),
        (BertForQuestionAnswering, {"start_positions": [0, 0, 0, 0]}, "start_positions and end_positions together"),
        (
            BertForQuestionAnswering,
            {"start_positions": [0, 5, 0, 0], "end_positions": [0, 0, 0, 0]},
            "start_positions: 5 stands on padding in sequence 1",
        ),
        (BertForNextSentencePrediction, {"labels": [0, 1, 2, 0]}, "labels: 2 is out of range"),
    ],
)
def test_wrong_labels_are_told(cls: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        model_of(cls)(IDS, MASK, **{name: np.asarray(value) for name, value in arguments.items()})


def test_a_single_output_chooses_no_class() -> None:
    model = model_of(BertForSequenceClassification, id2label={0: "a"}, problem_type="single_label_classification")
    with pytest.raises(UserError, match="expected two labels or more, got num_labels 1"):
        model(IDS, MASK, labels=np.zeros(4, int))


def test_empty_sequences_do_not_count() -> None:
    mask = MASK.copy()
    mask[3] = 0
    model = model_of(BertForSequenceClassification)
    out = model(IDS, mask, labels=np.array([0, 1, 2, 0]))
    assert out.loss.item() == pytest.approx(nll(out.logits.numpy()[:3], np.array([0, 1, 2])), rel=1e-12)
