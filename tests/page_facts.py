"""What a real, small comparison of NumPy and Numba found, for tests of the report page."""

from __future__ import annotations

import json
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from minibert import backends
from minibert.cli import main
from minibert.lab.measure.scaling import Base, measure
from tests.small_steps import smaller_tiny

AXES = {"batch": (1, 2), "length": (8, 16)}
FEW = ("linear", "attention", "gelu_grad", "adamw")


def minibert(*arguments: str) -> int:
    """The exit status of a command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["minibert", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
    return int(stop.value.code or 0)


@cache
def _written() -> str:
    with tempfile.TemporaryDirectory() as folder, smaller_tiny():
        file = Path(folder) / "facts.json"
        sizes = ["--tokens", "60", "--max-seq-length", "24", "--steps", "3"]
        assert minibert("compare", "--backends", "numpy,numba", *sizes, "--json", str(file)) == 0
        facts = json.loads(file.read_text())
    places = [backends.get("numpy"), backends.get("numba")]
    facts["scaling"] = measure(places, AXES, Base(batch=1, length=8, hidden=64), rounds=3)
    return json.dumps(facts)


def small_facts(ulps: bool = True, figures: bool = True) -> dict[str, Any]:
    """The document, a copy that may be changed; it is measured once in a process.

    What is drawn takes most of a page's time: without `ulps` there are a few ops, and no figure for each; without
    `figures` none at all.
    """
    document: dict[str, Any] = json.loads(_written())
    if not ulps:
        document["ops"] = [row for row in document["ops"] if row["op"] in FEW]
        for row in document["ops"]:
            del row["ulps"]
    for drawn in ("ops", "stages", "memory", "loss", "scaling") if not figures else ():
        del document[drawn]
    return document
