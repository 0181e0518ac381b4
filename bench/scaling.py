"""How a step's cost grows with batch, length, width and threads: `python -m bench.scaling [--axes batch,hidden]`.

A table for each axis, every backend at every size; then what is read off it: the exponent of the growth, with its range
over the rounds, and at what size one backend overtakes another. What is timed, and how, is in
`minibert.lab.measure.scaling`; what an exponent and a crossover are, in `minibert.lab.measure.growth`. `--batch 1,2,4`
sets the sizes of an axis; a single number keeps that size for the others: `--axes batch --length 128`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bench.timing.figures import add_to_csv, refuse_other_csv
from bench.timing.harness import among, cores, fingerprint, run_main
from bench.timing.sides import say_quiet, say_where
from minibert.cli import legend
from minibert.cli.options import BACKENDS, OWN_HELP, chosen_backends, console, notes, plain_table, refuse_unwritable
from minibert.errors import UserError
from minibert.lab.measure import quiet
from minibert.lab.measure.scaling import AXES, FEWEST_ROUNDS, QUICK_AXES, UNITS, WORK, Base, measure, thread_counts

ROUNDS, QUICK_ROUNDS = 9, 5
AXIS_HELP = "Its sizes, as in 1,2,4,8; or one number, for the other axes."


def plan(
    given: Mapping[str, str], axes: str, quick: bool, most_threads: int
) -> tuple[dict[str, tuple[int, ...]], Base]:
    """The axes with their sizes, and what the others are kept at. `given`: axis -> "1,2,4" or "4", or nothing.

    Raises UserError for what is no number and for an axis that is asked for and has one size.
    """
    sizes = {axis: _sizes(axis, text) for axis, text in given.items() if text}
    usual = {**(QUICK_AXES if quick else AXES), "threads": thread_counts(most_threads)}
    wanted = among("--axes", axes, tuple(UNITS)) or [
        axis
        for axis in UNITS
        if len(sizes.get(axis, usual[axis])) > 1  # one core has no axis of threads
    ]
    for axis in wanted:
        if len(sizes.get(axis, usual[axis])) < 2:
            raise UserError(
                f"--{axis}: expected two or more sizes to compare, as in --{axis} 1,2; or leave the axis out"
            )
    for axis, values in sizes.items():
        if axis not in wanted and len(values) > 1:
            raise UserError(f"--{axis}: expected one size, since --axes leaves it out, got {given[axis]!r}")
    base = {axis: values[0] for axis, values in sizes.items() if axis not in wanted}
    return {axis: sizes.get(axis, usual[axis]) for axis in wanted}, Base(**{"threads": most_threads, **base})


def _sizes(axis: str, text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--{axis}: expected numbers such as 1,2,4, got {text!r}")
    return tuple(int(word) for word in words)


# -------------------------------------------------------------------------------------------------------- on the screen


def times(axis: str, facts: Mapping[str, Any]) -> Table:
    """One line for each size and backend; of an impossible time only that it is one."""
    first, *others = facts["backends"]
    shown = plain_table(axis)
    shown.add_column("backend", no_wrap=True)
    columns = ["ms", "p20", "p80", *([f"x {first}"] if others else []), "of peak"]
    more = {"speedup": ".2f", "efficiency": ".0%"} if axis == "threads" else {}
    for column in (*columns, *more):
        shown.add_column(column, justify="right", no_wrap=True)
    for i, size in enumerate(facts["sizes"]):
        reference = facts["backends"][first]["seconds"][i]
        for name, curve in facts["backends"].items():
            took = curve["seconds"][i]
            ratio = None if took is None or reference is None else reference / took
            shown.add_row(
                str(size) if name == first else "", name,
                "[red]impossible[/red]" if size in curve["impossible"] else _ms(took),
                _ms(curve["p20"][i]), _ms(curve["p80"][i]),
                *([_figure(ratio, ".2f")] if others else []), _figure(curve["share_of_peak"][i], ".0%"),
                *(_figure(curve[kind][i], form) for kind, form in more.items()),
            )  # fmt: skip
        if others:
            shown.add_section()
    return shown


def _figure(value: float | None, form: str, before: str = "") -> str:
    return "-" if value is None else before + format(value, form)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else format(seconds * 1e3, ".2f" if seconds < 0.1 else ".1f")


def exponents(axis: str, facts: Mapping[str, Any]) -> Table:
    """One line for each backend."""
    curves = facts["backends"]
    fixed = any(curve["fixed_seconds"] is not None for curve in curves.values())
    shown = plain_table("growth")
    for column in ("time ~", "p20..p80", "off by", "last", "p20..p80", *(["fixed ms"] if fixed else [])):
        shown.add_column(column, justify="right", no_wrap=True)
    for name, curve in curves.items():
        shown.add_row(
            name, _figure(curve["exponent"], ".2f", before=f"{axis}^"), _range(curve["exponent_range"]),
            _figure(curve["misfit"], ".0%"),
            _figure(curve["last_exponent"], ".2f"), _range(curve["last_exponent_range"]),
            *([_ms(curve["fixed_seconds"])] if fixed else []),
        )  # fmt: skip
    return shown


GROWTH = {
    "off by": "what k size^p misses the worst size by",
    "last": "the exponent between the last two sizes, which tells what it tends to",
    "fixed ms": "what does not grow with the batch",
}


def _range(both: Sequence[float] | None) -> str:
    return "-" if both is None else f"{both[0]:.2f}..{both[1]:.2f}"


def show(found: Mapping[str, Any]) -> None:
    base = ", ".join(f"{axis} {size}" for axis, size in found["base"].items())
    model = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found["model"].items())
    limits = ", ".join(
        f"{threads}: " + ("not measured" if limit is None else f"{limit:.0f}")
        for threads, limit in found["limit_gflops"].items()
    )
    for line in (
        f"{found['what']}; {found['rounds']} rounds", f"where not varied: {base}; {model}",
        f"peak of the CPU by threads, GFLOP/s: {limits}",
    ):  # fmt: skip
        console.print(line, highlight=False, soft_wrap=True)
    for axis, facts in found["axes"].items():
        if facts["refused"]:
            console.print(f"\n[red]refused[/red]: {facts['refused']}", highlight=False, soft_wrap=True)
            continue
        for name, why in facts["left_out"].items():
            console.print(f"\n{name} left out: {why}", highlight=False, markup=False, soft_wrap=True)
        if facts["backends"]:
            legend.show(times(axis, facts), {"of peak": "rate over the CPU's peak"})
            legend.show(exponents(axis, facts), GROWTH)
        for one in facts["crossovers"]:
            console.print(one["said"], highlight=False, soft_wrap=True)
    warm: dict[str, float] = {}
    for facts in found["axes"].values():
        for name, curve in facts["backends"].items():
            warm[name] = max(warm.get(name, 0.0), *curve["first_call_s"])
    if warm:
        told = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in warm.items())
        console.print(f"longest first call, not in the times: {told}", highlight=False, soft_wrap=True)


def turns(found: Mapping[str, Any]) -> dict[str, list[float]]:
    """The seconds of each size on each backend, round by round; without what is impossible."""
    return {
        f"{axis} {size} on {name}": every
        for axis, facts in found["axes"].items()
        for name, curve in facts["backends"].items()
        for size, every in zip(facts["sizes"], curve["all"], strict=True) if every is not None
    }  # fmt: skip


def bench(
    names: Annotated[str, typer.Option(*BACKENDS, help=f"a,b; default: all that run here. {OWN_HELP}")] = "",
    axes: Annotated[str, typer.Option(help=f"Some of {','.join(UNITS)}; default: all.")] = "",
    batch: Annotated[str, typer.Option(help=AXIS_HELP)] = "",
    length: Annotated[str, typer.Option(help=AXIS_HELP)] = "",
    hidden: Annotated[str, typer.Option(help=AXIS_HELP)] = "",
    threads: Annotated[str, typer.Option(help=AXIS_HELP)] = "",
    work: Annotated[str, typer.Option(help="step (training) or inference.")] = "step",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and rounds.")] = False,
    rounds: Annotated[int | None, typer.Option(min=FEWEST_ROUNDS, help=f"Default: {ROUNDS}.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the facts to this file.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Add the times to this file.")] = None,
) -> int:
    """Time a step against batch, length, width and threads. Exit status 1 if a figure is impossible or work differs."""
    if work not in WORK:
        raise UserError(f"--work: expected {' or '.join(WORK)}, got {work!r}")
    given = {"batch": batch, "length": length, "hidden": hidden, "threads": threads}
    sizes, base = plan(given, axes, quick, cores())
    refuse_unwritable(json=json_file, csv=csv_file)
    refuse_other_csv(csv_file)
    places = chosen_backends(names or None, base.threads)
    about, load = fingerprint(places, base.threads), quiet.Load()
    with notes.status("") as status:
        found = measure(places, sizes, base, rounds or (QUICK_ROUNDS if quick else ROUNDS), status.update, work)
    say_where(about)
    show(found)
    disturbance = load.disturbance(base.threads, turns(found))
    say_quiet(disturbance)
    curves = [curve for facts in found["axes"].values() for curve in facts["backends"].values()]
    ok = not any(facts["refused"] for facts in found["axes"].values()) and not any(c["impossible"] for c in curves)
    document = {"bench": "scaling", **about, "disturbance": disturbance, "scaling": found, "ok": ok}
    add_to_csv(csv_file, document)
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    run_main(bench)
