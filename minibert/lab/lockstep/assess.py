"""Results of one call of an op, judged beside each other, and how far they stand apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minibert.kernels.op import Op, holds_floats
from minibert.kernels.readings import Bound
from minibert.lab.conform.judge import Judgement, expect, judge_against, unit_in_last_place

JUDGED_PIECE = 1 << 20  # elements of a flat in-place op that are judged at a time: bounds take twenty times the memory
LEAST_BUCKET, MOST_BUCKET = -3, 24  # log2 of ulps: what is smaller or larger falls into the last


class Distance(NamedTuple):
    """How far B's arrays stand from A's: the largest difference, and the norm of all over the norm of A's."""

    largest: float
    relative: float


@dataclass
class Assessment:
    """One result of one call, judged; of a flat op that writes in place, piece by piece."""

    judgement: Judgement
    ulps: Counter[str] = field(default_factory=Counter)  # elements by error: "0", or "2^k" for up to 2^k ulp

    @property
    def wrong(self) -> bool:
        return not self.judgement.ok


def assess(
    op: Op, inputs: Sequence[np.ndarray], params: Mapping[str, Any], results: Sequence[Sequence[np.ndarray]],
    products: str = "float32",
) -> list[Assessment]:  # fmt: skip
    """Judge several results of one call. For an op that writes in place, `inputs` are from before the call."""
    dtype = next(x.dtype.name for x in inputs if holds_floats(x))
    found: list[Assessment] = []
    for start, cut in _pieces(op, inputs):
        with np.errstate(all="ignore"):
            expected = expect(op, [cut(x) for x in inputs], params, dtype, products)
            parts = [tuple(cut(r) for r in got) for got in results]
            judged = [Assessment(judge_against(expected, got), _ulps(expected, got)) for got in parts]
        found = [_joined(x, y, start) for x, y in zip(found, judged, strict=True)] if found else judged
    return found


def _pieces(op: Op, inputs: Sequence[np.ndarray]) -> Iterator[tuple[int, Callable[[np.ndarray], np.ndarray]]]:
    """The whole; of an op that writes flat arrays in place, pieces: where each begins, and what cuts it out."""
    size = max(x.size for x in inputs)
    flat = all(x.ndim == 1 for x in inputs if x.size == size)  # else rows belong to indices, and are not to be parted
    if not op.writes or not flat or size <= JUDGED_PIECE:
        yield 0, lambda x: x
        return
    for start in range(0, size, JUDGED_PIECE):
        piece = slice(start, start + JUDGED_PIECE)
        yield start, lambda x, piece=piece: x[piece] if x.ndim and x.size == size else x  # type: ignore[misc]


def _joined(whole: Assessment, piece: Assessment, start: int) -> Assessment:
    x, y = whole.judgement, piece.judgement
    joined = Judgement(
        max(x.ulp_max, y.ulp_max), max(x.err_over_us, y.err_over_us), max(x.bound_share, y.bound_share), x.ok and y.ok,
        _moved(y.worst, start) if x.worst is None or y.bound_share > x.bound_share else x.worst, x.problem or y.problem,
        x.unbounded + y.unbounded, max(x.likely_share, y.likely_share),
        _moved(y.poorest, start) if y.likely_share > x.likely_share else x.poorest,
    )  # fmt: skip
    return Assessment(joined, whole.ulps + piece.ulps)


def _moved(found: Any, start: int) -> Any:
    """An element of a piece that begins at `start`, as one of the whole."""
    return found and found._replace(place=(found.place[0] + start,))


def _ulps(expected: Sequence[Bound], got: Sequence[np.ndarray]) -> Counter[str]:
    """How many elements lie how far from the formula, in powers of two of a unit in the last place."""
    counts: Counter[str] = Counter()
    for b, result in zip(expected, got, strict=False):
        if result.shape != b.value.shape:
            continue
        ulps = np.abs(result.astype(np.float64) - b.value) / unit_in_last_place(b.value, b.dtype)
        finite = np.isfinite(ulps)
        exact = finite & (ulps == 0)
        counts["0"] += int(exact.sum())
        counts["not finite"] += int((~finite).sum())
        buckets = np.clip(np.ceil(np.log2(ulps[finite & ~exact])), LEAST_BUCKET, MOST_BUCKET).astype(int)
        counts.update({f"2^{k}": int(n) for k, n in zip(*np.unique(buckets, return_counts=True), strict=True)})
    return +counts


def known(arrays: Sequence[Any]) -> bool:
    """Whether none is missing."""
    return all(a is not None for a in arrays)


def distance(a: Sequence[Any], b: Sequence[Any]) -> Distance | None:
    """Over all arrays of floats together. None where one is not known, or shapes differ."""
    if not known(a) or not known(b) or len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return None
    largest = far = norm = 0.0
    for x, y in zip(a, b, strict=True):
        if not holds_floats(x) or not x.size:
            continue
        wide = x.astype(np.float64)
        with np.errstate(all="ignore"):
            apart = np.abs(y.astype(np.float64) - wide)
            largest = max(largest, float(apart.max()))
            far, norm = far + float((apart**2).sum()), norm + float((wide**2).sum())
    return Distance(largest, (far / norm) ** 0.5 if norm else np.inf if far else 0.0)
