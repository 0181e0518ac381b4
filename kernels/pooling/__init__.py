"""mean_pool: y[b] = mean of x[n] over cu_seqlens[b] <= n < cu_seqlens[b + 1]; zeros for an empty sequence.

Reimers and Gurevych, "Sentence-BERT" (2019), section 3. Shapes: x (N, C), cu_seqlens (B + 1,), y (B, C).
mean_pool_grad: dx[n] = g[b] / length of b, for the sequence b that row n is in; 0 for rows after the last one.
normalize: y = x / max(norm, eps), norm = sqrt(sum x x), over the last axis; keeps norm. Shapes: x (N, C), norm (N,).
normalize_grad: n = x / d, d = max(norm, eps): dx = (g - n sum g n) / d where norm > eps, else g / d.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minibert.kernels.array_module import numpy_module
from minibert.kernels.drawing import Drawing
from minibert.kernels.op import Array, BertSize, Op, Run, Sample

EPS = 1e-12  # as torch.nn.functional.normalize


def _shares(xp: Any, rows: Array, lengths: list[int]) -> Array:
    """Each row divided by the length of its sequence."""
    return xp.concatenate([rows[:0], *(rows[b : b + 1] / max(1, length) for b, length in enumerate(lengths))])


def _mean_pool(xp: Any, x: Array, cu_seqlens: Array) -> Array:
    lengths = np.diff(cu_seqlens.tolist())
    sequence = np.repeat(np.arange(len(lengths)), lengths)  # that each row is in
    y = _shares(xp, xp.segment_sum(x[: len(sequence)], sequence, len(lengths)), lengths.tolist())
    return y


def _mean_pool_grad(xp: Any, g: Array, cu_seqlens: Array, *, num_rows: int) -> Array:
    lengths = np.diff(cu_seqlens.tolist())
    sequence = np.repeat(np.arange(g.shape[0]), lengths)
    dx = xp.segment_sum(_shares(xp, g, lengths.tolist())[sequence], np.arange(len(sequence)), num_rows)
    return dx


def _normalize(xp: Any, x: Array, *, eps: float = EPS) -> tuple[Array, Array]:
    norm = xp.sqrt((x * x).sum(axis=-1))
    y = x / xp.maximum(norm, eps)[:, None]
    return y, norm


def _normalize_grad(xp: Any, g: Array, x: Array, norm: Array, *, eps: float = EPS) -> Array:
    d = xp.maximum(norm, eps)[:, None]
    n = x / d
    along = xp.where(norm > eps, (g * n).sum(axis=-1), 0.0)
    dx = (g - n * along[:, None]) / d
    return dx


def _kept(xp: Any, g: Array, x: Array, norm: Array, *, eps: float = EPS) -> dict[int, Array]:
    return {2: _normalize(xp, x)[1]}


def _mean_pool_vjp(run: Run, g: Array, outs: tuple[Array, ...], x: Array, cu_seqlens: Array) -> tuple[Any, ...]:
    return run(mean_pool_grad, g, cu_seqlens, num_rows=x.shape[0]), None


def _normalize_vjp(run: Run, g: Array, outs: tuple[Array, ...], x: Array, *, eps: float = EPS) -> tuple[Array]:
    return (run(normalize_grad, g, x, outs[1], eps=eps),)


def _packed() -> Iterator[tuple[np.ndarray, int]]:
    """Offsets of sequences, and columns: small, one token, in packs, unequal lengths with an empty one, one long."""
    for lengths, columns in [([3, 5], 7), ([1], 1), ([4, 12, 8], 16), ([1, 37, 0, 70, 9], 515), ([1031], 3)]:
        yield np.cumsum([0, *lengths]).astype(np.int32), columns


def _pool_samples(rng: np.random.Generator) -> Iterator[Sample]:
    for offset, (ends, columns) in enumerate(_packed()):
        yield Sample((rng.standard_normal((int(ends[-1]), columns)) + 100.0 * offset, ends))


def _pool_grad_samples(rng: np.random.Generator) -> Iterator[Sample]:
    for more, (ends, columns) in enumerate(_packed()):
        yield Sample((rng.standard_normal((len(ends) - 1, columns)), ends), {"num_rows": int(ends[-1]) + more})


def _draw_pool(draw: Drawing, batch: int = 300, length: int = 2053, columns: int = 2053) -> Sample:
    cu_seqlens = draw.offsets(batch, length)
    return Sample((draw.floats(int(cu_seqlens[-1]), columns), cu_seqlens))


def _draw_pool_grad(draw: Drawing, batch: int = 300, length: int = 2053, columns: int = 2053) -> Sample:
    cu_seqlens = draw.offsets(batch, length)
    num_rows = int(cu_seqlens[-1]) + draw.among(0, 3)
    return Sample((draw.floats(batch, columns), cu_seqlens), {"num_rows": num_rows})


def _draw_normalize(draw: Drawing, rows: int, columns: int) -> Sample:
    eps = draw.among(EPS, 0.7)  # the second is above the norm of some rows
    return Sample((draw.floats(rows, columns),), {"eps": eps})


def _draw_normalize_grad(draw: Drawing, rows: int, columns: int) -> Sample:
    eps = draw.among(1e-3, 0.7)  # of a row of zeros g / eps must be a number in 16 bits
    g, x = draw.floats(rows, columns), draw.floats(rows, columns)
    return Sample((g, x, _normalize(numpy_module, x)[1]), {"eps": eps})


def _cu_seqlens(size: BertSize) -> np.ndarray:
    return np.arange(0, size.tokens + 1, size.length, dtype=np.int32)


def _bench_pool(rng: np.random.Generator, size: BertSize) -> Sample:
    return Sample((rng.standard_normal((size.tokens, size.hidden)), _cu_seqlens(size)))


def _bench_pool_grad(rng: np.random.Generator, size: BertSize) -> Sample:
    g = rng.standard_normal((size.batch, size.hidden))
    return Sample((g, _cu_seqlens(size)), {"num_rows": size.tokens})


def _bench_normalize(rng: np.random.Generator, size: BertSize) -> Sample:
    return Sample((rng.standard_normal((size.predicted, size.hidden)),))


def _bench_normalize_grad(rng: np.random.Generator, size: BertSize) -> Sample:
    (x,), _ = _bench_normalize(rng, size)
    return Sample((rng.standard_normal(x.shape), x, _normalize(numpy_module, x)[1]))


mean_pool_grad = Op(
    "mean_pool_grad", _mean_pool_grad, samples=_pool_grad_samples, draw=_draw_pool_grad, bench=_bench_pool_grad
)
mean_pool = Op("mean_pool", _mean_pool, samples=_pool_samples, draw=_draw_pool, bench=_bench_pool, vjp=_mean_pool_vjp)
normalize_grad = Op(
    "normalize_grad", _normalize_grad, draw=_draw_normalize_grad, bench=_bench_normalize_grad, kept=_kept,
    wide_inputs=(2,),
)  # fmt: skip
normalize = Op(
    "normalize", _normalize, draw=_draw_normalize, bench=_bench_normalize, vjp=_normalize_vjp, wide_outputs=(1,)
)
