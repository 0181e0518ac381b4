"""The stage report: what `minibert compare` found, and what other machines recorded, as one page that needs no network.

`write_page` makes it. facts.py reads the document, wording.py says it, figures.py and curves.py draw it (matplotlib, as
SVG whose colours are the page's), recorded.py shows results of other runs, page.html.jinja lays all of it out. Whatever
comes from a file is text to the page: it is escaped, and the page allows no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from minibert.errors import UserError, pip_install
from minibert.lab.measure.quiet import load_words, warning
from minibert.lab.measure.roofline import NOTES
from minibert.page import wording
from minibert.page.cards import card
from minibert.page.curves import WIDE, crossovers, roofline
from minibert.page.distances import losses, nearest_to_bound, ulp_histograms
from minibert.page.facts import STAGES, Facts, OpRow, mapping
from minibert.page.figures import headroom, memory_over_time, stage_memory, stage_times
from minibert.page.recorded import Recorded, read_recorded
from minibert.page.svg import Drawing, drawn_for_the_page

__all__ = ["Recorded", "read_recorded", "write_page"]


class Column(NamedTuple):
    """A column of the table of ops. `bar`: the value is a share, shown as a bar as well."""

    key: str
    title: str
    hint: str
    bar: bool = False


COLUMNS = (
    Column("ms", "time", "of one training step"),
    Column("share", "of step", "share of the step's time", True),
    Column("limit_share", "of limit", "the roofline's time over the measured; above 100 % the note says why", True),
    Column("bound_share", "of bound", "largest error over what the formula allows any evaluation in this dtype", True),
    Column("err_over_us", "err/uS", "largest error in roundoffs of the sum of absolute terms"),
    Column("ulp_max", "max ulp", "largest error in units in the last place"),
    Column("gflops", "GFLOP/s", "billions of operations a second that the formula cannot avoid"),
    Column("gbps", "GB/s", "billions of bytes a second that the formula cannot avoid"),
    Column("calls", "calls", "in one training step"),
)


class Cell(NamedTuple):
    """What a cell says, what it sorts by (empty: last), and the length of its bar from 0 to 1 (empty: none)."""

    text: str
    value: str
    bar: str


def write_page(folder: Path, facts: Mapping[str, Any], others: Sequence[Recorded] = ()) -> Path:
    """Write folder/index.html: the comparison `facts` (as `lab.compare` makes them), and results recorded elsewhere.

    Raises UserError where the folder cannot be written, or matplotlib or jinja2 is missing.
    """
    page = render(Facts(facts), others)
    path = folder / "index.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--report {folder}: expected a folder that can be written, got: {error}") from error
    return path


def render(facts: Facts, others: Sequence[Recorded] = ()) -> str:
    """The page as text."""
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise UserError(f"--report is laid out with jinja2: {pip_install('[report]')}") from error
    script = _own("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["drawn"] = Markup  # figures alone: their text is escaped where it is put in
    environment.globals |= {
        name: getattr(wording, name) for name in ("milliseconds", "megabytes", "percent", "significant")
    }
    with drawn_for_the_page():
        shown = {**_figures(facts), "cards": [card(one, i, facts) for i, one in enumerate(others)]}
    return environment.from_string(_own("page.html.jinja")).render(
        facts=facts, style=Markup(_own("style.css")), script=Markup(script), digest=digest,
        headline=wording.headline(facts), tiles=_tiles(facts), about=wording,
        spent=wording.spent(facts), unspent=dict(wording.unspent(facts)),
        load=load_words(facts.disturbance), warning=wording.sentence(warning(facts.disturbance)), notes=_notes(facts),
        columns=COLUMNS, op_rows=[(row, _cells(row)) for row in _ordered(facts)], first_order=_first_order(facts),
        colours={b.name: b.colour for b in facts.backends}, stage_names=STAGES,
        versions=mapping(facts.document.get("versions")), **shown,
    )  # fmt: skip


def _own(name: str) -> str:
    return resources.files("minibert.page").joinpath(name).read_text(encoding="utf-8")


def _figures(facts: Facts) -> dict[str, Any]:
    single: dict[str, Drawing | None] = {
        "stages": stage_times(facts), "peaks": stage_memory(facts), "memory": memory_over_time(facts),
        "losses": losses(facts), "roof": roofline(facts), "wide_roof": roofline(facts, WIDE),
        "headroom": headroom(facts), "bounds": nearest_to_bound(facts),
    }  # fmt: skip
    return {
        **single,
        "ulps": ulp_histograms(facts),
        "scaling": crossovers(facts.scaling, facts.emulated, {b.name: b.colour for b in facts.backends}),
    }


def _first_order(facts: Facts) -> str:
    """The column that the table of ops is sorted by when the page opens: errors, where one is wrong, else time."""
    return "ms" if facts.ok and facts.timed else "bound_share"


def _ordered(facts: Facts) -> list[OpRow]:
    if _first_order(facts) == "ms":
        return sorted(facts.ops, key=lambda row: -(row.ms or 0.0))
    return sorted(facts.ops, key=lambda row: -row.severity)


def _notes(facts: Facts) -> str:
    """What the notes in the table mean, of those that are there."""
    met = {row.note for row in facts.ops}
    return "; ".join(f"{word}: {meaning}" for word, meaning in NOTES.items() if word in met)


def _cells(row: OpRow) -> list[Cell]:
    made = []
    for column in COLUMNS:
        value: float | None = getattr(row, column.key)
        text = wording.significant(value)
        if column.key == "ms":
            text = wording.milliseconds(value)
        elif column.bar:
            text = wording.percent(value)
        elif column.key == "calls":
            text = wording.whole(value)
        if column.key == "bound_share" and value is None and not row.ok:
            made.append(Cell("not finite", "Infinity", "1"))
            continue
        bar = f"{min(value, 1.0):.3f}" if column.bar and value is not None else ""
        made.append(Cell(text, "" if value is None else repr(value), bar))
    return made


class Tile(NamedTuple):
    """One large figure below the headline."""

    figure: str
    what: str


def _tiles(facts: Facts) -> list[Tile]:
    """The verdict in four or five figures."""
    good, names = sum(row.ok for row in facts.ops), [b.name for b in facts.backends]
    tiles = [Tile(f"{good} / {len(facts.ops)}", f"results of ops within their error bound, {wording.joined(names)}")]
    apart = facts.largest_distance("loss")
    if apart is not None:
        tiles.append(Tile(wording.significant(apart, 2), "largest distance of a loss, relative"))
    for b in facts.timed:
        step = facts.step_ms(b.name)
        if step:
            tiles.append(Tile(wording.milliseconds(step), f"a training step on {b.name}, per sequence"))
    for b in facts.timed:
        share = facts.roof_share(b.name)
        if share is not None:
            tiles.append(Tile(f"{share:.0%}", f"of its roofline: a step on {b.name}"))
    return tiles
