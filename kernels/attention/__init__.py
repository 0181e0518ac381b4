"""attention: y = dropout(softmax(q k' / sqrt D)) v, per sequence and head, on packed tokens; keeps lse, log sum exp.

Vaswani et al., "Attention is all you need" (2017), equation 1, for sequences of any lengths laid one after the other:
qkv (N, 3C) holds q, k and v of every token, sequence b is rows cu_seqlens[b] .. cu_seqlens[b + 1], D = C / heads. The
score of query n and key j (counted in its sequence) in head h draws element ((n heads) + h) width + j of `stream`,
width the longest length rounded up to a multiple of 4. Shapes: y (N, C), lse (N, heads).

attention_grad: p = exp(q k' / sqrt D - lse), dv = dropout(p)' g, ds = p (dropout(g v') - sum g y) / sqrt D,
dq = ds k, dk = ds' q (Dao et al., "FlashAttention" (2022), appendix B.4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from minibert.kernels.array_module import numpy_module
from minibert.kernels.drawing import Drawing
from minibert.kernels.op import Array, BertSize, Op, Run, Sample
from minibert.kernels.philox import NO_STREAM, Stream, random_words, threshold

MANY_TOKENS = ({"batch": 1400, "length": 47, "heads": 1, "head_size": 1},)  # more than 16 bits count


class Span(NamedTuple):
    """One sequence: rows first .. last of the packed tokens."""

    first: int
    last: int


def spans(cu_seqlens: Array) -> list[Span]:
    ends = cu_seqlens.tolist()
    return [Span(a, b) for a, b in pairwise(ends) if b > a]


def mask_width(cu_seqlens: Array, stream: Stream | tuple[int, ...] = NO_STREAM) -> int:
    """How many random words one query and head owns, in the whole where this is a part of a batch."""
    return max(-(-max((b - a for a, b in spans(cu_seqlens)), default=0) // 4) * 4, getattr(stream, "width", 0))


def _split(x: Array, span: Span, heads: int) -> Array:
    """Rows (N, C) -> (H, t, D) of one sequence."""
    t = span.last - span.first
    return x[span.first : span.last].reshape(t, heads, x.shape[1] // heads).swapaxes(0, 1)


def _merge(x: Array) -> Array:
    """(H, t, D) -> (t, C)."""
    return x.swapaxes(0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2])


def _dropout(xp: Any, span: Span, heads: int, width: int, rate: float, stream: Stream) -> Callable[[Array], Array]:
    """What drops from (H, t, t) scores of one sequence, the same ones each time."""
    if rate == 0:
        return lambda p: p
    t = span.last - span.first
    words = random_words(stream, t * heads * width, xp, start=span.first * heads * width)
    keep = (words >= xp.uint32(threshold(rate))).reshape(t, heads, width)[:, :, :t].swapaxes(0, 1)
    return lambda p: xp.where(keep, p * (1 / (1 - rate)), 0.0)


def _parts(qkv: Array, span: Span, heads: int) -> tuple[Array, Array, Array]:
    c = qkv.shape[1] // 3
    return tuple(_split(qkv[:, i * c : (i + 1) * c], span, heads) for i in range(3))


def _attention(
    xp: Any, qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM
) -> tuple[Array, Array]:
    width, ys, lses = mask_width(cu_seqlens, stream), [], []
    for span in spans(cu_seqlens):
        q, k, v = _parts(qkv, span, num_heads)
        scores = q @ k.swapaxes(1, 2) * q.shape[2] ** -0.5
        top = scores.max(axis=-1, keepdims=True)
        e = xp.exp(scores - top)
        total = e.sum(axis=-1, keepdims=True)
        ys.append(_merge(xp.stored(_dropout(xp, span, num_heads, width, rate, stream)(e / total)) @ v))
        lses.append((top + xp.log(total))[:, :, 0].swapaxes(0, 1))
    y, lse = xp.concatenate(ys), xp.concatenate(lses)
    return y, lse


def _attention_grad(
    xp: Any, g: Array, qkv: Array, y: Array, lse: Array, cu_seqlens: Array,
    *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM,
) -> Array:  # fmt: skip
    width, rows = mask_width(cu_seqlens, stream), []
    for span in spans(cu_seqlens):
        q, k, v = _parts(qkv, span, num_heads)
        gy, ys = _split(g, span, num_heads), _split(y, span, num_heads)
        scale, dropped = q.shape[2] ** -0.5, _dropout(xp, span, num_heads, width, rate, stream)
        p = xp.exp(q @ k.swapaxes(1, 2) * scale - lse[span.first : span.last].swapaxes(0, 1)[:, :, None])
        dv = xp.stored(dropped(p)).swapaxes(1, 2) @ gy
        dp = dropped(gy @ v.swapaxes(1, 2))
        ds = xp.stored(p * (dp - (gy * ys).sum(axis=-1, keepdims=True)) * scale)
        rows.append(xp.concatenate([_merge(ds @ k), _merge(ds.swapaxes(1, 2) @ q), _merge(dv)], axis=1))
    dqkv = xp.concatenate(rows)
    return dqkv


def _kept(
    xp: Any, g: Array, qkv: Array, y: Array, lse: Array, cu_seqlens: Array, **params: Any
) -> dict[int, Array]:  # fmt: skip
    return dict(zip((2, 3), _attention(xp, qkv, cu_seqlens, **params), strict=True))


def _attention_vjp(
    run: Run, g: Array, outs: tuple[Array, ...], qkv: Array, cu_seqlens: Array, **params: Any
) -> tuple[Any, ...]:
    return run(attention_grad, g, qkv, *outs, cu_seqlens, **params), None


def _packed(
    rng: np.random.Generator, lengths: list[int], heads: int, head_size: int, scale: float
) -> tuple[np.ndarray, ...]:
    cu_seqlens = np.cumsum([0, *lengths]).astype(np.int32)
    return rng.standard_normal((int(cu_seqlens[-1]), 3 * heads * head_size)) * scale, cu_seqlens


def _samples(rng: np.random.Generator) -> Iterator[Sample]:
    stream = Stream(5, 18, 2, 1)
    for lengths, heads, head_size, rate, size in [
        ([3, 5], 2, 4, 0.0, 1.0),
        ([1], 1, 1, 0.0, 1.0),
        ([1, 37, 0, 70, 9], 3, 32, 0.1, 1.0),  # unequal lengths, one of a single token, one empty
        ([130, 65], 1, 64, 0.0, 1.0),
        ([12, 7], 2, 16, 0.5, 5.0),  # sharp: most probabilities vanish
        ([40, 33], 1, 100, 0.2, 1.0),
    ]:
        yield Sample(
            _packed(rng, lengths, heads, head_size, size), {"num_heads": heads, "rate": rate, "stream": stream}
        )


def _draw(draw: Drawing, batch: int = 9, length: int = 530, heads: int = 17, head_size: int = 128) -> Sample:
    cu_seqlens = draw.offsets(batch, length)
    q, k, v = (draw.floats(int(cu_seqlens[-1]), heads * head_size) for _ in range(3))
    qkv = np.concatenate([np.clip(q, -30, 30), k, v], axis=1)  # scores so large that they lose all digits say nothing
    return Sample((qkv, cu_seqlens), {"num_heads": heads, "rate": draw.among(0.0, 0.5, 0.1), "stream": draw.stream()})


def _draw_gradient(
    draw: Drawing, batch: int = 9, length: int = 530, heads: int = 17, head_size: int = 128
) -> Sample:  # fmt: skip
    sample = _draw(draw, batch, length, heads, head_size)
    (qkv, cu_seqlens), params = sample
    y, lse = _attention(numpy_module, qkv, cu_seqlens, **params)
    return Sample((draw.floats(*y.shape), qkv, y, lse, cu_seqlens), params)


def _with_gradient(rng: np.random.Generator, sample: Sample) -> Sample:
    (qkv, cu_seqlens), params = sample
    y, lse = _attention(numpy_module, qkv, cu_seqlens, **params)
    return Sample((rng.standard_normal(y.shape), qkv, y, lse, cu_seqlens), params)


def _bench(rng: np.random.Generator, size: BertSize) -> Sample:
    arrays = _packed(rng, [size.length] * size.batch, size.heads, size.hidden // size.heads, 1.0)
    return Sample(arrays, {"num_heads": size.heads, "rate": 0.1, "stream": Stream(1, 18, 1, 1)})


attention_grad = Op(
    "attention_grad",
    _attention_grad,
    samples=lambda rng: (_with_gradient(rng, sample) for sample in _samples(rng)),
    bench=lambda rng, size: _with_gradient(rng, _bench(rng, size)),
    kept=_kept,
    draw=_draw_gradient,
    sizes=({**MANY_TOKENS[0], "batch": 700},),
    wide_inputs=(3,),
)
attention = Op(
    "attention", _attention, samples=_samples, bench=_bench, draw=_draw, sizes=MANY_TOKENS, vjp=_attention_vjp,
    wide_outputs=(1,),
)  # fmt: skip
