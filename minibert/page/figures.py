"""The figures of a comparison: stages, memory, losses, errors. Each takes the facts and gives a drawing, or None.

All are 350 units wide, so that their text is as large as the page's on a phone and in a column of three on a desk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from minibert.page.facts import STAGES, STEP, Contestant, Facts, OpRow
from minibert.page.svg import TOKENS, Drawing, Tips, inline, new_figure
from minibert.page.wording import (
    megabytes,
    milliseconds,
    percent,
    power_of_ten,
    power_of_two,
    significant,
)

WIDTH = 350.0
MARKERS = "osD^vPXh"
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (2, 1.4)), (0, (6, 1.5, 1.5, 1.5)), "-", "--", "-.", ":")
LEAST_ULP, MOST_ULP = -3, 24  # as minibert.assess counts them
LEAST_SHARE = 1e-6  # of an op's elements: the foot of the histograms


def colour(backend: Contestant) -> str:
    return TOKENS[f"b{backend.colour}"]


def stage_times(facts: Facts, name: str = "stages") -> Drawing | None:
    """Time per sample of each stage, a bar for each backend; a thin line from the least to the most over the steps."""
    return _stage_bars(
        facts, name, "Time per sample by stage", lambda row: row.ms, milliseconds, lambda row: (row.least, row.most),
        "Median per sample. The thin line spans the timed steps.",
    )  # fmt: skip


def stage_memory(facts: Facts, name: str = "peaks") -> Drawing | None:
    """Peak memory of each stage above what stood before it."""
    return _stage_bars(
        facts, name, "Peak memory by stage", lambda row: row.peak_bytes, megabytes, lambda row: (None, None),
        "Above what stood before the stage.",
    )  # fmt: skip


def _stage_bars(
    facts: Facts, name: str, title: str, value: Callable[[Any], float | None], words: Callable[[float | None], str],
    spread: Callable[[Any], tuple[float | None, float | None]], caption: str,
) -> Drawing | None:  # fmt: skip
    shown = [s for s in STAGES if any(r.stage == s and value(r) is not None for r in facts.stages)]
    if not shown:
        return None
    backends, tips = facts.timed, Tips()
    group = len(backends) + 0.9
    figure = new_figure(WIDTH, max(130.0, 34 + len(shown) * group * 15.5))
    axes = figure.subplots()
    largest = max(value(r) or 0.0 for r in facts.stages)
    for i, stage in enumerate(shown):
        for j, backend in enumerate(backends):
            row = facts.stage(stage, backend.name)
            amount = None if row is None else value(row)
            if row is None or amount is None:
                continue
            at = i * group + j
            gid = tips.gid(f"{stage} on {backend.name}: {words(amount)}", backend.colour)
            axes.barh(at, amount, 0.86, color=colour(backend)).patches[0].set_gid(gid)
            least, most = spread(row)
            if least is not None and most is not None and most > least:
                axes.plot([least, most], [at, at], color=TOKENS["text"], linewidth=1, solid_capstyle="butt")
            reach = max(amount, most or 0.0)
            axes.text(reach + largest * 0.015, at, words(amount), va="center", color=TOKENS["text"])
    axes.set_yticks([i * group + (len(backends) - 1) / 2 for i in range(len(shown))], shown)
    axes.tick_params(axis="y", labelcolor=TOKENS["text"])
    axes.set_xlim(0, largest * 1.3)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    said = "; ".join(f"{r.stage} on {r.backend} {words(value(r))}" for r in facts.stages)
    return Drawing(name, title, inline(figure, name, title, said, tips), caption)


def memory_over_time(facts: Facts, name: str = "memory") -> Drawing | None:
    """Live bytes through one training step, a panel for each backend on the same axes; stages are bands."""
    if not facts.memory:
        return None
    tips = Tips()
    shown = [b for b in facts.timed if b.name in facts.memory]
    figure = new_figure(WIDTH, 40 + 96.0 * len(shown))
    panels = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    longest = max(points[-1][0] for points in facts.memory.values()) * 1e3
    highest = max(live for points in facts.memory.values() for _, live, _, _ in points) / 1e6
    said = []
    for axes, backend in zip(panels, shown, strict=True):
        points = facts.memory[backend.name]
        ms, held = [p[0] * 1e3 for p in points], [p[1] / 1e6 for p in points]
        axes.fill_between([0.0, *ms], [held[0], *held], step="pre", color=colour(backend), alpha=0.22, linewidth=0)
        gid = tips.gid(f"{backend.name}: at most {megabytes(max(held) * 1e6)}", backend.colour)
        axes.step([0.0, *ms], [held[0], *held], where="pre", color=colour(backend), linewidth=1.4, gid=gid)
        began = 0.0
        for stage in STEP:
            ended = max((p[0] * 1e3 for p in points if p[2] == stage), default=None)
            if ended is None:
                continue
            axes.axvline(ended, color=TOKENS["muted"], linewidth=0.7, linestyle=(0, (2, 2)))
            if ended - began > longest * 0.17:  # there is room for the word
                axes.text((began + ended) / 2, highest * 1.2, stage, ha="center", va="center", color=TOKENS["muted"])
            began = ended
        axes.set_title(backend.name, color=TOKENS["text"], pad=2)
        axes.grid(axis="y")
        axes.set_ylim(0, highest * 1.35)
        said.append(f"{backend.name} at most {megabytes(max(held) * 1e6)} after {milliseconds(ms[-1])}")
    panels[-1].set_xlim(0, longest)
    panels[-1].set_xlabel("ms since the step began")
    figure.supylabel("live MB", color=TOKENS["muted"], fontsize=11.5)
    title = "Memory through one training step"
    text = inline(figure, name, title, "; ".join(said), tips)
    return Drawing(name, title, text, "Live memory at the end of each op; dotted lines end the stages.")


def losses(facts: Facts, name: str = "losses") -> Drawing | None:
    """Loss curves on top of each other and, below, their relative distance from the reference's."""
    curves = {b: facts.losses[b.name] for b in facts.backends if b.name in facts.losses}
    if not curves:
        return None
    reference, *others = curves
    tips = Tips()
    figure = new_figure(WIDTH, 290.0 if others else 190.0)
    upper, *lower = figure.subplots(2 if others else 1, 1, sharex=True, squeeze=False)[:, 0]
    for backend, values in curves.items():
        steps = range(1, len(values) + 1)
        gid = tips.gid(f"{backend.name}: {_loss_words(values)}", backend.colour)
        first = backend is reference and bool(others)
        upper.plot(
            steps, [math.nan if v is None else v for v in values], gid=gid, color=colour(backend),
            linewidth=6 if first else 1.6, alpha=0.4 if first else 1, linestyle="-" if first else DASHES[backend.colour],
            marker=MARKERS[backend.colour], markersize=7 if first else 4, markeredgewidth=0, solid_capstyle="round",
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
                [step], [distance or foot], gid=gid, color=colour(backend), marker=MARKERS[backend.colour], markersize=6,
                markerfacecolor=colour(backend) if distance else TOKENS["paper"],
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


# ------------------------------------------------------------------------------------------------------------- errors


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
    figure = new_figure(164.0, 104.0)
    axes = figure.subplots()
    powers = list(range(LEAST_ULP, MOST_ULP + 1))
    edges = [LEAST_ULP - 2.0, LEAST_ULP - 1.0, *map(float, powers)]  # the first bar: exact
    for backend, row in sides:
        total = sum(row.ulps.values())
        heights = [row.ulps.get("0", 0.0) / total, *(row.ulps.get(f"2^{p}", 0.0) / total for p in powers)]
        shown = [max(h, LEAST_SHARE) if h else LEAST_SHARE for h in heights]
        exact, largest = heights[0], max((p for p, h in zip(powers, heights[1:], strict=True) if h), default=None)
        words = f"{backend.name}: {percent(exact)} exact" + (
            "" if largest is None else f", the rest within {power_of_two(largest)} ulp"
        )
        broken = row.ulps.get("not finite", 0.0)
        words += f", {broken:.0f} not finite" if broken else ""
        reference = backend is sides[0][0]
        axes.stairs(
            shown, edges, baseline=LEAST_SHARE, fill=reference, color=colour(backend), alpha=0.35 if reference else 1,
            linewidth=1.3, gid=tips.gid(words, backend.colour),
        )  # fmt: skip
        said.append(words)
    axes.set_yscale("log")
    axes.set_ylim(LEAST_SHARE, 1.6)
    axes.set_yticks([1, 1e-3, LEAST_SHARE], ["100 %", "0.1 %", ""], minor=False)
    axes.set_xlim(LEAST_ULP - 2.4, MOST_ULP + 0.4)
    axes.set_xticks([LEAST_ULP - 1.5, 0, 12, 24], ["0", "1", power_of_two(12), power_of_two(24)])
    axes.tick_params(labelsize=11, pad=2)
    axes.grid(axis="y")
    return Drawing(name, op, inline(figure, name, f"Errors of {op} in ulp", "; ".join(said), tips), op)
