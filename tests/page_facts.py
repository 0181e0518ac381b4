"""What a real, small comparison of NumPy and Numba found, and a page of it as text, for tests of the report page."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from minibert import backends
from minibert.cli import main
from minibert.lab.measure.scaling import Base, measure
from minibert.page import Recorded, write_page
from tests.small_steps import smaller_tiny

VOID = {"meta", "link", "br", "img", "input", "hr"}
TIME = re.compile(r"\d\s?(?:ns|µs|ms|s|GFLOP/s|GB/s|tokens/s)\b")


class Page(HTMLParser):
    """The page's elements, and the text of each section; an element that is not closed is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.section = ""
        self.said: dict[str, str] = {}
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append((tag, named))
        self.ids += [named["id"]] if named.get("id") else []
        if tag in ("section", "footer"):
            self.section = named.get("id") or tag
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.said[self.section] = f"{self.said.get(self.section, '')} {data}"


def written(folder: Path, facts: Mapping[str, Any], *others: Recorded) -> str:
    return write_page(folder, facts, others).read_text(encoding="utf-8")


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
    with tempfile.TemporaryDirectory() as folder, smaller_tiny(), pytest.MonkeyPatch.context() as patch:
        file = Path(folder) / "facts.json"
        patch.setattr("minibert.lab.measure.peaks.ROUNDS", 2)  # they need not be the best
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


def with_steps(facts: dict[str, Any], times: float, backend: str = "numba") -> dict[str, Any]:
    """The same run, had it timed five even steps, but for one of a backend that took so many times as long."""
    for row in (*facts["stages"], *facts["ops"]):
        taken = median(row["seconds"])
        row["seconds"] = [taken, taken, taken, taken * (times if row["backend"] == backend else 1.0), taken]
    return facts
