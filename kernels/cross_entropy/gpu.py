"""cross_entropy: a block for each row; linear_cross_entropy: the library's product, then the same kernel in place."""

from __future__ import annotations

import numpy as np

from minibert.kernels.cross_entropy import IGNORED
from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for, contiguous, int32

cuda = CudaFile(__file__)
count_kept = cuda.kernel("count_kept", block=1024)
cross_entropy_rows = cuda.kernel("cross_entropy_rows", block=512)
mean_loss = cuda.kernel("mean_loss", block=1024)

PITCH_BYTES = 128  # rows of logits begin on multiples of it: products of rows that lie oddly are several times slower


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    dlogits = logits.device.empty(logits.shape, logits.dtype)
    return _loss_and_gradient(contiguous(logits), dlogits, labels, logits.shape[1])


def linear_cross_entropy(x: Array, weight: Array, bias: Array, labels: Array) -> tuple[Array, Array]:
    columns, elements = len(weight), PITCH_BYTES // x.itemsize
    rows = x.device.empty((len(x), -(-columns // elements) * elements), x.dtype)
    bias = contiguous(bias, (columns,), "bias")
    x.device.gemm(x, weight.swapaxes(0, 1), bias=bias, epilogue="bias", out=rows[:, :columns])
    loss, rows = _loss_and_gradient(None, rows, labels, columns)
    return loss, rows[:, :columns]


def _loss_and_gradient(logits: Array | None, dlogits: Array, labels: Array, columns: int) -> tuple[Array, Array]:
    """`logits` None: they are in `dlogits`. Of both, what a row holds after its first `columns` is left alone."""
    device, (rows, pitch) = dlogits.device, dlogits.shape
    labels = _labels(labels, rows, columns)
    kept = device.empty((), np.int32)
    losses, loss = device.empty((rows,), np.float32), device.empty((), np.float32)
    count_kept(labels, kept, rows, IGNORED, grid=1)
    grid = blocks_for(rows, 1, device)
    cross_entropy_rows(logits, dlogits, labels, kept, losses, rows, columns, pitch, IGNORED, grid=grid)
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
