"""Faulty kernels by kind, each modelled on what somebody met: what `minibert check` is held against.

A kernel's file is written as a user writes one, so that `minibert check OP --kernel tests/faults/FILE:FUNCTION=OP`
shows what is said of it. Beside its faults each file has right kernels, named `right_OP`, made of the same parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

KINDS = {
    "sizes": "right until an axis is longer than its writer thought of",
    "values": "right until the numbers are large, small, equal, negative throughout or exactly zero",
    "params": "a parameter is not heeded, or only at its usual value",
    "labels": "ids, labels and lengths: ignored, repeated, large",
    "layout": "right for arrays that lie in memory one after the other",
    "precision": "every digit after the third or fourth is noise",
    "exactness": "single elements lost, counted twice or taken from next door, in a sum so long that it hardly shows",
    "propagation": "NaN or infinity is hidden, or spreads to where it has no business",
    "beyond": "reads or writes outside an array",
    "hang": "never ends",
    "state": "something is kept from one call to another",
    "race": "threads get in each other's way",
    "barrier": "threads wait for others that do not come",
    "formula": "a term, a factor or an axis is wrong",
}


class Fault(NamedTuple):
    """A faulty kernel, and who met its like."""

    name: str  # what is wrong, as a plain sentence
    op: str
    kind: str  # one of KINDS
    file: str  # under tests/faults/
    function: str
    report: str = ""  # where it was reported, as in "pytorch/pytorch#26302"; empty: one of the kinds everybody makes
    by: str = ""  # the demand that finds it; empty: whichever does
    dtype: str = "float32"

    @property
    def spec(self) -> str:
        """What goes behind `--kernel`, from the repository's folder."""
        return f"tests/faults/{self.file}:{self.function}={self.op}"

    def __str__(self) -> str:
        return f"{self.op}-{self.function}"


def faults(folder: str, file: str, *rows: tuple[str, ...]) -> Iterator[Fault]:
    """Rows of (op, function, kind, what is wrong[, report[, the demand that finds it[, dtype]]])."""
    for op, function, kind, name, *rest in rows:
        yield Fault(name, op, kind, f"{folder}/{file}", function, *rest)
