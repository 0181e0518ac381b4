"""The report page as text: what stands on it, what must never stand on it, and what a person reads of it."""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_check.report import Outcome, Report
from minibert.errors import UserError
from minibert.model.checkpoint import write_arrays
from minibert.page import Recorded, read_recorded, wording, write_page
from minibert.page.facts import COLOURS, PLACES, Facts, colours
from tests.page_facts import minibert, small_facts

pytest.importorskip("matplotlib", reason="the page is drawn with matplotlib: pip install 'minibert[report]'")
pytest.importorskip("jinja2", reason="the page is laid out with jinja2: pip install 'minibert[report]'")

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
        self.section = (named.get("id") or "") if tag in ("section", "footer") else self.section
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
    reference, other = facts.step_ms("numpy"), facts.step_ms("numba")
    assert reference is not None and other is not None
    ratio = max(reference, other) / min(reference, other)
    heard = re.search(r"<h1>(.*?)</h1>", page)
    assert heard is not None
    assert f"<em>{wording.significant(ratio)}×</em>" in heard[1]
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
    said = Page(written(tmp_path, facts)).said["spent"]
    assert said.count("unavailable") == 4
    assert said.count("no meter here") == said.count("no price of it") == 2


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
    "energy": ("spent", "not measured"),
    "cost": ("spent", "no price given"),
    "scaling": ("scaling", "Time against size was not measured"),
}


@pytest.mark.parametrize("without", [*MISSING, "ops", "distance", "peaks", "emulated", "versions", "date"])
def test_a_part_that_is_missing_is_left_out(without: str, tmp_path: Path) -> None:
    facts = small_facts(ulps=False)
    del facts[without]
    said = Page(written(tmp_path, facts)).said
    section, words = MISSING.get(without, ("spent", "unavailable"))
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
    said = Page(written(tmp_path, facts)).said
    assert "not measured" in said["near"] and "not measured" in said["errors"]


def test_two_pages_of_the_same_document_are_the_same(page: str, tmp_path: Path) -> None:
    assert written(tmp_path, small_facts()) == page


# ---------------------------------------------------------------------------------------------------------- elsewhere


def test_a_recorded_comparison_is_labelled(tmp_path: Path) -> None:
    facts = small_facts(ulps=False)
    facts["machine"] = {"processor": "Another CPU", "cores": 64}
    facts["date"] = "2026-01-02T03:04:05+00:00"
    (tmp_path / "theirs.json").write_text(json.dumps(facts))
    recorded = read_recorded(tmp_path / "theirs.json")
    assert (recorded.name, recorded.kind) == ("theirs.json", "compare")
    said = Page(written(tmp_path, small_facts(ulps=False), recorded)).said["recorded"]
    assert "Another CPU, 64 cores" in said
    assert "2026-01-02 03:04 UTC" in said
    assert "theirs.json" in said
    assert "The same work as on this page" in said


def test_a_trace_is_read(tmp_path: Path) -> None:
    trace = tmp_path / "numpy.safetensors"
    assert minibert("diff", "numpy", "--tokens", "40", "--max-seq-length", "16", "--record", str(trace)) == 0
    recorded = read_recorded(trace)
    assert recorded.kind == "trace"
    said = Page(written(tmp_path, small_facts(figures=False), recorded)).said["recorded"]
    calls = len(recorded.facts["calls"])
    assert f"{calls} calls of ops" in said
    assert str(recorded.facts["facts"]["machine"]["processor"]) in said


def gpu_check(emulated: bool) -> dict[str, Any]:
    """A document as `make gpu-check` writes it, of a device that does not exist."""
    report = Report(
        "emulator", "Synthetic GPU", "2026-03-04T05:06:07+00:00", "abc1234", "make gpu-check", 500.0, emulated
    )
    host = {"host": {"processor": "Synthetic CPU", "cores": 3}, "backend": "a synthetic driver"}
    share = {"checks": 102, "inputs": 501, "failed": 0, "largest_bound_share": 0.5, "of": "add", "bound_share": {}}
    row = {"op": "gelu", "mode": "float32", "size": "B 8, T 128", "ms": 0.0432, "share": 0.87, "bound_by": "bytes"}
    step = {"ms": 12.3, "tokens_per_s": 81234.0, "mfu": 0.41, "peak_memory": 1e9}
    group = {"batch": 8, "length": 128, "mode": "bfloat16", "results": {"ours, graph": step}}
    figures: dict[str, dict[str, Any]] = {
        "machine": host, "conformance": {"dtypes": {"float32": share}}, "kernels": {"rows": [row]},
        "steps": {"groups": [group]},
    }  # fmt: skip
    report.parts = [Outcome(name, f"the part {name}", True, "ok", figures=f) for name, f in figures.items()]
    report.ok = True
    document: dict[str, Any] = json.loads(json.dumps(report.document()))
    return document


@pytest.mark.parametrize("emulated", [True, False])
def test_a_gpu_check_shows_times_of_a_gpu_alone(emulated: bool, tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(gpu_check(emulated)))
    recorded = read_recorded(tmp_path / "gpu.json")
    assert recorded.kind == "gpu-check"
    said = Page(written(tmp_path, small_facts(figures=False), recorded)).said["recorded"]
    assert "Synthetic GPU on Synthetic CPU, 3 cores" in said and "2026-03-04 05:06 UTC" in said
    assert "the part conformance" in said and "50.0%" in said
    assert ("plays another machine: no times" in said) is emulated
    for time in ("12.3 ms", "81,234", "41.0%", "43.2 µs", "87.0%"):
        assert (time in said) is not emulated
    assert bool(TIME.search(said)) is not emulated


SIDES = {
    "numba": {"median": 0.002, "p20": 0.0019, "p80": 0.0021},
    "torch": {"median": 0.004, "p20": 0.004, "p80": 0.005},
}
MEASURE = {"what": "packed: real text", "refused": "", "impossible": [], "seconds": SIDES, "peak_bytes": {"numba": 5e6}}
ABOUT = {"machine": {"processor": "Synthetic CPU", "cores": 3}, "date": "2026-02-03T04:05:06Z", "ok": True, "peaks": {}}
BENCHES: dict[str, dict[str, Any]] = {
    "bench.step": {**ABOUT, "settings": {"config": "tiny"}, "measures": {"packed": MEASURE}},
    "bench.infer": {**ABOUT, "settings": {"config": "tiny", "logits": False}, "measures": {"packed": MEASURE}},
    "bench.ops": {**ABOUT, "settings": {"batch": 8}, "ops": [{"op": "gelu", "backend": "numba", "ms": 2.0}]},
    "bench.scaling": {
        **ABOUT,
        "scaling": {
            "what": "synthetic",
            "axes": {
                "batch": {
                    "sizes": [1, 2, 4], "unit": "sequences",
                    "backends": {"numba": {"seconds": [2e-3, None, 3e-3], "p20": [2e-3] * 3, "p80": [3e-3] * 3}},
                    "crossovers": [],
                }
            },
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", BENCHES)
def test_documents_of_the_benches_are_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(BENCHES[kind]))
    recorded = read_recorded(tmp_path / "bench.json")
    assert recorded.kind == kind
    page = written(tmp_path, small_facts(figures=False), recorded)
    said = Page(page).said["recorded"]
    assert "Synthetic CPU, 3 cores" in said and "2026-02-03 04:05 UTC" in said
    assert ('id="figure-r0-scaling-0"' if kind == "bench.scaling" else "2.00 ms") in page


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "{", "cannot be read"),
        ("a.json", "[1, 2]", "got another"),
        ("a.json", '{"ops": []}', "got another"),
        ("a.safetensors", "nothing", "a.safetensors"),
        ("gone.json", None, "there is no such file"),
    ],
)
def test_another_file_is_refused_in_one_line(name: str, content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said) as error:
        read_recorded(tmp_path / name)
    assert "\n" not in str(error.value)


def test_weights_are_no_trace(tmp_path: Path) -> None:
    import numpy as np

    write_arrays(tmp_path / "model.safetensors", {"w": np.zeros(3, np.float32)}, {})
    with pytest.raises(UserError, match="another safetensors file"):
        read_recorded(tmp_path / "model.safetensors")


# ------------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_library_is_named(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported: Callable[..., Any] = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".")[0] == library:
            raise ImportError(f"No module named {name!r}")
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"{library}: pip install 'minibert\[report\]'"):
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
