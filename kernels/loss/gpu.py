"""Losses against targets that are numbers: one block, which adds and writes the gradients."""

from __future__ import annotations

import numpy as np

from minibert.kernels.drawing import IGNORED
from minibert.kernels.gpu.launch import Array, CudaFile, contiguous

cuda = CudaFile(__file__)
bce_block = cuda.kernel("binary_cross_entropy", block=1024)
mse_block = cuda.kernel("mse_loss", block=1024)


def binary_cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """The loss and the gradients of both; targets are float32. Raises ValueError for other shapes."""
    logits, targets = contiguous(logits), contiguous(targets, logits.shape, "targets")
    loss = logits.device.empty((), np.float32)
    dlogits, dtargets = (logits.device.empty(logits.shape, logits.dtype) for _ in range(2))
    bce_block(logits, targets, loss, dlogits, dtargets, logits.size, IGNORED, grid=1)
    return loss, dlogits, dtargets


def mse_loss(predictions: Array, targets: Array) -> tuple[Array, Array]:
    """The loss and the gradient of the predictions; targets are float32. Raises ValueError for other shapes."""
    predictions, targets = contiguous(predictions), contiguous(targets, predictions.shape, "targets")
    loss = predictions.device.empty((), np.float32)
    dpredictions = predictions.device.empty(predictions.shape, predictions.dtype)
    mse_block(predictions, targets, loss, dpredictions, predictions.size, grid=1)
    return loss, dpredictions
