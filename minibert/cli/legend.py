"""Below each table one line says what its columns mean: the words are here, for all commands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from rich.table import Table

from minibert.cli.options import console, fit

ULP_HELP = "Show errors in units in the last place too; they are large wherever terms cancel, right or wrong."

MEANINGS = {
    "by": "a kernel, a library or the formula",
    "gradient": "against the exact derivative",
    "judged": "calls held to the bound",
    "max ulp": "error in units in the last place, large where terms cancel",
    "exact": "share of elements that are the formula's, rounded",
    "to 1 ulp": "share of elements that near",
    "err/uS": "error in roundings of the sum of absolute terms",
    "of bound": "largest share of the error that the formula allows, right up to 100%",
    "MFLOP": "millions of operations",
    "MB": "megabytes moved, both in a step of MiniLM",
    "calls": "in a step",
    "ms": "median milliseconds",
    "p20": "20th percentile",
    "p80": "80th",
    "share": "of the step",
    "GFLOP/s": "billions of operations a second",
    "GB/s": "billions of bytes a second",
    "ms/sample": "milliseconds a sequence",
    "us/token": "microseconds a token",
    "peak MB": "megabytes above those before",
}


def legend(columns: Iterable[str], more: Mapping[str, str] | None = None) -> str:
    """One line on those columns whose names do not say all, in their order; `more` goes before what is said of all.

    `numba max ulp` is a `max ulp`; of `x numpy` is said that it is how many times as fast as numpy.
    """
    known, said = {**MEANINGS, **(more or {})}, {}
    for column in columns:
        times = re.fullmatch(r"x (\S+)", column)
        name = next((name for name in (column, column.partition(" ")[2]) if name in known), "")
        if name:
            said[name] = known[name]
        elif times:
            said[column] = f"times as fast as {times[1]}"
    return "; ".join(f"{name}: {meaning}" for name, meaning in said.items())


def show(table: Table, more: Mapping[str, str] | None = None) -> None:
    """Print a table as wide as the terminal allows, and below it what its columns mean.

    `more` is what is said of its own columns; those that had to be left out are named.
    """
    left = fit(table)
    if title := table.title:  # by itself: rich would wrap it at the table's width
        table.title = None
        console.print(title, style="bold", highlight=False, soft_wrap=True)
    console.print(table)
    line = legend([str(column.header) for column in table.columns], more)
    if left:
        line += f"{'; ' if line else ''}left out of so narrow a terminal: {', '.join(left)}"
    if line:
        console.print(line, highlight=False, markup=False)
    if title:  # one of several
        console.print()
