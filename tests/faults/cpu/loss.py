"""mse_loss, wrong in a way that `tests/faults/table.py` tells."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def squares(predictions: Array, targets: Array) -> tuple[Array, Array]:
    """The square of each difference, in float64, and the gradient of their mean."""
    apart = predictions.astype(np.float64) - targets
    return apart * apart, (2 * apart / max(1, apart.size)).astype(predictions.dtype)


def right_mse_loss(predictions: Array, targets: Array) -> tuple[Array, Array]:
    square, dpredictions = squares(predictions, targets)
    return np.asarray(square.sum() / max(1, square.size), predictions.dtype), dpredictions


def one_of_many_lost(predictions: Array, targets: Array) -> tuple[Array, Array]:
    square, dpredictions = squares(predictions, targets)
    square.reshape(-1)[100000:100001] = 0
    return np.asarray(square.sum() / max(1, square.size), predictions.dtype), dpredictions
