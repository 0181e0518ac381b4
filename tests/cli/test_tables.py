"""Tables of the command line: what stands in them, what is said below them, and how wide they are."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from rich.console import Console

import minibert
from minibert import backends
from minibert.cli import app, bisect, check, compare, diff, diff_report, legend, main, options, pretrain, tables, watch  # noqa: F401  they register their commands
from minibert.cli.tables import formula_of, kernels_of
from minibert.kernels import OPS
from minibert.lab.conform.judge import Judgement
from minibert.lab.lockstep.assess import Assessment
from minibert.lab.lockstep.diff import Difference, Row
from minibert.lab.lockstep.trace import Side

Shown = Callable[..., str]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shown:
    """What a command that succeeds prints on a terminal so wide, or into a pipe."""

    def run(*words: str, width: int = options.PIPED_WIDTH) -> str:
        console = Console(width=width)
        for module in (bisect, check, compare, diff, legend, options, tables):
            monkeypatch.setattr(module, "console", console)
        monkeypatch.setattr(sys, "argv", ["minibert", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return printed.out

    return run


def test_the_version(shown: Shown) -> None:
    assert shown("--version") == f"minibert {minibert.__version__}\n"


def test_each_formula_stands_by_itself() -> None:
    formulas = {name: formula_of(op) for name, op in OPS.items()}
    assert all(formulas.values())
    leaning = re.compile(r"\bthe same\b|\bas above\b|\bformer\b|\blatter\b|^its\b|^ditto\b")
    assert not {name: text for name, text in formulas.items() if leaning.search(text)}


def test_kernels_for_cuda_are_told_without_a_gpu_and_without_a_compiler(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = [backends.Status("numpy", backends.get("numpy"), "")]
    monkeypatch.setattr(backends, "available", lambda: here)
    monkeypatch.setattr(backends, "_load", lambda name: pytest.fail(f"{name} was loaded"))
    rows = {
        row.split()[0]: row.split()[1:4]
        for row in shown("ops", "softmax", "linear", "reshape").splitlines()
        if row.strip()
    }
    assert rows["op"] == ["numpy", "cuda", "gradient"]
    assert rows["softmax"][:2] == ["formula", "kernel"]
    assert rows["linear"][:2] == ["formula", "library"]
    assert rows["reshape"][:2] == ["formula", "formula"]
    assert list(kernels_of("emulator,numpy,cupy")) == ["emulator", "numpy", "cupy"]


def test_the_column_of_cuda_is_what_the_emulator_says() -> None:
    try:
        emulator = backends.get("emulator")
    except backends.BackendUnavailable as error:
        pytest.skip(str(error))
    assert [tables.CUDA.by(op) for op in OPS.values()] == [emulator.by(op) for op in OPS.values()]


def test_a_line_below_a_table_says_what_its_columns_mean(shown: Shown) -> None:
    for words in (("check", "add", "--backend", "numpy"), ("ops", "add", "--backend", "numpy"), ("backends",)):
        lines = [line.rstrip() for line in shown(*words).splitlines()]
        rule = next(i for i, line in enumerate(lines) if line.lstrip().startswith("──"))
        columns, below = lines[rule - 1], lines[lines.index("", rule) + 1]
        said = re.findall(r"(?:^|; )([^:;]+): ", below)
        assert said and all(name in columns for name in said), below


def test_units_in_the_last_place_are_shown_on_request_alone(shown: Shown) -> None:
    plain, asked = (shown("check", "add", "--backend", "numpy", *more) for more in ((), ("--ulp",)))
    assert "ulp" not in plain
    assert "max ulp" in asked and "large where terms cancel" in asked


COMMANDS = ("check", "compare", "ops", "watch", "pretrain")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_backend_is_named_by_either_option_wherever_one_is(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    both = [set(parameter.opts) for parameter in command.params if "--backend" in parameter.opts]
    assert both == [{"--backend", "--backends"}]


@pytest.mark.parametrize("name", ("check", "compare", "diff", "bisect", "watch"))
def test_ulp_is_an_option_wherever_errors_are_shown(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert any("--ulp" in parameter.opts for parameter in command.params)


@pytest.mark.parametrize("words", [("ops",), ("check", "linear_cross_entropy", "softmax", "--backend", "numpy")])
def test_a_terminal_of_80_columns_cuts_no_word(shown: Shown, words: tuple[str, ...]) -> None:
    lines = shown(*words, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    whole = shown(*words)
    assert "…" not in "".join(lines)
    words_of = re.compile(r"[a-z]+")
    said = {word for line in lines for word in words_of.findall(line)}
    assert said <= set(words_of.findall(whole + "left out of so narrow a terminal"))


def test_a_narrow_terminal_says_which_columns_it_lacks(shown: Shown) -> None:
    words = ("check", "softmax", "--backend", "numpy")
    narrow, whole = shown(*words, width=70), shown(*words)
    assert "err/uS" in whole and "left out" not in whole
    assert "left out of so narrow a terminal: err/uS" in " ".join(narrow.split())
    assert len(re.findall("err/uS", narrow)) == 1


def test_all_columns_of_a_diff_are_shown_or_said_to_be_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    side, right = Side(backends.get("numpy")), Assessment(Judgement(0.0, 0.0, 0.0, True, None, "", 0))
    row = Row(1, "linear", "forward", "bert.encoder.layer.0.attention.self", ((3,),), right, right, right, None, None)
    for width in (70, 100, 130, options.PIPED_WIDTH):
        monkeypatch.setattr(options, "console", Console(width=width))
        monkeypatch.setattr(legend, "console", options.console)
        legend.show(diff_report.table(Difference(side, side, rows=[row]), True, "", ulp=True))
        header, _, below = " ".join(capsys.readouterr().out.split()).partition("──")
        below = below.partition("left out of so narrow a terminal: ")[2]
        told = [name for name in (column.name for column in diff_report.COLUMNS) if name not in f"{header} {below}"]
        assert not told and bool(below) == (width < options.PIPED_WIDTH)


def test_into_a_pipe_goes_each_row_on_one_line(root: Path) -> None:
    """The whole way once, beside a terminal of 80 columns."""
    keep = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment = {**keep, "PYTHONPATH": str(root), "TERM": "xterm"}
    primary, secondary = pty.openpty()
    command = [sys.executable, "-m", "minibert", "ops", "attention_grad", "--backend", "numpy"]
    done = subprocess.run(
        command, stdin=secondary, stdout=subprocess.PIPE, stderr=secondary, env=environment, text=True, timeout=120
    )
    for end in (primary, secondary):
        os.close(end)
    (row,) = (line for line in done.stdout.splitlines() if line.startswith(" attention_grad "))
    assert formula_of(OPS["attention_grad"]) in row and len(row.rstrip()) > 160


OWN = """
def raises(x):
    raise ValueError("boom")

def none(x):
    return None

def far(x):
    return x * 1e12
"""


@pytest.mark.parametrize(
    ("function", "cells", "message"),
    [
        ("raises", r"kernel +\d+ +\d+ +FAIL$", "raised ValueError: boom, at mine.py:3: in raises (arrays of shapes"),
        ("none", r"kernel +\d+ +\d+ +FAIL$", "output y: expected an array of shape (3, 7), got NoneType; again by"),
        ("far", r"kernel +\d+ +\d+ +\S+e\+\d+ +\de\+\d\d% +wrong +FAIL$", "y["),
    ],
)
def test_check_shows_what_was_computed_and_where_a_kernel_broke(
    function: str, cells: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    words = ("check", "--backend", "numpy", "--dtype", "float64", "--kernel", f"mine.py:{function}=softmax")
    monkeypatch.setattr(sys, "argv", ["minibert", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().out
    assert ended.value.code == 1 and message in said
    assert "inf%" not in said and "raised UserError" not in said
    assert any(re.search(cells, text.rstrip()) for text in said.splitlines()), said
