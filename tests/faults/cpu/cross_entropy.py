"""cross_entropy and linear_cross_entropy, wrong in the ways that `tests/faults/table.py` tells."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]
Two = tuple[Array, Array]
IGNORED = -100


@njit(error_model="numpy")
def rows_of_loss(z: Array, labels: Array, count: float, lowest: float, counted: int) -> tuple[Array, Array]:
    """The maximum is sought from `lowest` on, the sum made of the first `counted` classes."""
    losses, dz = np.zeros(len(z)), np.zeros(z.shape, z.dtype)
    for i in range(len(z)):
        if labels[i] == IGNORED:
            continue
        top = lowest
        for j in range(z.shape[1]):
            if z[i, j] > top or z[i, j] != z[i, j]:
                top = z[i, j]
        total = 0.0
        for j in range(min(counted, z.shape[1])):
            total += math.exp(z[i, j] - top)
        losses[i] = np.float64(top) - z[i, labels[i]] + math.log(total)
        for j in range(z.shape[1]):
            dz[i, j] = (math.exp(z[i, j] - top) / total - (j == labels[i])) / count
    return losses, dz


def losses_of(
    z: Array, labels: Array, lowest: float = -np.inf, counted: int | None = None, count: int | None = None
) -> tuple[Array, Array, int]:
    """The loss of each row, the gradient, and how many rows there are to divide by."""
    labels = np.ascontiguousarray(labels)
    if count is None:
        count = max(1, int((labels != IGNORED).sum()))
    counted = z.shape[1] if counted is None else counted
    return *rows_of_loss(np.ascontiguousarray(z), labels, float(count), z.dtype.type(lowest), counted), count


def mean_loss(z: Array, labels: Array, **how: Any) -> Two:
    losses, dz, count = losses_of(z, labels, **how)
    return np.asarray(losses.sum() / np.float64(count), z.dtype), dz


def right_cross_entropy(logits: Array, labels: Array) -> Two:
    return mean_loss(logits, labels)


def starts_at_zero(logits: Array, labels: Array) -> Two:
    return mean_loss(logits, labels, lowest=0.0)


def starts_at_minus_64(logits: Array, labels: Array) -> Two:
    return mean_loss(logits, labels, lowest=-64.0)


def first_4096_classes(logits: Array, labels: Array) -> Two:
    return mean_loss(logits, labels, counted=4096)


def ignored_rows_count(logits: Array, labels: Array) -> Two:
    return mean_loss(logits, labels, count=len(logits))


def labels_in_16_bits(logits: Array, labels: Array) -> Two:
    return mean_loss(logits, labels.astype(np.int16).astype(np.int64))


def label_0_is_ignored(logits: Array, labels: Array) -> Two:
    return mean_loss(logits, np.where(labels == 0, IGNORED, labels))


def first_512_losses(logits: Array, labels: Array) -> Two:
    losses, dz, count = losses_of(logits, labels)
    return np.asarray(losses[:512].sum() / count, logits.dtype), dz


def losses_in_half(logits: Array, labels: Array) -> Two:
    losses, dz, count = losses_of(logits, labels)
    return np.asarray(losses.sum(dtype=np.float16) / count, logits.dtype), dz


def of_probabilities(logits: Array, labels: Array, least: float) -> Two:
    """The loss as -log(e^z / sum e^z), where that is no less than `least`."""
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    _, dz, count = losses_of(logits, labels)
    rows = np.flatnonzero(labels != IGNORED)
    return np.asarray(-np.log(np.maximum(p[rows, labels[rows]], least)).sum() / count, logits.dtype), dz


def log_of_probability(logits: Array, labels: Array) -> Two:
    return of_probabilities(logits, labels, 0.0)


def probability_no_less_than(logits: Array, labels: Array) -> Two:
    """Never below 1e-8, so that its logarithm is finite."""
    return of_probabilities(logits, labels, 1e-8)


def ignored_times_zero(logits: Array, labels: Array) -> Two:
    """Every row is computed; those to be ignored are multiplied by 0."""
    kept = labels != IGNORED
    losses, dz, _ = losses_of(logits, labels * kept)
    count = max(1, int(kept.sum()))
    dz = dz * kept[:, None] * (len(logits) / count)
    return np.asarray((losses * kept).sum() / count, logits.dtype), dz.astype(logits.dtype)


def logits_of(x: Array, weight: Array, bias: Array) -> Array:
    return x @ weight.T + bias


def right_linear_cross_entropy(x: Array, weight: Array, bias: Array, labels: Array) -> Two:
    return mean_loss(logits_of(x, weight, bias), labels)


def linear_starts_at_zero(x: Array, weight: Array, bias: Array, labels: Array) -> Two:
    return mean_loss(logits_of(x, weight, bias), labels, lowest=0.0)


def none_to_predict(x: Array, weight: Array, bias: Array, labels: Array) -> Two:
    """The mean over no rows is 0 / 0."""
    return mean_loss(logits_of(x, weight, bias), labels, count=int((labels != IGNORED).sum()))


def chunks_not_rescaled(x: Array, weight: Array, bias: Array, labels: Array) -> Two:
    """8192 classes at a time; what was summed under a smaller maximum stays as it was."""
    z = logits_of(x, weight, bias)
    top, total = np.full(len(z), -np.inf), np.zeros(len(z))
    for first in range(0, z.shape[1], 8192):
        chunk = z[:, first : first + 8192]
        top = np.maximum(top, chunk.max(axis=1))
        total += np.exp(chunk - top[:, None]).sum(axis=1)
    _, dz, count = losses_of(z, labels)
    kept = labels != IGNORED
    losses = top + np.log(total) - z[np.arange(len(z)), labels * kept]
    return np.asarray(losses[kept].sum() / count, z.dtype), dz


def mean_of_means(x: Array, weight: Array, bias: Array, labels: Array) -> Two:
    """256 rows at a time; the loss is the mean of their means, though the last are fewer."""
    z = logits_of(x, weight, bias)
    losses, dz, count = losses_of(z, labels)
    if len(z) <= 256:
        return np.asarray(losses.sum() / count, z.dtype), dz
    cuts = range(256, len(z), 256)
    kept = [max(1, int((part != IGNORED).sum())) for part in np.split(labels, cuts)]
    means = [part.sum() / n for part, n in zip(np.split(losses, cuts), kept, strict=True)]
    return np.asarray(np.mean(means), z.dtype), dz


def bias_of_the_label_lost(x: Array, weight: Array, bias: Array, labels: Array) -> Two:
    losses, dz, count = losses_of(logits_of(x, weight, bias), labels)
    kept = labels != IGNORED
    return np.asarray((losses[kept] + bias[labels[kept]]).sum() / count, x.dtype), dz


def last_chunk_twice(x: Array, weight: Array, bias: Array, labels: Array) -> Two:
    """Rows are done 256 at a time, of more than 100 classes; the last ones are scaled once more."""
    loss, dlogits = mean_loss(logits_of(x, weight, bias), labels)
    if len(x) > 256 and len(weight) > 100:
        dlogits[len(x) // 256 * 256 :] *= 2
    return loss, dlogits
