"""The figures of what a step takes: stages, memory, what is left to win.

Each takes the facts and gives a drawing, or None where there is nothing to draw. All are 350
units wide, so that their text is as large as the page's on a phone and in a column of three on a desk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minibert.page.facts import STAGES, STEP, Contestant, Facts, StageTime
from minibert.page.svg import TOKENS, Drawing, Tips, inline, new_figure
from minibert.page.wording import brief, megabytes, milliseconds

WIDTH = 350.0
SHOWN = 8  # ops in a figure of the worst
LONGEST_LINE = 1.1  # of the longest bar
BESIDE, EDGE = 6, 3  # units between a bar and its label, and between that and the figure's edge
MARKERS = "osD^vPXh"
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (2, 1.4)), (0, (6, 1.5, 1.5, 1.5)), "-", "--", "-.", ":")


def colour(backend: Contestant) -> str:
    return TOKENS[f"b{backend.colour}"]


def label(axes: Any, x: float, y: float, text: str, ink: str = TOKENS["text"]) -> Any:
    """What a bar that ends at x says, on its right. `make_room` has to follow."""
    gap = {"xytext": (BESIDE, 0), "textcoords": "offset points"}
    return axes.annotate(text, (x, y), va="center", color=ink, in_layout=False, annotation_clip=False, **gap)


def make_room(figure: Any, axes: Any, labels: Sequence[Any]) -> None:
    """Let the x axis begin at 0 and end where every label has its place within the figure."""
    figure.draw_without_rendering()  # sizes are known only now
    renderer, width = figure.canvas.get_renderer(), axes.get_window_extent().width
    ends = [0.0]
    for one in labels:
        left = width - BESIDE - one.get_window_extent(renderer).width - EDGE
        ends.append(one.xy[0] * width / max(left, width / 4))
    axes.set_xlim(0, max(ends) or 1.0)


def stage_times(facts: Facts, name: str = "stages") -> Drawing | None:
    """Time per sample of each stage, a bar for each backend; a thin line from the least to the most over the steps."""
    caption = "Median per sample."
    if any(row.each for row in facts.stages):
        caption += " The thin line spans the timed steps."
    if any(max(row.each) > _cut(facts, _ms) for row in facts.stages if row.each):
        caption += " An arrow: it goes on, to a step that was much slower."
    return _stage_bars(facts, name, "Time per sample by stage", _ms, milliseconds, lambda row: row.each, caption)


def stage_memory(facts: Facts, name: str = "peaks") -> Drawing | None:
    """Peak memory of each stage above what stood before it."""
    return _stage_bars(
        facts, name, "Peak memory by stage", lambda row: row.peak_bytes, megabytes, lambda row: [],
        "Above what stood before the stage.",
    )  # fmt: skip


def _ms(row: StageTime) -> float | None:
    return row.ms


def _cut(facts: Facts, value: Callable[[StageTime], float | None]) -> float:
    """Where a thin line ends at the latest: bars set the scale of a figure, not the slowest step."""
    return max((value(row) or 0.0 for row in facts.stages), default=0.0) * LONGEST_LINE


def _stage_bars(
    facts: Facts, name: str, title: str, value: Callable[[StageTime], float | None],
    words: Callable[[float | None], str], each: Callable[[StageTime], list[float]], caption: str,
) -> Drawing | None:  # fmt: skip
    shown = [s for s in STAGES if any(r.stage == s and value(r) is not None for r in facts.stages)]
    if not shown:
        return None
    backends, tips, labels, cut = facts.timed, Tips(), [], _cut(facts, value)
    group = len(backends) + 0.9
    figure = new_figure(WIDTH, max(130.0, 34 + len(shown) * group * 15.5))
    axes = figure.subplots()
    for i, stage in enumerate(shown):
        for j, backend in enumerate(backends):
            row = facts.stage(stage, backend.name)
            amount = None if row is None else value(row)
            if row is None or amount is None:
                continue
            at = i * group + j
            steps, told = each(row), f"{stage} on {backend.name}: {words(amount)}"
            least, most = min(steps, default=amount), max(steps, default=amount)
            told += f", from {words(least)} to {words(most)}" if most > least else ""
            gid = tips.gid(told, backend.colour)
            axes.barh(at, amount, 0.86, color=colour(backend)).patches[0].set_gid(gid)
            if most > least:
                axes.plot([least, min(most, cut)], [at, at], color=TOKENS["text"], linewidth=1, solid_capstyle="butt")
            if most > cut:
                axes.plot([cut], [at], color=TOKENS["text"], marker=">", markersize=4.5, clip_on=False)
            labels.append(label(axes, min(max(amount, most), cut), at, words(amount)))
    axes.set_yticks([i * group + (len(backends) - 1) / 2 for i in range(len(shown))], shown)
    axes.tick_params(axis="y", labelcolor=TOKENS["text"])
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    make_room(figure, axes, labels)
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
            if ended - began > longest * 0.21:  # there is room for the word
                axes.text((began + ended) / 2, highest * 1.2, stage, ha="center", va="center", color=TOKENS["muted"])
            began = ended
        axes.set_title(brief(backend.name), color=TOKENS["text"], pad=2)
        axes.grid(axis="y")
        axes.set_ylim(0, highest * 1.35)
        said.append(f"{backend.name} at most {megabytes(max(held) * 1e6)} after {milliseconds(ms[-1])}")
    panels[-1].set_xlim(0, longest)
    panels[-1].set_xlabel("ms since the step began")
    figure.supylabel("live MB", color=TOKENS["muted"], fontsize=12)
    title = "Memory through one training step"
    text = inline(figure, name, title, "; ".join(said), tips)
    return Drawing(name, title, text, "Live memory at the end of each op; dotted lines end the stages.")


def headroom(facts: Facts, name: str = "headroom") -> Drawing | None:
    """The ops of each backend that take longest above their roofline: the time, and in it the least that it can be."""
    known = [
        (row.ms - row.predicted_ms, row) for row in facts.ops if row.ms is not None and row.predicted_ms is not None
    ]
    known = sorted((pair for pair in known if pair[0] > 0), key=lambda pair: -pair[0])
    each = max(3, SHOWN // max(1, len(facts.timed)))  # of a slow backend no more than of a fast one
    gaps = [pair for b in facts.timed for pair in [p for p in known if p[1].backend == b.name][:each]]
    if not gaps:
        return None
    owners, tips, said, labels = {b.name: b for b in facts.backends}, Tips(), [], []
    figure = new_figure(WIDTH, 24 + 37.0 * len(gaps))
    axes = figure.subplots()
    for at, (gap, row) in enumerate(gaps):
        owner = owners[row.backend]
        words = f"{row.op} on {row.backend}: {milliseconds(row.ms)}, at least {milliseconds(row.predicted_ms)}"
        axes.barh(at, row.ms, 0.42, color=colour(owner), alpha=0.3).patches[0].set_gid(tips.gid(words, owner.colour))
        axes.barh(at, row.predicted_ms, 0.42, color=colour(owner)).patches[0].set_gid(tips.gid(words, owner.colour))
        axes.text(0, at - 0.27, brief(f"{row.op}, {row.backend}"), va="bottom", color=TOKENS["text"])
        labels.append(label(axes, row.ms or 0.0, at, f"{milliseconds(gap)} above", TOKENS["muted"]))
        said.append(words)
    axes.set_ylim(len(gaps) - 0.6, -0.9)
    axes.axis("off")
    make_room(figure, axes, labels)
    title = "Where there is most to win"
    text = inline(figure, name, title, "; ".join(said), tips)
    return Drawing(name, title, text, "Solid: the least time that the roofline allows; pale: what one step takes.")
