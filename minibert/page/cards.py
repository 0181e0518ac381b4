"""Results recorded elsewhere, each on a card that says of which machine and day it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minibert.lab.measure.quiet import load_words, ratio, warning
from minibert.page.curves import crossovers
from minibert.page.facts import NOT_GPU_SPEED, STAGES, STEP, Facts, disturbance, listed, mapping, number, numbers, rows
from minibert.page.figures import stage_times
from minibert.page.recorded import KINDS, Recorded
from minibert.page.svg import Drawing
from minibert.page.wording import (
    MISSING,
    date_words,
    headline,
    joined,
    left_out,
    megabytes,
    milliseconds,
    percent,
    place_words,
    sentence,
    significant,
    times,
    whole,
)

LONGEST = 12  # rows of an op table on a card: the slowest


@dataclass
class Table:
    """A small table: the first column is text, the others are figures."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False  # the other columns are text as well


@dataclass
class Card:
    """What the page shows of one recorded run."""

    name: str
    kind: str
    machine: str
    date: str
    emulated: bool = False
    ok: bool | None = None
    lines: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Drawing] = field(default_factory=list)


def card(recorded: Recorded, index: int, ours: Facts) -> Card:
    """What to show of it, beside what was compared here. Of a backend that plays another machine no time is shown."""
    facts = recorded.facts
    about = mapping(facts.get("facts")) if recorded.kind == "trace" else facts
    made = Card(
        recorded.name, KINDS[recorded.kind], place_words(mapping(about.get("machine"))), date_words(about.get("date"))
    )
    SHOW[recorded.kind](made, facts, f"r{index}")
    quiet = disturbance(facts)
    if quiet["load"] is not None:
        made.lines.append(f"Measured at {load_words(quiet)}. {sentence(warning(quiet))}".strip())
    if recorded.kind == "compare":
        made.lines += _side_by_side(Facts(facts), ours)
    return made


def _side_by_side(theirs: Facts, ours: Facts) -> Iterator[str]:
    """A step there and here, where both did the same work."""
    work = theirs.config.get("summary")
    if not work or work != ours.config.get("summary"):
        yield "Other work than on this page: its times and those above do not compare."
        return
    there, here = ({b.name: ms for b in facts.timed if (ms := facts.step_ms(b.name))} for facts in (theirs, ours))
    if there and here:
        a, b = min(there, key=lambda n: there[n]), min(here, key=lambda n: here[n])
        yield (
            f"The same work as on this page: a training step takes {milliseconds(there[a])} a sequence on {a} there, "
            f"{milliseconds(here[b])} on {b} here."
        )


# ------------------------------------------------------------------------------------------------------ one for each


def _compare(made: Card, document: Mapping[str, Any], name: str) -> None:
    facts = Facts(document)
    first = headline(facts)
    made.ok = facts.ok
    made.emulated = bool(facts.backends) and all(b.emulated for b in facts.backends)
    made.lines += [first.before + first.figure + first.after, first.below, str(facts.config.get("summary", ""))]
    made.lines += [
        f"{b.name}: {b.what}" + (" (no times are shown of it)" if b.emulated else "") for b in facts.backends
    ]
    drawn = stage_times(facts, f"{name}-stages")
    if drawn is not None:
        made.figures.append(drawn)
        cells = [
            (stage, *(milliseconds(r.ms) if (r := facts.stage(stage, b.name)) else MISSING for b in facts.timed))
            for stage in STAGES
        ]
        step: Sequence[str] = ("step", *(milliseconds(facts.step_ms(b.name)) for b in facts.timed))
        made.tables.append(
            Table(
                f"Time per sample; a step is {joined(list(STEP))}",
                ("stage", *(b.name for b in facts.timed)),
                [*cells, step],
            )
        )
    if mapping(facts.scaling):
        made.figures += crossovers(facts.scaling, facts.emulated, prefix=f"{name}-scaling")


def _ops(made: Card, document: Mapping[str, Any], name: str) -> None:
    made.ok = document.get("ok") is True
    settings = mapping(document.get("settings") or document.get("size"))
    made.lines.append(", ".join(f"{k} {v}" for k, v in settings.items() if isinstance(v, int | float | str)))
    made.lines += _peaks(mapping(document.get("peaks")))
    timed = [row for row in rows(document.get("ops")) if row.get("note") != "impossible"]
    backends = list(dict.fromkeys(str(row.get("backend")) for row in timed))
    spent = {(str(row.get("op")), str(row.get("backend"))): _row_ms(row) for row in timed}
    slowest = sorted({op for op, _ in spent}, key=lambda op: -max(spent.get((op, b)) or 0.0 for b in backends))
    made.tables.append(
        Table(
            f"The {min(LONGEST, len(slowest))} slowest of {len(slowest)} ops, time of a call",
            ("op", *backends),
            [(op, *(milliseconds(spent.get((op, b))) for b in backends)) for op in slowest[:LONGEST]],
        )
    )


def _row_ms(row: Mapping[str, Any]) -> float | None:
    seconds = number(mapping(row.get("seconds")).get("median"))
    return number(row.get("ms")) if seconds is None else seconds * 1e3


def _peaks(peaks: Mapping[str, Any]) -> Iterator[str]:
    said = [
        f"{significant(value)} {unit}"
        for key, unit in (
            ("fma_gflops", "GFLOP/s of multiply-adds"), ("gflops", "GFLOP/s in the best product"),
            ("triad_gbps", "GB/s in the triad"), ("fill_gbps", "GB/s of writing"),
        )
        if (value := number(peaks.get(key)))
    ]  # fmt: skip
    if said:
        yield "Measured peaks: " + ", ".join(said)


def _measures(made: Card, document: Mapping[str, Any], name: str) -> None:
    made.ok = document.get("ok") is True
    settings = mapping(document.get("settings"))
    made.lines.append(", ".join(f"{k} {v}" for k, v in settings.items() if isinstance(v, int | float | str)))
    made.lines += _peaks(mapping(document.get("peaks")))
    for key, measured in mapping(document.get("measures")).items():
        facts = mapping(measured)
        if facts.get("refused"):
            made.lines.append(f"{key}: refused, {facts['refused']}")
            continue
        spent = {who: number(mapping(taken).get("median")) for who, taken in mapping(facts.get("seconds")).items()}
        impossible = mapping(facts.get("impossible")) or {str(who): "" for who in listed(facts.get("impossible"))}
        held = mapping(facts.get("peak_bytes"))
        possible = {who: s for who, s in spent.items() if s and who not in impossible}
        fastest = min(possible, key=lambda who: possible[who], default="")
        turns = {who: numbers(mapping(taken).get("all")) for who, taken in mapping(facts.get("seconds")).items()}
        cells = [
            (
                who,
                "impossible" if who in impossible else milliseconds(None if s is None else s * 1e3),
                _beside(turns[who], turns[fastest]) if who in possible and who != fastest else MISSING,
                megabytes(number(held.get(who))),
            )
            for who, s in spent.items()
        ]  # fmt: skip
        made.tables.append(
            Table(
                str(facts.get("what") or key),
                ("side", "median", "times the fastest (p20 to p80)", "peak memory"),
                cells,
            )
        )


def _beside(slower: list[float], faster: list[float]) -> str:
    """How many times as long one took as the other, in turns; nothing where each turn's time is not known."""
    found = ratio(slower, faster) if len(slower) == len(faster) else None
    return MISSING if found is None else f"{times(found.median)} ({significant(found.p20)} to {significant(found.p80)})"


def _scaling(made: Card, document: Mapping[str, Any], name: str) -> None:
    scaling = mapping(document.get("scaling"))
    made.ok = document.get("ok") is True
    made.lines.append(str(scaling.get("what", "")))
    described = mapping(document.get("backends"))
    played = {who for who, what in described.items() if NOT_GPU_SPEED in str(what)}
    made.figures += crossovers(scaling, played, prefix=f"{name}-scaling")
    made.lines += left_out(scaling)


def _gpu_check(made: Card, document: Mapping[str, Any], name: str) -> None:
    made.emulated = document.get("emulated") is not False
    made.ok = document.get("ok") is True
    machine = mapping(document.get("machine"))
    made.machine = place_words({**mapping(machine.get("host")), "device": document.get("device")})
    made.lines.append(str(machine.get("backend", "")))
    commit = f" (commit {document['commit']})" if document.get("commit") else ""
    made.lines.append(f"{document.get('command', '')}{commit}")
    parts = {str(part.get("name")): part for part in rows(document.get("parts"))}
    status = [
        (str(p.get("title") or key), ": ".join(str(x) for x in (p.get("status"), p.get("reason")) if x))
        for key, p in parts.items()
    ]
    figures = {key: mapping(part.get("figures")) for key, part in parts.items()}
    made.tables.append(Table("What was run", ("part", "outcome"), status, words=True))
    made.tables += _checked(figures.get("conformance", {}))
    if not made.emulated:
        made.tables += _steps(figures.get("steps", {}))
        made.tables += _kernels(figures.get("kernels", {}))


def _checked(conformance: Mapping[str, Any]) -> Iterator[Table]:
    found = {dtype: mapping(facts) for dtype, facts in mapping(conformance.get("dtypes")).items()}
    cells = [
        (dtype, whole(number(f.get("checks"))), whole(number(f.get("failed"))),
         percent(number(f.get("largest_bound_share"))), str(f.get("of", MISSING)))
        for dtype, f in found.items()
    ]  # fmt: skip
    if cells:
        yield Table(
            "Correctness: largest share of an op's error bound", ("dtype", "checks", "failed", "of bound", "by"), cells
        )


def _steps(steps: Mapping[str, Any]) -> Iterator[Table]:
    for group in rows(steps.get("groups")):
        results = group.get("results")
        named = (
            mapping(results).items()
            if isinstance(results, Mapping)
            else [(str(r.get("who")), r) for r in rows(results)]
        )
        cells = [
            (
                who,
                milliseconds(number(r.get("ms"))),
                whole(number(r.get("tokens_per_s"))),
                percent(number(r.get("mfu"))),
            )
            for who, r in ((who, mapping(r)) for who, r in named)
        ]
        if group.get("refused"):
            continue
        size = f"batch {group.get('batch')}, length {group.get('length')}, {group.get('mode')}"
        yield Table(f"A training step, {size}", ("by", "median", "tokens/s", "of peak"), cells)


def _kernels(kernels: Mapping[str, Any]) -> Iterator[Table]:
    known = [row for row in rows(kernels.get("rows")) if (number(row.get("share")) or 2) <= 1]
    slowest = sorted(known, key=lambda row: -(number(row.get("ms")) or 0.0))[:LONGEST]
    cells = [
        (f"{r.get('op')} {r.get('mode')} {r.get('size')}", milliseconds(number(r.get("ms"))),
         percent(number(r.get("share"))), str(r.get("bound_by") or MISSING))
        for r in slowest
    ]  # fmt: skip
    if cells:
        yield Table(f"The {len(cells)} slowest kernels", ("kernel", "median", "of the limit", "bound by"), cells)


def _trace(made: Card, document: Mapping[str, Any], name: str) -> None:
    made.emulated = NOT_GPU_SPEED in str(document.get("what"))
    settings = mapping(mapping(document.get("facts")).get("settings"))
    calls = rows(document.get("calls"))
    phases = Counter(str(call.get("phase")) for call in calls)
    made.lines.append(str(document.get("what", "")))
    made.lines.append(
        f"{len(calls)} calls of ops ({joined([f'{amount} {phase}' for phase, amount in phases.items()])}), "
        f"loss {significant(number(document.get('loss')), 9)}"
    )
    said = {k: v for k, v in settings.items() if isinstance(v, int | float) or k == "weights"}
    made.lines.append(", ".join(f"{k} {v}" for k, v in said.items()))
    made.lines.append("A trace holds what each op gave, and no time; minibert diff compares a backend with it.")


SHOW = {
    "compare": _compare,
    "bench.ops": _ops,
    "bench.step": _measures,
    "bench.infer": _measures,
    "bench.scaling": _scaling,
    "gpu-check": _gpu_check,
    "trace": _trace,
}
