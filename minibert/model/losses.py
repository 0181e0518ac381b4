"""Losses of heads that classify, answer or predict numbers, and of encoders: means over what counts, made of ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minibert.backends.base import NARROW
from minibert.errors import UserError
from minibert.kernels.cross_entropy import cross_entropy
from minibert.kernels.loss import binary_cross_entropy, mse_loss
from minibert.kernels.pooling import normalize
from minibert.kernels.view import concatenate
from minibert.model.config import BertConfig
from minibert.model.packing import IGNORE, as_array, class_numbers
from minibert.model.tensor import Tensor, apply


def problem_type(config: BertConfig, labels: np.ndarray) -> str:
    """What the labels are: as the config says, else by transformers' rule.

    One output is regression; of several, whole numbers name one class, floats are the targets of each. Raises UserError
    where a single output is to choose a class, on which every loss is 0.
    """
    found = config.problem_type
    if found is None and config.num_labels == 1:
        found = "regression"
    elif found is None:
        found = "single_label_classification" if labels.dtype.kind in "iu" else "multi_label_classification"
    if found == "single_label_classification" and config.num_labels == 1:
        raise UserError("problem_type single_label_classification: expected two labels or more, got num_labels 1")
    return found


def sequence_loss(
    logits: Tensor, labels: Any, kind: str, class_weights: Sequence[float] | None = None, counted: Any = None
) -> Tensor:
    """The mean loss of (B, K) logits, by `problem_type`.

    "single_label_classification": cross entropy of `labels` (B,), class numbers, of which -100 does not count, nor does
    a row where `counted` (B,) is false; each row is weighed by its class's weight. "multi_label_classification": binary
    cross entropy with logits of `labels` (B, K) from 0 to 1, -100 where one is not known. "regression": mean squared
    error of `labels` (B, K), or (B,) where K is 1. Raises UserError for labels of another shape, type or range.
    """
    rows, classes = logits.shape
    if class_weights is not None and kind != "single_label_classification":
        raise UserError(f"class_weights: expected none with {kind}: they weigh classes of which each example has one")
    if kind == "single_label_classification":
        numbers = class_numbers("labels", labels, rows, classes)
        if counted is not None:
            numbers = np.where(counted, numbers, IGNORE)
        return weighed_cross_entropy(logits, numbers, class_weights)
    targets = as_array("labels", labels, "an array of numbers").astype(np.float64)
    if targets.shape == (rows,) and classes == 1:
        targets = targets.reshape(rows, 1)
    if targets.shape != (rows, classes):
        raise UserError(f"labels: expected shape {(rows, classes)} for {kind}, got {targets.shape}")
    if not np.isfinite(targets).all():
        raise UserError(f"labels: expected finite numbers, got {targets[~np.isfinite(targets)][0]}")
    op = mse_loss
    if kind == "multi_label_classification":
        op = binary_cross_entropy
        wrong = targets[(targets != IGNORE) & ~((targets >= 0) & (targets <= 1))]
        if wrong.size:
            raise UserError(f"labels: expected 0 to 1 for {kind}, or -100 where it is not known, got {wrong[0]:g}")
    dtype = "float32" if logits.dtype.name in NARROW else logits.dtype  # targets are given, and keep their digits
    return apply(op, logits, Tensor(logits.backend.asarray(targets, dtype=dtype), logits.backend))


def weighed_cross_entropy(logits: Tensor, labels: np.ndarray, class_weights: Sequence[float] | None = None) -> Tensor:
    """sum w[y] loss / sum w[y] over rows with a label y, as torch's CrossEntropyLoss; 0 where there is none.

    logits (M, K), labels (M,) of which -100 does not count, class_weights (K,), all 1 where there are none.
    """

    def of(some: np.ndarray) -> Tensor:
        return apply(cross_entropy, logits, Tensor(logits.backend.asarray(some.astype(np.int32)), logits.backend))

    if class_weights is None:
        return of(labels)
    weights = np.asarray(class_weights, np.float64)
    if weights.shape != (logits.shape[1],) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise UserError(f"class_weights: expected {logits.shape[1]} numbers of 0 or more, got {class_weights}")
    present, counts = np.unique(labels[labels != IGNORE], return_counts=True)
    shares = counts * weights[present]  # of each class's own mean loss
    parts = [
        of(np.where(labels == label, labels, IGNORE)) * float(share / shares.sum())
        for label, share in zip(present, shares, strict=True)
        if share
    ]
    return sum(parts[1:], parts[0]) if parts else of(np.full_like(labels, IGNORE))


def cosine_similarity_loss(a: Tensor, b: Tensor, scores: Any) -> Tensor:
    """() The mean squared error between cos(a_i, b_i) and the score of each pair, (B,), from -1 to 1.

    a and b are (B, C). Reimers and Gurevych, "Sentence-BERT" (2019), section 3, as CosineSimilarityLoss of
    sentence-transformers. Raises UserError for shapes that differ.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise UserError(f"expected two vectors for each pair, of one shape (B, C), got {a.shape} and {b.shape}")
    cosines = (apply(normalize, a) * apply(normalize, b)).sum(axis=1)
    return sequence_loss(cosines.reshape(a.shape[0], 1), scores, "regression")


def multiple_negatives_ranking_loss(
    anchors: Tensor, positives: Tensor, *negatives: Tensor, scale: float = 20.0
) -> Tensor:
    """() Mean over i of the cross entropy of row i of scale cos(anchors, [positives, *negatives]) against column i.

    Each is (B, C); whatever belongs to another anchor is a negative of this one, so that no text may be in a batch
    twice. Henderson et al., "Efficient natural language response suggestion" (2017), section 4.4, with cosines, as
    MultipleNegativesRankingLoss of sentence-transformers. `scale` is one over the temperature.

    Raises UserError for shapes that differ.
    """
    shapes = [t.shape for t in (anchors, positives, *negatives)]
    if anchors.ndim != 2 or len(set(shapes)) != 1:
        raise UserError(f"expected anchors, positives and negatives of one shape (B, C), got {shapes}")
    others = positives if not negatives else apply(concatenate, positives, *negatives, axis=0)
    cosines = apply(normalize, anchors) @ apply(normalize, others).transpose(1, 0)
    own = anchors.backend.asarray(np.arange(anchors.shape[0], dtype=np.int32))
    return apply(cross_entropy, cosines * float(scale), Tensor(own, anchors.backend))
