"""How times grow with a size, and where one side overtakes another: what is read off `lab.measure.scaling`'s times.

Growth is t = k size^p. p is the slope of the least squares line through (log size, log t). Each round of a measurement
is one curve and gives one p: reported are their median and their 20th and 80th percentiles, and `misfit`, by how much
the line through the medians misses the worst of them. Costs that do not grow (launches; the update of the weights,
where the batch grows) bend the curve, and so does attention (length^2), so p belongs to the sizes measured;
`last_exponent`, between the last two alone, log(t2 / t1) / log(size2 / size1), tells what it tends to.

Where every cost is known to be constant or linear in the size, as in the batch, t = `fixed_seconds` + k size is fitted
as well, by least squares of relative errors; `fixed_seconds` is 0 where it would be negative.

A side overtakes another between two sizes at which each in turn is the faster: there is none where the times' p20-p80
meet. Between them log(t_a / t_b) is taken to be linear in log size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

Curve = Sequence[float | None]  # a figure for each size; None where there is none


def growth(sizes: Sequence[float], seconds: np.ndarray, linear: bool = False) -> dict[str, Any]:
    """What the docstring above says of `seconds` (R rounds, S sizes); all None where there are fewer than two sizes.

    `linear`: the costs are known to be constant or linear in the size.
    """
    names = ("exponent", "exponent_range", "last_exponent", "last_exponent_range", "misfit", "fixed_seconds")
    if len(sizes) < 2:
        return dict.fromkeys(names)
    x, y = np.log(np.asarray(sizes, float)), np.log(seconds)
    x_off = x - x.mean()
    every = y @ x_off / (x_off @ x_off)  # least squares slope of each round
    last = (y[:, -1] - y[:, -2]) / (x[-1] - x[-2])
    medians = np.log(np.median(seconds, axis=0))
    left = medians - medians.mean() - x_off * (medians @ x_off) / (x_off @ x_off)
    figures = (
        float(np.median(every)), np.percentile(every, [20, 80]).tolist(),
        float(np.median(last)), np.percentile(last, [20, 80]).tolist(),
        float(np.expm1(np.abs(left).max())), _fixed(sizes, np.median(seconds, axis=0)) if linear else None,
    )  # fmt: skip
    return dict(zip(names, figures, strict=True))


def _fixed(sizes: Sequence[float], seconds: np.ndarray) -> float:
    """a of t = a + k size: least squares of (a + k size) / t - 1."""
    relative = np.stack([1 / seconds, np.asarray(sizes, float) / seconds], axis=1)
    (fixed, _), *_ = np.linalg.lstsq(relative, np.ones(len(seconds)))
    return max(0.0, float(fixed))


def crossovers(
    sizes: Sequence[int], a: tuple[str, Curve, Curve, Curve], b: tuple[str, Curve, Curve, Curve], place: str
) -> list[dict[str, Any]]:
    """Where one of two sides overtakes the other, or one entry that says why it is nowhere.

    A side is its name and its median, p20 and p80 at each size; `place` is "a batch of {}". An entry has `slower` and
    `faster` (from there on; None where no size tells them apart), `size` (None if nowhere), `between` and `said`.
    """
    known = [i for i in range(len(sizes)) if None not in (*_at(a, i), *_at(b, i))]
    leads = {i: lead for i in known if (lead := _faster(_at(a, i), _at(b, i)))}  # 1: a is faster, -1: b
    if not leads:
        why = "cannot be told apart at any size measured" if known else "have no size that both were measured at"
        return [_entry(None, None, f"{a[0]} and {b[0]} {why}")]
    found = []
    for i, j in pairwise(leads):
        if leads[i] != leads[j]:
            faster, slower = (a[0], b[0]) if leads[j] > 0 else (b[0], a[0])
            size = _crossing(sizes, a[1], b[1], [k for k in known if i <= k <= j])
            said = f"{faster} overtakes {slower} at {place.format(f'{size:.3g}')}, between {sizes[i]} and {sizes[j]}"
            found.append({**_entry(slower, faster, said), "size": size, "between": [sizes[i], sizes[j]]})
    if found:
        return found
    faster, slower = (a[0], b[0]) if next(iter(leads.values())) > 0 else (b[0], a[0])
    told = ", ".join(str(sizes[i]) for i in leads)
    where = "every size measured" if len(leads) == len(known) else f"{told}; elsewhere the two cannot be told apart"
    return [_entry(slower, faster, f"{faster} is faster than {slower} at {where}")]


def _entry(slower: str | None, faster: str | None, said: str) -> dict[str, Any]:
    return {"slower": slower, "faster": faster, "size": None, "between": None, "said": said}


def _at(side: tuple[str, Curve, Curve, Curve], i: int) -> tuple[Any, Any, Any]:
    _, middle, low, high = side
    return middle[i], low[i], high[i]


def _faster(a: tuple[float, float, float], b: tuple[float, float, float]) -> int:
    """1 if a is faster beyond the noise, -1 if b is, 0 if their p20-p80 meet."""
    return int(a[2] < b[1]) - int(b[2] < a[1])


def _crossing(sizes: Sequence[int], a: Curve, b: Curve, between: list[int]) -> float:
    """The size at which the medians are equal: the first change of sign of log(t_a / t_b) on these sizes."""
    x = np.log([sizes[k] for k in between])
    ratio = np.log([a[k] for k in between]) - np.log([b[k] for k in between])  # type: ignore[arg-type]
    k = next(k for k in range(len(x) - 1) if ratio[k] * ratio[k + 1] <= 0)
    share = ratio[k] / (ratio[k] - ratio[k + 1]) if ratio[k] != ratio[k + 1] else 0.0
    return float(np.exp(x[k] + share * (x[k + 1] - x[k])))
