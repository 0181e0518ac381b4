"""Losses against targets that are numbers, the mean over elements (0 where there are none); each keeps its gradients.

binary_cross_entropy: loss = mean of max(z, 0) - z t + log(1 + exp(-|z|)), which is -t log p - (1 - t) log(1 - p) with
p = 1 / (1 + exp(-z)), and never overflows; as torch's BCEWithLogitsLoss. Keeps dlogits = (p - t) / count and dtargets =
-z / count. An element whose target is `IGNORED` (-100, no probability) counts for nothing: its gradients are 0.
mse_loss: loss = mean of (x - t)^2; keeps dpredictions = 2 (x - t) / count. Every number is a target.
Shapes: z, x and t alike; loss ().
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from minibert.kernels.drawing import IGNORED, Drawing
from minibert.kernels.elementwise import mul, scale
from minibert.kernels.op import Array, BertSize, Op, Run, Sample


def _binary_cross_entropy(xp: Any, logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    kept = targets != IGNORED
    count = max(1, int(kept.sum()))
    e = xp.exp(-xp.maximum(logits, -logits))
    losses = xp.maximum(logits, 0.0) - logits * targets + xp.log(1 + e)
    p = xp.where(logits >= 0, 1.0, e) / (1 + e)
    loss = xp.where(kept, losses, 0.0).sum() / count
    dlogits = xp.where(kept, p - targets, 0.0) / count
    dtargets = xp.where(kept, -logits, 0.0) / count
    return loss, dlogits, dtargets


def _mse_loss(xp: Any, predictions: Array, targets: Array) -> tuple[Array, Array]:
    apart, count = predictions - targets, max(1, predictions.size)
    loss = (apart * apart).sum() / count
    dpredictions = 2 * apart / count
    return loss, dpredictions


def _bce_vjp(run: Run, g: Array, outs: tuple[Array, ...], logits: Array, targets: Array) -> tuple[Array, Array]:
    return run(mul, outs[1], g), run(mul, outs[2], g)


def _mse_vjp(run: Run, g: Array, outs: tuple[Array, ...], predictions: Array, targets: Array) -> tuple[Array, Array]:
    dx = run(mul, outs[1], g)
    return dx, run(scale, dx, factor=-1.0)


def _ignoring(draw: Drawing, targets: np.ndarray) -> np.ndarray:
    """No target ignored, some rows, all, all rows but one; or some elements."""
    if draw.among(True, False):
        return np.where((draw.labels(len(targets), 2) == IGNORED)[:, None], IGNORED, targets)
    return np.where(draw.flags(*targets.shape), targets, IGNORED)


def _probabilities(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Two of three are 0 or 1."""
    return np.clip(rng.uniform(-1, 2, shape), 0, 1)


def _draw_bce(draw: Drawing, rows: int, columns: int) -> Sample:
    return Sample((draw.floats(rows, columns), _ignoring(draw, _probabilities(draw.rng, rows, columns))))


def _draw_mse(draw: Drawing, rows: int, columns: int) -> Sample:
    return Sample((draw.floats(rows, columns), draw.floats(rows, columns)))


def _bench(targets: Callable[..., np.ndarray], rng: np.random.Generator, size: BertSize) -> Sample:
    shape = size.batch, size.hidden
    return Sample((rng.standard_normal(shape), targets(rng, *shape)))


# Targets are given, not computed: rounding them to 16 bits would change what is asked for.
binary_cross_entropy = Op(
    "binary_cross_entropy", _binary_cross_entropy, draw=_draw_bce, bench=partial(_bench, _probabilities), vjp=_bce_vjp,
    wide_inputs=(1,), wide_outputs=(0,),
)  # fmt: skip
mse_loss = Op(
    "mse_loss", _mse_loss, draw=_draw_mse, vjp=_mse_vjp, wide_inputs=(1,), wide_outputs=(0,),
    bench=partial(_bench, lambda rng, *shape: rng.standard_normal(shape)),
)  # fmt: skip
