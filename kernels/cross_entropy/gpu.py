"""cross_entropy: a block for each row; linear_cross_entropy: the library's product, then the same kernel in place."""

from __future__ import annotations

import numpy as np

from minibert.kernels.cross_entropy import IGNORED
from minibert.kernels.gpu_launch import Array, CudaFile, blocks_for, contiguous, int32

cuda = CudaFile(__file__)
count_kept = cuda.kernel("count_kept", block=1024)
cross_entropy_rows = cuda.kernel("cross_entropy_rows", block=512)
mean_loss = cuda.kernel("mean_loss", block=1024)


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    return _loss_and_gradient(contiguous(logits), logits.device.empty(logits.shape, logits.dtype), labels)


def linear_cross_entropy(x: Array, weight: Array, bias: Array, labels: Array) -> tuple[Array, Array]:
    logits = x.device.gemm(x, weight.swapaxes(0, 1), bias=contiguous(bias, weight.shape[:1], "bias"), epilogue="bias")
    return _loss_and_gradient(None, logits, labels)


def _loss_and_gradient(logits: Array | None, dlogits: Array, labels: Array) -> tuple[Array, Array]:
    """`logits` None: they are in `dlogits`."""
    device, (rows, columns) = dlogits.device, dlogits.shape
    labels = _labels(labels, rows, columns)
    kept = device.empty((), np.int32)
    losses, loss = device.empty((rows,), np.float32), device.empty((), np.float32)
    count_kept(labels, kept, rows, IGNORED, grid=1)
    grid = blocks_for(rows, 1, device)
    cross_entropy_rows(logits, dlogits, labels, kept, losses, rows, columns, IGNORED, grid=grid)
    mean_loss(losses, kept, loss, rows, grid=1)
    return loss, dlogits


def _labels(labels: Array, rows: int, columns: int) -> Array:
    """(rows,) int32. Raises ValueError unless, as far as the host knows, each is in [0, columns) or IGNORED."""
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels: expected whole numbers, got {labels.dtype}")
    labels = contiguous(labels, (rows,), "labels")
    if labels.host is not None:
        kept = labels.host[labels.host != IGNORED]
        if kept.size and not 0 <= kept.min() <= kept.max() < columns:
            raise ValueError(f"labels: expected numbers from 0 to {columns - 1}, got {kept.min()} to {kept.max()}")
    return int32(labels)
