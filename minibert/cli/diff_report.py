"""What `minibert diff` shows: its first line, its table, and the same as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from minibert.cli.options import folded, plain_table
from minibert.data import PackedBatch
from minibert.lab.lockstep.assess import Assessment, Distance
from minibert.lab.lockstep.diff import Difference, Row
from minibert.lab.lockstep.trace import Recording

SHOWN = 20  # rows, unless all are asked for


def verdict(found: Difference) -> str:
    """One line: the culprit, where the two sides stop running the same calls, or that there is neither."""
    row = found.culprit
    if row is None:
        if found.parted:
            return (
                f"[red]PARTED[/red] {escape(found.parted)}; the {len(found.rows)} calls before are within their bounds"
            )
        judged = len(found.rows) - found.unjudged
        said = f"[green]no culprit[/green]: {judged} calls within their bounds on both sides"
        if found.unjudged:
            said += (
                f"; of {found.unjudged} more a trace does not tell: inputs of theirs are not in it, and those of the "
                "other side differ"
            )
        unbounded = sum(r.unbounded for r in found.rows)
        return said + (f"; of {unbounded} elements an infinite bound says nothing" if unbounded else "")
    where = f" in {row.place}" if row.place else ""
    names = {"A": f"side A ({found.a.name}) is", "B": f"side B ({found.b.name}) is"}
    names["both"] = f"both sides ({found.a.name}, {found.b.name}) are"
    what = _what(row.worst)
    said = f"{row.op}{where} ({row.phase}, call {row.call}): {names[row.side]} wrong: {what}"
    ended = found.broken if what not in found.broken else ""
    return f"[red]CULPRIT[/red] {escape(said)}" + (f"; what ended the step: {escape(ended)}" if ended else "")


def _what(wrong: Assessment | None) -> str:
    """What is wrong with a result that left its bound."""
    assert wrong is not None
    worst = wrong.judgement.worst
    if worst is None:
        return wrong.judgement.problem
    share = wrong.judgement.bound_share
    off = f"{share:.3g} times its bound" if math.isfinite(share) else "where its bound allows no other number"
    return f"{worst.where}: expected {worst.expected:.9g}, got {worst.got:.9g}, {off}"


def summary(found: Difference, batch: PackedBatch) -> str:
    losses = ", ".join(f"{name} {loss!r}" for name, loss in zip("AB", found.losses, strict=True) if loss is not None)
    return (
        f"{len(batch.cu_seqlens) - 1} sequences, {len(batch.input_ids)} tokens, {batch.counted} predicted; "
        f"loss {losses or 'not reached'}"
    )


def table(found: Difference, every: bool, hint: str, ulp: bool) -> Table:
    """The calls that used up most of their bound; with `every`, all calls in order.

    `ulp`: with errors in units in the last place.
    """
    rows = found.rows if every else sorted(found.rows, key=_badness, reverse=True)[:SHOWN]
    title = "Every call" if every else f"The {len(rows)} calls nearest to their bound, of {len(found.rows)} ({hint})"
    made = plain_table(title=title, header_style="bold")
    left_out = {*(() if any(row.local for row in found.rows) else LOCAL), *(() if ulp else ULPS)}
    columns = [c for c in COLUMNS if c.name not in left_out]
    for column in columns:
        left = column.name in ("op", "phase", "place")
        made.add_column(column.name, justify="left" if left else "right", overflow=folded(column.name == "place"))
    for row in rows:
        made.add_row(*(column.cell(row) for column in columns))
    return made


def _badness(row: Row) -> tuple[bool, float]:
    return bool(row.side), max((x.judgement.bound_share for x in row.judged), default=0.0)


def _share(result: Assessment | None) -> str:
    if result is None:
        return "not judged"
    share = result.judgement.bound_share
    if not result.wrong:
        return f"{share:.2%}"
    return f"[red]{share:.3g} x[/red]" if math.isfinite(share) else "[red]beyond[/red]"


def _near(row: Row, buckets: tuple[str, ...]) -> str:
    """The share of the elements of B's local result whose error falls into these buckets."""
    total = sum(row.local.ulps.values()) if row.local else 0
    return f"{sum(row.local.ulps[b] for b in buckets) / total:.1%}" if row.local and total else ""


def _measure(row: Row, name: str) -> str:
    told = row.local or row.b
    return f"{getattr(told.judgement, name):.3g}" if told else ""


def _relative(distance: Distance | None) -> str:
    return "" if distance is None else f"{distance.relative:.2g}"


class Column(NamedTuple):
    name: str
    cell: Callable[[Row], str]


ONE_ULP = ("0", "2^-3", "2^-2", "2^-1", "2^0")
LOCAL = ("local", "exact", "to 1 ulp")  # what B makes of A's inputs, where it was asked
ULPS = ("to 1 ulp", "max ulp")
MEANINGS = {
    "call": "which of the step", "A of bound": "of the error that the formula allows on A's inputs",
    "B of bound": "on B's", "local": "B on A's inputs", "inherited": "how far apart the inputs are",
    "output": "how far the outputs", "growth": "these over those",
}  # fmt: skip
COLUMNS = (
    Column("call", lambda row: str(row.call)),
    Column("op", lambda row: row.op),
    Column("phase", lambda row: row.phase),
    Column("place", lambda row: row.place),
    Column("A of bound", lambda row: _share(row.a)),
    Column("B of bound", lambda row: _share(row.b)),
    Column("local", lambda row: _share(row.local)),
    Column("exact", lambda row: _near(row, ("0",))),
    Column("to 1 ulp", lambda row: _near(row, ONE_ULP)),
    Column("max ulp", lambda row: _measure(row, "ulp_max")),
    Column("err/uS", lambda row: _measure(row, "err_over_us")),
    Column("inherited", lambda row: _relative(row.inputs)),
    Column("output", lambda row: _relative(row.outputs)),
    Column("growth", lambda row: "" if row.growth is None else f"{row.growth:.2g}"),
    Column("wrong", lambda row: f"[red]{row.side}[/red]" if row.side else ""),
)


def facts(found: Difference) -> dict[str, Any]:
    """Every row and the culprit as plain data. What is not finite, or not known, is None."""
    row = found.culprit
    worst = row.worst if row else None
    return {
        "culprit": row and worst and {
            "op": row.op, "phase": row.phase, "place": row.place, "side": row.side, "call": row.call,
            "element": _element(worst), "bound_share": finite(worst.judgement.bound_share),
            "problem": worst.judgement.problem,
        },
        "parted": found.parted,
        "broken": found.broken,
        "loss": dict(zip("ab", map(finite, found.losses), strict=True)),
        "unjudged": found.unjudged,
        "calls": [_row_facts(row) for row in found.rows],
    }  # fmt: skip


def recorded_facts(made: Recording) -> dict[str, Any]:
    """Loss and calls of one side alone."""
    return {
        "loss": {"a": finite(made.loss)},
        "calls": [
            {
                "call": number, "op": call.op, "phase": call.phase, "place": call.place,
                "shapes": [list(key.shape) for key in call.inputs],
            }
            for number, call in enumerate(made.calls, 1)
        ],
    }  # fmt: skip


def _row_facts(row: Row) -> dict[str, Any]:
    return {
        "call": row.call, "op": row.op, "phase": row.phase, "place": row.place,
        "shapes": [list(shape) for shape in row.shapes], "wrong": row.side,
        **{name: _assessment_facts(getattr(row, name)) for name in ("a", "b", "local")},
        **{
            name: distance and {"largest": finite(distance.largest), "relative": finite(distance.relative)}
            for name, distance in (("inputs_apart", row.inputs), ("outputs_apart", row.outputs))
        },
        "growth": finite(row.growth),
    }  # fmt: skip


def _assessment_facts(result: Assessment | None) -> dict[str, Any] | None:
    if result is None:
        return None
    judgement = result.judgement
    return {
        **{name: finite(getattr(judgement, name)) for name in ("ulp_max", "err_over_us", "bound_share")},
        "ok": judgement.ok, "problem": judgement.problem, "unbounded": judgement.unbounded,
        "element": _element(result), "ulps": dict(result.ulps),
    }  # fmt: skip


def _element(result: Assessment) -> dict[str, Any] | None:
    worst = result.judgement.worst
    if worst is None:
        return None
    numbers = {name: finite(getattr(worst, name)) for name in ("expected", "got", "bound")}
    return {"output": worst.output, "name": worst.name, "index": list(worst.place), **numbers}


def finite(value: float | None) -> float | None:
    """As JSON can hold it."""
    return value if value is not None and math.isfinite(value) else None
