"""How an array may lie in memory other than row by row: what every kernel must take as well."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def every_second(a: np.ndarray) -> np.ndarray:
    wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    wide[..., ::2] = a
    return wide[..., ::2]


# (a backend on a device may make them contiguous on the way there)
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "every second": every_second,
    "reversed": lambda a: a[::-1].copy()[::-1],
    "by columns": lambda a: a.swapaxes(-1, -2).copy().swapaxes(-1, -2) if a.ndim > 1 else a.copy(),
}
