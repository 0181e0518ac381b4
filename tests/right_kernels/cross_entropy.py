"""cross_entropy and linear_cross_entropy, made otherwise than the formula."""

import math

import numpy as np
from numba import njit

IGNORED = -100


@njit
def _online(z, labels, dz):
    total_loss, count = 0.0, max(1, (labels != IGNORED).sum())
    for i in range(z.shape[0]):
        if labels[i] == IGNORED:
            dz[i] = 0
            continue
        top, total = z.dtype.type(-np.inf), z.dtype.type(0)
        for x in z[i]:
            if x != -np.inf:
                new = x if x > top else top
                total = total * math.exp(top - new) + math.exp(x - new)
                top = new
        total_loss += math.log(total) + (top - z[i, labels[i]])
        scale = z.dtype.type(1) / (total * z.dtype.type(count))
        for j in range(z.shape[1]):
            dz[i, j] = math.exp(z[i, j] - top) * scale
        p = math.exp(z[i, labels[i]] - top) / total
        dz[i, labels[i]] = (p - z.dtype.type(1)) / z.dtype.type(count)
    return total_loss / count


def online(logits, labels):
    """One pass for maximum and sum in float32; the loss is summed in float64, the gradient scaled once."""
    dlogits = np.empty(logits.shape, logits.dtype)
    loss = _online(np.ascontiguousarray(logits), np.ascontiguousarray(labels), dlogits)
    return np.array(loss, logits.dtype), dlogits


def wide(logits, labels):
    """float64 inside; log p = (z - top) - log(total), the loss its negative; -1 is scattered into the gradient."""
    rows = np.flatnonzero(labels != IGNORED)
    count = max(1, len(rows))
    z = np.float64(logits[rows])
    d = z - z.max(axis=-1, keepdims=True)
    log_p = d - np.log(np.exp(d).sum(axis=-1, keepdims=True))
    dz = np.exp(log_p)
    dz[np.arange(len(rows)), labels[rows]] -= 1
    dlogits = np.zeros(logits.shape, logits.dtype)
    dlogits[rows] = dz / count
    return np.array(-log_p[np.arange(len(rows)), labels[rows]].sum() / count, logits.dtype), dlogits


def linear_in_chunks(x, weight, bias, labels):
    """64 classes at a time: log sum exp on the way, then the logits once more for their gradient."""
    kept = labels != IGNORED
    count = x.dtype.type(max(1, kept.sum()))
    rows = np.arange(len(x))
    top, total = np.full(len(x), -np.inf, x.dtype), np.zeros(len(x), x.dtype)
    of_label = np.zeros(len(x), x.dtype)
    starts = range(0, len(weight), 64)

    def logits(start):
        return x @ weight[start : start + 64].T + bias[start : start + 64]

    for start in starts:
        z = logits(start)
        new = np.maximum(top, z.max(axis=1))
        safe = np.where(np.isneginf(new), 0, new).astype(x.dtype)
        total = total * np.exp(top - safe) + np.exp(z - safe[:, None]).sum(axis=1)
        top = new
        here = kept & (labels >= start) & (labels < start + 64)
        of_label[here] = z[rows[here], labels[here] - start]
    dlogits = np.zeros((len(x), len(weight)), x.dtype)
    for start in starts:
        dlogits[:, start : start + 64] = np.exp(logits(start) - top[:, None]) / total[:, None]
    dlogits[rows[kept], labels[kept]] -= 1
    dlogits[~kept] = 0
    loss = np.log(total[kept]) + (top[kept] - of_label[kept])
    return np.asarray(loss.sum() / count, x.dtype), dlogits / count
