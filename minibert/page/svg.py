"""A figure of matplotlib as inline SVG: it takes the page's colours and font, and its ids are its own.

Colours are drawn as tokens, hex values that stand for nothing but a CSS variable, and replaced in the text that
matplotlib writes. So the same figure is light and dark.
"""

from __future__ import annotations

import html
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from minibert.errors import UserError, pip_install
from minibert.page.facts import PLACES

NAMES = ("text", "muted", "grid", "band", "paper", "bad", *(f"b{place}" for place in range(PLACES)))
TOKENS = {name: f"#0101{i + 1:02x}" for i, name in enumerate(NAMES)}
POINTS = 72.0  # units of the SVG in matplotlib's inch
FONT_SIZE = 12.0  # units; a figure of 350 units is shown on 329 pixels of a phone


# What matplotlib has to say, of its cache of fonts for example, is for who listens, not for a terminal.
logging.getLogger("matplotlib").addHandler(logging.NullHandler())


class Drawing(NamedTuple):
    """A figure as text to be put into the page."""

    name: str
    title: str
    svg: str
    caption: str


def matplotlib() -> Any:
    """The library, without a window. Raises UserError where it is missing."""
    try:
        import matplotlib
        import matplotlib.backends.backend_agg  # pyplot would look for a screen
        import matplotlib.figure
    except ImportError as error:
        raise UserError(f"--report draws with matplotlib: {pip_install('[report]')}") from error
    return matplotlib


@contextmanager
def drawn_for_the_page() -> Iterator[None]:
    """A block in which matplotlib draws in the page's way."""
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": "minibert", "font.size": FONT_SIZE, "text.color": TOKENS["text"],
        "axes.edgecolor": TOKENS["grid"], "axes.labelcolor": TOKENS["muted"], "axes.facecolor": "none",
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": False,
        "axes.labelsize": FONT_SIZE, "axes.titlesize": FONT_SIZE, "axes.titlelocation": "left",
        "xtick.color": TOKENS["muted"], "ytick.color": TOKENS["muted"], "xtick.labelsize": FONT_SIZE,
        "ytick.labelsize": FONT_SIZE, "xtick.major.size": 3, "ytick.major.size": 0, "xtick.minor.size": 0,
        "ytick.minor.size": 0, "grid.color": TOKENS["grid"], "grid.linewidth": 0.7, "lines.linewidth": 1.8,
        "figure.facecolor": "none", "savefig.facecolor": "none", "text.parse_math": False,
    }  # fmt: skip
    with matplotlib().rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has fonts of its own
        yield


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many units, which leaves room for its labels by itself."""
    library = matplotlib()
    figure = library.figure.Figure(figsize=(width / POINTS, height / POINTS), dpi=POINTS, layout="constrained")
    library.backends.backend_agg.FigureCanvasAgg(figure)  # measures text, where labels must not hide each other
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)
    return figure


class Tips:
    """What a point says when it is pointed at, and whose it is."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int | None]] = []

    def gid(self, text: str, colour: int | None = None) -> str:
        """An id for an artist."""
        self.said.append((text, colour))
        return f"tip-{len(self.said) - 1}-"


def inline(figure: Any, name: str, title: str, description: str, tips: Tips) -> str:
    """The figure's SVG, to be put into HTML: no id, colour or font of matplotlib's is left."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    written = file.getvalue()
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', written)
    assert box is not None  # matplotlib writes one
    body = written[written.index("<svg") :]
    body = body[body.index(">") + 1 : body.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)  # would hold for the whole page
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r' (?:d|x|y|points|transform)="[^"]*"', _hundredths, body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _variable, body)
    body = re.sub(r'<g id="tip-(\d+)-">', lambda found: _tip(tips, int(found[1])), body)
    body = re.sub(r'<g id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick)[^"]*">', "<g>", body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    width, height = box[1], box[2]
    return (
        f'<svg class="figure" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc" style="--units: {width}">'
        f'<title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-desc">{html.escape(description)}</desc>{body}</svg>'
    )


def _hundredths(found: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", found[0])


def _variable(found: re.Match[str]) -> str:
    name = next((name for name, token in TOKENS.items() if token == found[2]), None)
    return found[0] if name is None else f"{found[1]}: var(--{name})"


def _tip(tips: Tips, index: int) -> str:
    text, colour = tips.said[index]
    mark = "" if colour is None else f' class="mark" data-colour="{colour}"'
    return f"<g{mark}>" + (f"<title>{html.escape(text)}</title>" if text else "")
