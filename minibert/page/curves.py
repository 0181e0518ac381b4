"""The figures on log-log axes: the roofline, and time against size with the crossings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from minibert.page.facts import Contestant, Facts, OpRow, colours, listed, mapping, number, numbers, rows
from minibert.page.figures import DASHES, MARKERS, WIDTH, colour
from minibert.page.svg import TOKENS, Drawing, Tips, inline, new_figure
from minibert.page.wording import brief, milliseconds, percent, power_of_ten, significant

WIDE = 730.0  # two columns of a desk
LABELLED = {WIDTH: 4, WIDE: 9}  # ops that are named in the roofline of that width
SIDES = ((9, 0, "left", "center"), (-9, 0, "right", "center"), (0, -9, "center", "top"), (0, 9, "center", "bottom"))
LEAST_SHARE = 0.0005  # of a step: ops that take less are in the table alone
WORDS = {"batch": "batch", "length": "sequence length", "hidden": "width", "threads": "threads"}


def plain_ticks(axis: Any, low: float, high: float) -> None:
    """Powers of ten between two values, in words; a small range gets 1, 2 and 5 as well."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 60 else (1,)
    ticks = [step * 10.0**p for p in powers for step in steps if low <= step * 10.0**p <= high]
    axis.set_ticks(ticks, [_tick(t) for t in ticks])
    axis.set_ticks([], minor=True)


def _tick(value: float) -> str:
    power = round(math.log10(value))
    return power_of_ten(power) if not 1e-3 <= value < 1e4 else significant(value, 1)


# ----------------------------------------------------------------------------------------------------------- roofline


def roofline(facts: Facts, width: float = WIDTH) -> Drawing | None:
    """Every op with arithmetic: GFLOP/s against flops per byte, under the ceilings that were measured."""
    points = [
        (owner, row, row.flops / row.bytes, row.gflops)
        for row in facts.ops
        for owner in facts.timed
        if owner.name == row.backend and row.flops and row.bytes and row.gflops and (row.share or 0) >= LEAST_SHARE
    ]
    if not points:
        return None
    name = f"roofline{width:.0f}"
    tips = Tips()
    figure = new_figure(width, 330.0)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    roofs = _distinct_roofs(facts)
    tops = [roof for _, peaks in roofs for roof in _heights(peaks)]
    left, right = min(p[2] for p in points) / 2.5, max(p[2] for p in points) * 2.5
    low, high = min(p[3] for p in points) / 2, max([p[3] for p in points] + tops) * 2.6
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    for owner, peaks in roofs:
        _draw_roof(axes, owner, peaks, left, right, low)
    above = any((row.limit_share or 0.0) > 1 for _, row, _, _ in points)
    biggest = max((row.share or 0.0) for _, row, _, _ in points) or 1.0
    for owner, row, intensity, rate in points:
        near = "" if row.limit_share is None else f"; {percent(row.limit_share)} of what {row.limit} allows"
        near += f" ({row.note})" if row.note else ""
        said = f"{row.op} on {owner.name}: {significant(rate)} GFLOP/s, {significant(intensity)} flops a byte{near}"
        hollow = (row.limit_share or 0.0) > 1
        size = 5 + 8 * math.sqrt((row.share or 0.0) / biggest)
        axes.plot(
            [intensity], [rate], marker=MARKERS[owner.colour], markersize=size, color=colour(owner), alpha=0.78,
            markerfacecolor="none" if hollow else colour(owner), linestyle="none",
            markeredgecolor=colour(owner) if hollow else TOKENS["paper"], markeredgewidth=1.3 if hollow else 0.7,
            gid=tips.gid(said, owner.colour),
        )  # fmt: skip
    plain_ticks(axes.xaxis, left, right)
    plain_ticks(axes.yaxis, low, high)
    axes.grid()
    axes.set_xlabel("flops per byte")
    axes.set_ylabel("GFLOP/s")
    _name_the_largest(figure, axes, points, LABELLED.get(width, 4))
    said = "; ".join(f"{row.op} on {owner.name} {significant(rate)} GFLOP/s" for owner, row, _, rate in points)
    caption = (
        "A point is an op; its size is its share of the step. Lines: the machine's measured bandwidth, its best "
        "matrix product, its multiply-adds in registers. "
        f"{'Hollow: faster than its limit, the table says why. ' if above else ''}"
        f"Ops below {LEAST_SHARE * 100:g}% of a step are in the table alone."
    )
    return Drawing(name, "Roofline", inline(figure, name, "Roofline", said, tips), caption)


def _distinct_roofs(facts: Facts) -> list[tuple[Contestant | None, Mapping[str, Any]]]:
    """The ceilings of each backend, or those of all where they share a machine."""
    given = [(b, facts.peaks[b.name]) for b in facts.timed if b.name in facts.peaks]
    heights = {(tuple(_heights(peaks)), _bandwidth(peaks)) for _, peaks in given}
    return [(None, given[0][1])] if len(heights) == 1 else [*given]


def _heights(peaks: Mapping[str, Any]) -> list[float]:
    return [x for key in ("gflops", "fma_gflops") if (x := number(peaks.get(key)))]


def _bandwidth(peaks: Mapping[str, Any]) -> float:
    return max((x for key in ("triad_gbps", "fill_gbps") if (x := number(peaks.get(key)))), default=0.0)


def _draw_roof(
    axes: Any, owner: Contestant | None, peaks: Mapping[str, Any], left: float, right: float, low: float
) -> None:
    ink = TOKENS["muted"] if owner is None else colour(owner)
    whose = "" if owner is None else f"{brief(owner.name)} "
    slope, heights = _bandwidth(peaks), _heights(peaks)
    top = max(heights, default=math.inf)
    words = []
    for key, word, dashes in (("fma_gflops", "multiply-add", (0, (4, 2))), ("gflops", "product", "-")):
        height = number(peaks.get(key))
        if height:
            begins = max(left, height / slope) if slope else left
            axes.plot([begins, right], [height, height], color=ink, linewidth=1.2, linestyle=dashes)
            words.append(f"{word} {significant(height)}")
    axes.annotate(
        whose + ", ".join(words), (right, top if words else 1), xytext=(-2, 3), textcoords="offset points", color=ink,
        ha="right", va="bottom",
    )  # fmt: skip
    if slope:
        end, begins = min(right, top / slope), max(left * 1.15, low / slope * 1.3)
        axes.plot([left, end], [slope * left, slope * end], color=ink, linewidth=1.2)
        axes.annotate(
            f"{whose}memory {significant(slope)} GB/s", (begins, slope * begins), xytext=(0, 4),
            textcoords="offset points", rotation=45, rotation_mode="anchor", transform_rotates_text=True,
            color=ink, va="bottom",
        )  # fmt: skip


def _name_the_largest(
    figure: Any, axes: Any, points: Sequence[tuple[Contestant, OpRow, float, float]], most: int
) -> None:
    """Write the names of the ops that take longest, where they hide nothing."""
    figure.canvas.draw()  # places are known only now
    renderer = figure.canvas.get_renderer()
    taken = [t.get_window_extent(renderer) for t in axes.texts]
    frame = axes.get_window_extent(renderer)
    dots = [axes.transData.transform((x, y)) for _, _, x, y in points]
    named = 0
    for owner, row, x, y in sorted(points, key=lambda p: p[1].ms or 0.0, reverse=True):
        if named == most:
            return
        for dx, dy, across, up in SIDES:
            label = axes.annotate(
                brief(row.op),
                (x, y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=across,
                va=up,
                color=colour(owner),
            )
            box = label.get_window_extent(renderer)
            hidden = any(box.padded(2).overlaps(other) for other in taken) or any(
                box.padded(4).contains(*d) for d in dots
            )
            if not hidden and frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1:
                taken.append(box)
                named += 1
                break
            label.remove()


# ------------------------------------------------------------------------------------------------------ time and size


def crossovers(
    scaling: Mapping[str, Any],
    hidden: Iterable[str] = (),
    inks: Mapping[str, int] | None = None,
    prefix: str = "scaling",
) -> list[Drawing]:
    """Time against each size that was varied, a curve for each backend; where one overtakes another there is a ring.

    `hidden` play another machine; `inks` are the colours that backends have on the page.
    """
    drawn = [
        _crossover(f"{prefix}-{i}", axis, mapping(found), set(hidden), inks or {})
        for i, (axis, found) in enumerate(mapping(scaling.get("axes")).items())
    ]
    return [d for d in drawn if d is not None]


def _crossover(
    name: str, axis: str, found: Mapping[str, Any], hidden: set[str], inks: Mapping[str, int]
) -> Drawing | None:
    sizes, unit = [s for s in numbers(found.get("sizes")) if s > 0], str(found.get("unit", ""))
    given = mapping(found.get("backends"))
    places = {**colours(list(given)), **inks}
    curves = {
        Contestant(who, "", places[who], False): mapping(curve)
        for who, curve in given.items()
        if who not in hidden and _points(mapping(curve), sizes)
    }
    if len(sizes) < 2 or not curves:
        return None
    tips, said = Tips(), []
    figure = new_figure(WIDTH, 232.0)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    for backend, curve in curves.items():
        _time_curve(axes, backend, _points(curve, sizes), unit, tips)
        exponent = number(curve.get("exponent"))
        if exponent is not None:
            span = numbers(curve.get("exponent_range"))
            between = f" ({span[0]:.2f} to {span[1]:.2f})" if len(span) == 2 else ""
            said.append(f"{exponent:.2f}{between} on {backend.name}")
    crossed = [
        row for row in rows(found.get("crossovers")) if not {str(row.get("slower")), str(row.get("faster"))} & hidden
    ]
    for row in crossed:
        _ring(axes, row, sizes, curves, tips)
    axes.set_xlim(sizes[0] / 1.15, sizes[-1] * 1.15)
    axes.set_xticks(sizes, [f"{s:g}" for s in sizes])
    axes.set_xticks([], minor=True)
    low, high = axes.get_ylim()
    steps = (1, 2, 5) if high / low < 100 else (1,)
    ticks = [t for p in range(-7, 4) for step in steps if low <= (t := step * 10.0**p) <= high]
    axes.set_yticks(ticks, [milliseconds(t * 1e3, digits=1) for t in ticks])
    axes.set_yticks([], minor=True)
    axes.grid()
    varied = WORDS.get(axis, axis)
    axes.set_xlabel(brief(f"{varied} ({unit})" if unit not in ("", varied) else varied))
    words = [f"{row['said']}." for row in crossed if row.get("said")]
    words += [f"Time goes with the power {', '.join(said)}."] if said else []
    caption = " ".join(words)
    title = f"Time against {varied}"
    return Drawing(name, title, inline(figure, name, title, caption, tips), caption)


class Point(NamedTuple):
    """The time at one size, and how far it spread."""

    size: float
    seconds: float
    least: float
    most: float


def _points(curve: Mapping[str, Any], sizes: Sequence[float]) -> list[Point]:
    """What was measured: a time that cannot be, because it would exceed the machine's peak, is none."""
    found = []
    columns = [listed(curve.get(key)) for key in ("seconds", "p20", "p80")]
    for size, given, least, most in zip_longest(sizes, *columns):
        seconds = number(given)
        if size is not None and seconds:
            found.append(Point(size, seconds, number(least) or seconds, number(most) or seconds))
    return found


def _time_curve(axes: Any, backend: Contestant, points: Sequence[Point], unit: str, tips: Tips) -> None:
    sizes = [p.size for p in points]
    axes.fill_between(
        sizes, [p.least for p in points], [p.most for p in points], color=colour(backend), alpha=0.18, linewidth=0
    )
    axes.plot(
        sizes, [p.seconds for p in points], color=colour(backend), linestyle=DASHES[backend.colour], linewidth=1.6
    )
    for p in points:
        said = f"{backend.name}, {p.size:g} {unit}: {milliseconds(p.seconds * 1e3)}"
        gid = tips.gid(said, backend.colour)
        axes.plot([p.size], [p.seconds], color=colour(backend), marker=MARKERS[backend.colour], markersize=5.5, gid=gid)


def _ring(
    axes: Any, row: Mapping[str, Any], sizes: list[float], curves: Mapping[Contestant, Mapping[str, Any]], tips: Tips
) -> None:
    at = number(row.get("size"))
    points = next((_points(c, sizes) for b, c in curves.items() if b.name == row.get("faster")), [])
    i = next((i for i in range(1, len(points)) if at and points[i - 1].size <= at <= points[i].size), None)
    if at is None or i is None:
        return
    left, right = points[i - 1], points[i]
    part = math.log(at / left.size) / math.log(right.size / left.size)
    height = left.seconds ** (1 - part) * right.seconds**part  # a straight line on these axes
    axes.axvline(at, color=TOKENS["text"], linewidth=0.9, linestyle=(0, (2, 2)))
    axes.plot(
        [at], [height], marker="o", markersize=13, markerfacecolor="none", markeredgecolor=TOKENS["text"],
        markeredgewidth=1.4, gid=tips.gid(str(row.get("said", ""))),
    )  # fmt: skip
    axes.annotate(significant(at, 2), (at, 1), xycoords=("data", "axes fraction"), xytext=(4, -2),
                  textcoords="offset points", va="top", color=TOKENS["text"])  # fmt: skip
