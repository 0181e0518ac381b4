"""The report page as text: what stands on it, what must never stand on it, and what a person reads of it."""

from __future__ import annotations

import builtins
import json
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.errors import UserError, pip_install
from minibert.lab.measure.quiet import load_words
from minibert.lab.measure.roofline import NOTES
from minibert.page import Recorded, wording, write_page
from minibert.page.facts import COLOURS, PLACES, STEP, Facts, colours
from tests.page_facts import TIME, Page, small_facts, with_steps, written

pytest.importorskip("matplotlib", reason=f"the page is drawn with matplotlib: {pip_install('[report]')}")
pytest.importorskip("jinja2", reason=f"the page is laid out with jinja2: {pip_install('[report]')}")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("page"), small_facts())


def test_every_figure_is_there(page: str) -> None:
    drawn = {name for name in Page(page).ids if name.startswith("figure-")}
    single = ["stages", "peaks", "memory", "roofline", "headroom", "losses", "bounds", "scaling-0", "scaling-1"]
    assert {f"figure-{name}" for name in single} <= drawn
    ops = {row["op"] for row in small_facts()["ops"]}
    assert len([name for name in drawn if name.startswith("figure-ulp")]) == len(ops)


def test_the_page_is_small(page: str) -> None:
    assert len(page.encode()) < 1_500_000


def test_nothing_is_fetched(page: str) -> None:
    for tag, attributes in Page(page).tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, name, attributes[name])
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "<link" not in page
    assert "default-src 'none'" in page


def test_ids_are_unique_and_every_reference_has_its_target(page: str) -> None:
    read = Page(page)
    assert len(read.ids) == len(set(read.ids))
    wanted = set(re.findall(r"url\(#([^)]+)\)", page))
    wanted |= {a["href"][1:] for _, a in read.tags if a.get("href")}  # type: ignore[index]
    wanted |= {name for _, a in read.tags for name in (a.get("aria-labelledby") or "").split()}
    assert wanted
    assert wanted <= set(read.ids)


def test_figures_can_be_heard(page: str) -> None:
    figures = [a for tag, a in Page(page).tags if tag == "svg"]
    assert len(figures) > 20
    assert all(a.get("role") == "img" and a.get("aria-labelledby") for a in figures)
    assert page.count("<title id=") == page.count("<desc id=") == len(figures)


def test_no_colour_or_font_of_matplotlib_is_left(page: str) -> None:
    drawings = "".join(re.findall(r"<svg class=\"figure\".*?</svg>", page, flags=re.DOTALL))
    assert set(re.findall(r"(?:fill|stroke): *(#[0-9a-f]+)", drawings)) == set()
    assert "DejaVu" not in drawings
    assert "<style" not in drawings
    assert "var(--b0)" in drawings and "var(--b1)" in drawings and "var(--text)" in drawings


def test_the_headline_has_the_verdict_and_the_largest_number(page: str) -> None:
    facts = Facts(small_facts())
    seconds = {(row.backend, row.stage): np.array(row.each) for row in facts.stages}
    numpy, numba = (sum(seconds[name, stage] for stage in STEP) for name in ("numpy", "numba"))
    pairs = numpy / numba if np.median(numpy / numba) >= 1 else numba / numpy
    p20, ratio, p80 = np.percentile(pairs, [20, 50, 80])
    heard = re.search(r"<h1>(.*?)</h1>", page)
    assert heard is not None
    assert f"<em>{wording.significant(ratio)}×</em>" in heard[1]
    below = f"The {wording.times(ratio)} is the median of 2 steps taken in turns (p20 {wording.times(p20)}, p80 "
    assert f"{below}{wording.times(p80)}), at {load_words(facts.disturbance)}." in page
    assert "PASS" in page and "FAIL" not in page


def test_the_table_has_a_row_for_each_op_and_backend(page: str) -> None:
    facts = small_facts()
    table = page[page.index('id="op-table"') :]
    table = table[: table.index("</table>")]
    assert table.count('<tr data-name="numpy"') == len([r for r in facts["ops"] if r["backend"] == "numpy"])
    assert table.count('<tr data-name="numba"') == len([r for r in facts["ops"] if r["backend"] == "numba"])
    for row in facts["ops"]:
        assert f'data-value="{float(row["ms"])!r}"' in table
        assert f'data-value="{float(row["bound_share"])!r}"' in table


def test_what_is_unavailable_is_said_with_its_reason(tmp_path: Path) -> None:
    facts = small_facts(figures=False)
    facts["energy"] = {"source": None, "why": "no meter here", "joules_per_step": {"numpy": None, "numba": None}}
    facts["cost"] = {"numpy": {"unavailable": "no price of it"}, "numba": {"unavailable": "no price of it"}}
    said = Page(written(tmp_path, facts)).said
    assert "spent" not in said, "a line is enough"
    assert (
        said["footer"].count("unavailable: no meter here") == said["footer"].count("unavailable: no price of it") == 1
    )
    facts["cost"]["numpy"] = {"per_million_tokens": 0.125, "currency": "EUR", "basis": "0.10 EUR an hour"}
    said = Page(written(tmp_path, facts)).said
    assert "0.125 EUR" in said["spent"] and "no price of it" in said["spent"]
    assert "energy" not in said["spent"].replace("Energy and cost", "")
    assert said["footer"].count("no meter here") == 1 and "price" not in said["footer"]


def test_energy_and_cost_are_shown_where_they_were_read(tmp_path: Path) -> None:
    facts = small_facts(figures=False)
    facts["energy"] = {"source": "RAPL package-0", "why": "", "joules_per_step": {"numpy": 2.5, "numba": None}}
    facts["cost"]["numpy"] = {"per_million_tokens": 0.125, "currency": "EUR", "basis": "0.10 EUR an hour"}
    said = Page(written(tmp_path, facts)).said["spent"]
    assert "2.50 J" in said and "RAPL package-0" in said
    assert "0.125 EUR" in said and "0.10 EUR an hour" in said


def test_of_an_emulated_backend_no_time_is_shown(tmp_path: Path) -> None:
    """The same document, with Numba declared to play another machine: nothing of its times may be left."""
    facts = small_facts(ulps=False)
    facts["emulated"] = ["numba"]
    text = written(tmp_path, facts)
    assert "plays another machine" in text
    rows = re.findall(r'<tr data-name="numba".*?</tr>', text, flags=re.DOTALL)
    assert rows
    for row in rows:
        assert not TIME.search(re.sub(r"<[^>]+>", " ", row)), row
        assert row.count('data-value=""') >= 5
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    owned = [re.findall(r"<title>([^<]*numba[^<]*)</title>", drawing) for drawing in drawings]
    assert [said for found in owned for said in found if TIME.search(said)] == []
    for step in (facts["ops"][-1]["ms"], facts["stages"][-1]["ms_per_sample"]):
        assert wording.milliseconds(step) not in Page(text).said["stages"]


def test_what_files_say_is_only_text(tmp_path: Path) -> None:
    hostile = '<script>alert("x")</script><img src=x onerror=alert(1)>\'"&'
    text = json.dumps(small_facts(ulps=False)).replace('"numba"', json.dumps(hostile))
    facts = json.loads(text)
    facts["machine"] = {"processor": hostile, "cores": 2, hostile: hostile}
    facts["config"]["summary"] = facts["date"] = facts["command"] = hostile
    facts["versions"] = {hostile: hostile}
    facts["energy"]["why"] = hostile
    facts["scaling"]["what"] = hostile
    facts["scaling"]["axes"][hostile] = facts["scaling"]["axes"].pop("batch")
    for row in facts["ops"]:
        row["by"] = row["limit"] = hostile
        row["op"] = f"{row['op']}{hostile}"
    other = Recorded(hostile, "compare", facts)
    page = written(tmp_path, facts, other)
    tags = [tag for tag, _ in Page(page).tags]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert "onerror=alert(1)&gt;" in page or "onerror=alert(1)" in page
    assert "<script>alert" not in page


def test_a_wrong_op_is_the_headline(tmp_path: Path) -> None:
    facts = small_facts(ulps=False)
    facts["ok"] = False
    row = next(r for r in facts["ops"] if (r["op"], r["backend"]) == ("gelu_grad", "numba"))
    row |= {"ok": False, "bound_share": None}
    page = written(tmp_path, facts)
    assert "<h1><em>gelu_grad on numba</em> leaves the error bound of the formula.</h1>" in page
    assert "FAIL" in page
    first = page[page.index("<tbody>", page.index('id="op-table"')) :].split("</tr>")[0]
    assert "gelu_grad" in first and "not finite" in first and "WRONG" in first


MISSING = {
    "stages": ("stages", "No stage was timed"),
    "loss": ("errors", "No loss was recorded"),
    "memory": ("stages", "Memory over time was not measured"),
    "energy": ("footer", "energy of a step unavailable: not measured"),
    "cost": ("footer", "cost of tokens unavailable: no price given"),
    "disturbance": ("footer", "measured at load not known"),
    "scaling": ("scaling", "Time against size was not measured"),
}


@pytest.mark.parametrize("without", [*MISSING, "ops", "distance", "peaks", "emulated", "versions", "date"])
def test_a_part_that_is_missing_is_left_out(without: str, tmp_path: Path) -> None:
    facts = small_facts(ulps=False)
    del facts[without]
    said = Page(written(tmp_path, facts)).said
    section, words = MISSING.get(without, ("footer", "unavailable"))
    assert words in said[section]


def test_a_document_in_which_all_is_null_or_of_another_kind_makes_a_page(tmp_path: Path) -> None:
    facts = small_facts(ulps=False)
    kept = ("backends",)
    for other in (None, 3, "text", [1, "a", None], {"numpy": 3, "axes": 4}):
        Page(written(tmp_path, {k: v if k in kept else other for k, v in facts.items()}))
    Page(written(tmp_path, {}))


def test_an_older_document_makes_a_page(tmp_path: Path) -> None:
    """Before times of each step, ulps, peaks and memory were written."""
    new = small_facts(ulps=False)
    facts = {k: new[k] for k in ("machine", "config", "backends", "loss", "distance", "ok")}
    kept = ("op", "backend", "by", "calls", "judged", "ms", "share", "gflops", "gbps", "bound_share", "ok")
    facts["ops"] = [{k: row[k] for k in kept} for row in new["ops"]]
    facts["stages"] = [{k: row[k] for k in row if k not in ("seconds", "energy_j")} for row in new["stages"]]
    for row in facts["ops"]:
        row["limit_share"] = 2.8
    page = written(tmp_path, facts)
    said = Page(page).said
    assert "not measured" in said["near"] and "not measured" in said["errors"]
    assert " as fast" not in page, "how far it spreads is not known"
    assert said["ops"].count("280.0% unexplained") == len(facts["ops"])


def test_shares_above_the_limit_are_marked(tmp_path: Path) -> None:
    facts = small_facts(ulps=False)
    marked = [(2.81, "cache"), (None, "impossible"), (1.02, "launch"), *[(0.5, "")] * len(facts["ops"])]
    for row, (share, note) in zip(facts["ops"], marked, strict=False):
        row |= {"limit": "memory", "limit_share": share, "note": note}
    page = written(tmp_path, facts)
    said = " ".join(Page(page).said["ops"].split())
    assert "281.0% cache" in said and "102.0% launch" in said and "50.0% memory" in said and "– impossible" in said
    for word in ("cache", "impossible", "launch"):
        assert f"{word}: {NOTES[word]}" in said
    assert "view:" not in said and page.count("Hollow: ") == 1


def test_a_machine_that_was_not_quiet_is_told(tmp_path: Path) -> None:
    facts = small_facts(figures=False)
    facts["disturbance"] = {"load": 0.25, "others": 0.01, "cores": 2, "why": []}
    quiet = written(tmp_path, facts)
    assert "not quiet" not in quiet
    assert "load 0.25 on 2 cores, 0.01 of them busy with other programs" in Page(quiet).said["footer"]
    facts["disturbance"]["why"] = ["a program <b>ran</b>", "another too"]
    busy = written(tmp_path, facts, Recorded("other.json", "compare", facts))
    said = "The machine was not quiet: a program &lt;b&gt;ran&lt;/b&gt;; another too. Measure again when it is"
    assert f'<p class="warning">{said}' in busy and f"busy with other programs. {said}" in busy


def test_one_slow_step_leaves_figures_their_scale_and_the_terminal_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    documents = [with_steps(small_facts(ulps=False), times) for times in (1.0, 50.0)]
    for facts in documents:
        facts["scaling"]["axes"]["批次"] = facts["scaling"]["axes"].pop("batch")  # which its own fonts have not
    capfd.readouterr()  # the first that asks for facts measures them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pages = [written(tmp_path, facts) for facts in documents]
    assert caplog.records == [] and capfd.readouterr() == ("", "")
    assert "批次" in pages[0] and logging.getLogger("matplotlib").handlers, "or its log would be printed"
    even, slow = ([reach(path) for path in re.findall(r"<path d=\"([^\"]+)\"", drawing(text))] for text in pages)
    assert even and max(slow) <= 1.2 * max(even)
    assert ["An arrow: it goes on" in text for text in pages] == [False, True]
    longest = wording.milliseconds(50 * Facts(documents[0]).stages[-1].each[0])
    assert f"to {longest}</title>" in pages[1], "pointed at, the bar tells it"


def drawing(page: str) -> str:
    """The figure of the stages' times."""
    found = re.search(r'<figure[^>]*id="figure-stages">.*?</figure>', page, flags=re.DOTALL)
    assert found is not None
    return found[0]


def reach(path: str) -> float:
    """How far right a path goes."""
    return max(float(x) for x in re.findall(r"[ML] ([-\d.]+) ", path))


def test_two_pages_of_the_same_document_are_the_same(page: str, tmp_path: Path) -> None:
    assert written(tmp_path, small_facts()) == page


# ------------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_library_is_named(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported: Callable[..., Any] = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".")[0] == library:
            raise ImportError(f"No module named {name!r}")
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"{library}: pip install 'minibert-lab\[report\]'"):
        write_page(tmp_path, {})


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="expected a folder that can be written"):
        write_page(tmp_path / "taken", {})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.99996, "1.00"), (9.996, "10.0"), (123456.7, "123,457"), (1.07e-7, "1.1×10⁻⁷"), (1e-7, "1.0×10⁻⁷"),
        (-2.5, "-2.50"), (None, "–"), (9.96e-8, "1.0×10⁻⁷"),
    ],
)  # fmt: skip
def test_numbers_in_words(value: float | None, text: str) -> None:
    assert wording.significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1500.0, "1.50 s"), (2.0, "2.00 ms"), (0.0123, "12.3 µs"), (0.99999, "1.00 ms"), (None, "–")]
)
def test_times_in_words(value: float | None, text: str) -> None:
    assert wording.milliseconds(value) == text


def test_a_share_just_below_its_limit_does_not_look_as_if_it_had_reached_it() -> None:
    assert wording.percent(0.99996) == "99.99%"
    assert wording.percent(1.0) == "100.0%"
    assert wording.percent(1.00004) != "99.99%"


def test_backends_keep_their_colours_and_strangers_get_free_ones() -> None:
    assert colours(["numba", "numpy"]) == {"numba": COLOURS["numba"], "numpy": COLOURS["numpy"]}
    many = colours(["numpy", "a", "b", "c", "d"])
    assert many["numpy"] == COLOURS["numpy"]
    assert len({many["a"], many["b"]} | set(COLOURS.values())) == PLACES
    assert all(0 <= place < PLACES for place in many.values())
