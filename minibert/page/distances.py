"""The figures of how far apart results are: losses, shares of the error bound, and histograms of single elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from minibert.page.facts import Contestant, Facts, OpRow
from minibert.page.figures import DASHES, MARKERS, SHOWN, WIDTH, colour, label, make_room
from minibert.page.svg import TOKENS, Drawing, Tips, inline, new_figure
from minibert.page.wording import brief, percent, power_of_ten, power_of_two, significant

LEAST_ULP, MOST_ULP = -3, 24  # as minibert.lab.lockstep.assess counts them
FARTHEST = 3.0  # bounds that the figure of them shows: an error beyond is cut off there, and said
LEAST_SHARE = 1e-6  # of an op's elements: the foot of the histograms


def losses(facts: Facts, name: str = "losses") -> Drawing | None:
    """Loss curves on top of each other and, below, their relative distance from the reference's."""
    curves = {b: facts.losses[b.name] for b in facts.backends if b.name in facts.losses}
    if not curves:
        return None
    reference, *others = curves
    tips = Tips()
    figure = new_figure(WIDTH, 330.0 if others else 190.0)
    upper, *lower = figure.subplots(2 if others else 1, 1, sharex=True, squeeze=False)[:, 0]
    for backend, values in curves.items():
        steps = range(1, len(values) + 1)
        gid = tips.gid(f"{backend.name}: {_loss_words(values)}", backend.colour)
        first = backend is reference and bool(others)
        upper.plot(
            steps, [math.nan if v is None else v for v in values], gid=gid, color=colour(backend),
            linewidth=6 if first else 1.6, alpha=0.4 if first else 1, solid_capstyle="round",
            linestyle="-" if first else DASHES[backend.colour],
            marker=MARKERS[backend.colour], markersize=7 if first else 4, markeredgewidth=0,
        )  # fmt: skip
    upper.set_ylabel("loss")
    upper.grid(axis="y")
    for axes in lower:
        _loss_distances(axes, others, curves, facts, tips)
    (lower or [upper])[-1].set_xlabel("training step")
    (lower or [upper])[-1].xaxis.get_major_locator().set_params(integer=True)
    said = "; ".join(f"{b.name}: {_loss_words(values)}" for b, values in curves.items())
    caption = "Above, the curves lie on each other" if others else "Loss of each step"
    caption += f"; below, how far each is from {reference.name} (relative, log scale)." if others else "."
    title = "Loss after each step"
    return Drawing(name, title, inline(figure, name, title, said, tips), caption)


def _loss_words(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"from {significant(known[0], 5)} to {significant(known[-1], 5)}" if known else "not finite"


def _loss_distances(
    axes: Any, others: Sequence[Contestant], curves: dict[Contestant, list[float | None]], facts: Facts, tips: Tips
) -> None:
    reference = next(iter(curves.values()))
    apart = {
        b: [
            (step, abs(x - y) / abs(y))
            for step, (x, y) in enumerate(zip(curves[b], reference, strict=False), start=1)
            if x is not None and y
        ]
        for b in others
    }
    seen = [d for points in apart.values() for _, d in points if d > 0]
    foot = 10.0 ** (math.floor(math.log10(min(seen))) - 1) if seen else 1e-8
    for backend, points in apart.items():
        for step, distance in points:
            said = f"{backend.name}, step {step}: " + (f"{significant(distance, 2)} apart" if distance else "equal")
            gid = tips.gid(said, backend.colour)
            axes.plot(
                [step], [distance or foot], gid=gid, color=colour(backend), marker=MARKERS[backend.colour],
                markersize=6, markerfacecolor=colour(backend) if distance else TOKENS["paper"],
            )  # fmt: skip
        axes.plot(
            [s for s, _ in points], [d or foot for _, d in points], color=colour(backend), linewidth=1, alpha=0.6,
            linestyle=DASHES[backend.colour], zorder=1.5,
        )  # fmt: skip
    axes.set_yscale("log")
    top = 10.0 ** (math.ceil(math.log10(max(seen))) + 0.3) if seen else 1e-6
    powers = range(round(math.log10(foot)) + 1, math.ceil(math.log10(top)) + 1)
    ticks = [p for p in powers if 10.0**p <= top]
    ticks = ticks[:: max(1, math.ceil(len(ticks) / 4))]
    axes.set_yticks([foot, *(10.0**p for p in ticks)], ["equal", *map(power_of_ten, ticks)], minor=False)
    axes.set_ylim(foot / 2.5, top)
    axes.grid(axis="y")
    axes.set_ylabel("relative distance")


def nearest_to_bound(facts: Facts, name: str = "bounds") -> Drawing | None:
    """The ops that use up most of their error bound, each on the backend where it is worst."""
    worst: dict[str, OpRow] = {}
    for row in sorted(facts.ops, key=lambda row: -row.severity):
        worst.setdefault(row.op, row)
    shown = list(worst.values())[:SHOWN]
    if not shown:
        return None
    owners, tips, said, labels = {b.name: b for b in facts.backends}, Tips(), [], []
    figure = new_figure(WIDTH, 40 + 37.0 * len(shown))
    axes = figure.subplots()
    end = min(FARTHEST, max(1.0, *(row.severity for row in shown)))
    for at, row in enumerate(shown):
        share, owner = row.severity, owners[row.backend]
        far = percent(share) if math.isfinite(share) else "not finite"
        words = f"{row.op} on {row.backend}: {far} of its bound, {significant(row.err_over_us)} uS"
        ink = colour(owner) if row.ok else TOKENS["bad"]
        axes.barh(at, min(share, end), 0.42, color=ink).patches[0].set_gid(tips.gid(words, owner.colour))
        axes.text(0, at - 0.27, brief(f"{row.op}, {row.backend}"), va="bottom", color=TOKENS["text"])
        labels.append(label(axes, end, at, far))
        said.append(words)
    axes.axvline(1, color=TOKENS["text"], linewidth=1, linestyle=(0, (2, 2)))
    axes.set_ylim(len(shown) - 0.6, -0.9)
    axes.set_yticks([])
    axes.set_xticks([0, 0.5, 1], ["0", "50%", "bound"])
    axes.spines[["left", "bottom"]].set_visible(False)
    make_room(figure, axes, labels)
    title = "Nearest to their error bound"
    text = inline(figure, name, title, "; ".join(said), tips)
    return Drawing(name, title, text, "Largest error of any element over what the formula allows it.")


def ulp_histograms(facts: Facts) -> list[Drawing]:
    """For each op, the share of elements at each distance from the formula in float64, in units of the last place."""
    by_op: dict[str, list[tuple[Contestant, OpRow]]] = {}
    for row in facts.ops:
        owner = next((b for b in facts.backends if b.name == row.backend), None)
        if row.ulps and owner is not None:
            by_op.setdefault(row.op, []).append((owner, row))
    return [_ulp_histogram(f"ulp{i}", op, sides) for i, (op, sides) in enumerate(by_op.items())]


def _ulp_histogram(name: str, op: str, sides: Sequence[tuple[Contestant, OpRow]]) -> Drawing:
    tips, said = Tips(), []
    figure = new_figure(164.0, 106.0)
    axes = figure.subplots()
    powers = list(range(LEAST_ULP, MOST_ULP + 1))
    edges = [LEAST_ULP - 2.0, LEAST_ULP - 1.0, *map(float, powers)]  # the first bar: exact
    for backend, row in sides:
        total = sum(row.ulps.values())
        heights = [row.ulps.get("0", 0.0) / total, *(row.ulps.get(f"2^{p}", 0.0) / total for p in powers)]
        last = max((i for i, h in enumerate(heights) if h), default=0)
        shown = [max(h, LEAST_SHARE) for h in heights[: last + 1]]
        exact, largest = heights[0], max((p for p, h in zip(powers, heights[1:], strict=True) if h), default=None)
        words = f"{backend.name}: {percent(exact)} exact" + (
            "" if largest is None else f", the rest within {power_of_two(largest)} ulp"
        )
        broken = row.ulps.get("not finite", 0.0)
        words += f", {broken:.0f} not finite" if broken else ""
        reference = backend is sides[0][0]
        axes.stairs(
            shown, edges[: last + 2], baseline=LEAST_SHARE, fill=reference, color=colour(backend),
            alpha=0.35 if reference else 1, linewidth=1.3, gid=tips.gid(words, backend.colour),
        )  # fmt: skip
        said.append(words)
    axes.set_yscale("log")
    axes.set_ylim(LEAST_SHARE, 1.6)
    axes.set_yticks([1, 1e-3, LEAST_SHARE], ["100%", "0.1%", ""], minor=False)
    axes.set_xlim(LEAST_ULP - 2.4, MOST_ULP + 0.4)
    axes.set_xticks([LEAST_ULP - 1.5, 0, 12, 24], ["0", "1", power_of_two(12), power_of_two(24)])
    axes.tick_params(labelsize=11.8, pad=2)
    axes.grid(axis="y")
    return Drawing(name, op, inline(figure, name, f"Errors of {op} in ulp", "; ".join(said), tips), op)
