"""Two results of one bench, figure by figure: `python -m bench.compare OLD NEW [--fail-slower PERCENT]`.

OLD and NEW are JSON files that bench.ops, bench.step, bench.infer or bench.scaling wrote. `change` is NEW's median over
OLD's, less one. `noise` is what it may differ by without a cause, from p20 and p80 of both: the larger of the two
distances from the median to p20 and p80, relative to the median, is taken as 0.84 standard deviations of one round (as
it is in a normal distribution); `noise` is three standard deviations of the difference of two such rounds,

    noise = 3 sqrt(s_old^2 + s_new^2),    s = max(p80 - median, median - p20) / median / 0.84

A round's deviation, and not the median's, which shrinks with the number of rounds: rounds of one run share what two
runs do not, such as clock and placement of memory. It is at least LEAST for the same reason. It knows nothing of other
work that comes and goes: a machine that is busy in one run alone shows as slower. A change within its noise is no
change. Memory is counted once, and shown where it changed by more than LEAST. Figures that only one file has are named;
figures of different settings are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import hypot, isfinite
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from bench.timing import harness
from bench.timing.figures import Figure, figures, kind, settings
from minibert.cli import legend
from minibert.cli.options import console, plain_table
from minibert.errors import UserError

SIGMAS = 3.0
OF_A_ROUND = 0.8416  # standard deviations from the median to the 80th percentile, in a normal distribution
LEAST = 0.05  # by as much two processes differ on a quiet machine, each within itself steadier than that
NOT_COMPARED = ("rounds",)  # settings that may differ: more rounds measure the same thing better
PASSING = ("load",)  # what is said of a machine and changes by the minute


class Change(NamedTuple):
    """One figure in both files."""

    old: Figure
    new: Figure

    @property
    def change(self) -> float:
        """Relative to the old: 0.1 is a tenth more time or memory."""
        return self.new.median / self.old.median - 1

    @property
    def noise(self) -> float:
        """The relative change that needs no cause."""
        if self.old.metric == "memory":  # counted once: it has no rounds
            return LEAST
        return max(LEAST, SIGMAS * hypot(deviation(self.old), deviation(self.new)))

    @property
    def verdict(self) -> str:
        if abs(self.change) <= self.noise:
            return "within noise"
        less, more = ("less", "more") if self.old.metric == "memory" else ("faster", "slower")
        return more if self.change > 0 else less


def deviation(figure: Figure) -> float:
    """The standard deviation of one round, relative to the median."""
    return max(figure.p80 - figure.median, figure.median - figure.p20) / figure.median / OF_A_ROUND


def read(path: Path) -> dict[str, Any]:
    """A bench's document. Raises UserError for anything else."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a file that a bench wrote by --json") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: name a file that a bench wrote by --json") from error
    try:
        kind(document)
        found = figures(document)
        settings(document), fingerprint(document)
        if not found or not all(isfinite(f.median) and f.median > 0 for f in found):
            raise ValueError("a figure that is none")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: a bench's result lacks something ({error!r}): it was cut short or edited") from error
    return dict(document)


def fingerprint(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a figure belongs to: machine, versions and backends, as flat names."""
    machine = {name: value for name, value in document["machine"].items() if name not in PASSING}
    return {**machine, **document["versions"], **document["backends"]}


def refuse_other_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise UserError naming what was asked for differently."""
    if kind(old) != kind(new):
        raise UserError(f"expected two results of one bench, got bench.{kind(old)} and bench.{kind(new)}")
    a, b = flat(settings(old)), flat(settings(new))
    for name in [*a, *(name for name in b if name not in a)]:
        if a.get(name) != b.get(name) and name not in NOT_COMPARED:
            raise UserError(
                f"different settings: {name} is {a.get(name)!r} in OLD, {b.get(name)!r} in NEW; run it again"
            )


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return found


def where(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """One line: on what both were measured, or what differs."""
    a, b = fingerprint(old), fingerprint(new)
    both = [name for name in a if name in b]
    apart = [f"{name} {a[name]} -> {b[name]}" for name in both if a[name] != b[name]]
    if apart:
        return f"DIFFERENT MACHINES OR VERSIONS: {'; '.join(apart)}"
    return f"the same machine and versions: {a.get('processor')}, {a.get('cores')} cores"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[Change], list[str]]:
    """Every figure that both have; the names of those that one lacks."""
    before, after = ({name_of(f): f for f in figures(document)} for document in (old, new))
    common = [Change(before[name], after[name]) for name in before if name in after]
    lacking = [f"only in OLD: {' '.join(name)}" for name in before if name not in after]
    return common, [*lacking, *(f"only in NEW: {' '.join(name)}" for name in after if name not in before)]


def name_of(figure: Figure) -> tuple[str, ...]:
    """What makes it the same figure in another file."""
    size = (f"{figure.x_value:g}",) if figure.kernel.startswith("scaling_") else ()
    return figure.kernel, *size, figure.provider, figure.mode, figure.metric


def show(found: list[Change]) -> None:
    table = plain_table("figure", "backend", "mode")
    for name in ("", "old", "new", "change", "noise", ""):
        table.add_column(name, justify="right", no_wrap=True)
    colours = {"faster": "green", "less": "green", "slower": "red", "more": "red"}
    for one in found:
        if one.old.metric == "memory" and one.verdict == "within noise":
            continue
        colour = colours.get(one.verdict)
        name = " ".join(name_of(one.old)[:-3])
        table.add_row(
            name, one.old.provider, one.old.mode, one.old.unit, f"{one.old.median:.4g}", f"{one.new.median:.4g}",
            f"{one.change:+.1%}", f"{one.noise:.1%}", f"[{colour}]{one.verdict}[/{colour}]" if colour else one.verdict,
        )  # fmt: skip
    legend.show(table, {"change": "of the median", "noise": "what it may differ by without a cause"})


def bench(
    old: Annotated[Path, typer.Argument(help="What a bench wrote by --json.")],
    new: Annotated[Path, typer.Argument(help="The same bench, later.")],
    fail_slower: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="PERCENT", help="Exit status 1 if a time grew by more, or is gone."),
    ] = None,
) -> int:
    """Say what changed between two results of a bench, and what is noise."""
    before, after = read(old), read(new)
    refuse_other_settings(before, after)
    console.print(where(before, after), highlight=False, markup=False, soft_wrap=True)
    found, lacking = changes(before, after)
    show(found)
    for line in lacking:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    times = [one.verdict for one in found if one.old.metric == "speed"]
    counts = {verdict: times.count(verdict) for verdict in ("faster", "slower", "within noise")}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), highlight=False)
    if fail_slower is None:
        return 0
    gone = any(line.startswith("only in OLD") for line in lacking)  # wrong, impossible or refused in NEW
    return int(gone or any(one.verdict == "slower" and one.change * 100 > fail_slower for one in found))


if __name__ == "__main__":
    harness.run_main(bench)
