"""`minibert compare`: one training step of a BERT on every backend, op by op."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from minibert.backends import MOST_THREADS, Backend, BackendUnavailable, determinism, names
from minibert.backends.base import Kernel
from minibert.cli import app
from minibert.cli.compiling import show_compiling
from minibert.cli.inputs import Inputs, step_inputs
from minibert.cli.labelled import MLM, labelled
from minibert.cli.legend import ULP_HELP, show
from minibert.cli.options import (
    BACKENDS,
    DETERMINISTIC_HELP,
    DTYPE_HELP,
    OWN_HELP,
    PRODUCTS_HELP,
    chosen_backends,
    console,
    machine,
    notes,
    refuse_unwritable,
    set_products,
    takes_options_of,
)
from minibert.cli.report import markdown, tables, verdict
from minibert.errors import UserError, pip_install
from minibert.kernels import Op
from minibert.lab.compare.compare import compare
from minibert.lab.compare.records import Comparison, Extras, on_cpu
from minibert.lab.conform.own_kernels import HELP, load_kernels, refuse_uncalled
from minibert.lab.measure.energy import open_meter
from minibert.lab.measure.prices import Prices, read_prices
from minibert.lab.measure.quiet import warning

if TYPE_CHECKING:
    from minibert.page import Recorded

ROUNDS = 3  # of the crossovers: they are read off medians, to be measured well by `python -m bench.scaling`
NEEDED = ("jinja2", "matplotlib")  # by the page


@app.command("compare")
@takes_options_of(labelled)
def compare_command(
    context: typer.Context,
    config: str = typer.Option("tiny", help="tiny, mini, minilm, small, medium, base, or a checkpoint's FOLDER."),
    text: list[Path] = typer.Option(None, help="Text files; default: the one that ships with minibert."),
    backends: str = typer.Option(
        None,
        *BACKENDS,
        help=f"Backends to compare, as in numpy,numba; the first is the reference. Default: all. {OWN_HELP}",
    ),
    steps: int = typer.Option(6, min=2, help="Training steps; the first compiles and judges, the others are timed."),
    tokens: int = typer.Option(1024, min=8, help="Tokens in the batch."),
    max_seq_length: int = typer.Option(128, min=8, help="Longest sequence."),
    kernel: list[str] = typer.Option([], help=HELP),
    dtype: str = typer.Option("float32", help=DTYPE_HELP),
    products: str = typer.Option("float32", help=PRODUCTS_HELP),
    threads: int = typer.Option(None, min=1, max=MOST_THREADS, help="Threads of every backend."),
    deterministic: bool = typer.Option(False, "--deterministic", help=DETERMINISTIC_HELP),
    seed: int = typer.Option(0, min=0, help="Seed of weights, masks and dropout."),
    ulp: bool = typer.Option(False, "--ulp", help=ULP_HELP),
    json_file: Path = typer.Option(None, "--json", help="Write the facts to this file as JSON."),
    markdown_file: Path = typer.Option(None, "--markdown", help="Write the tables to this file as Markdown."),
    report: Path | None = typer.Option(None, help="Make a page of figures in this folder, and measure what they need."),
    recorded: list[Path] = typer.Option(
        [], "--with", help="Put a result recorded elsewhere on the page of --report: JSON or a trace. May be repeated."
    ),
    prices: Path | None = typer.Option(None, help="TOML file of prices: the cost of tokens in --report and --json."),
    **of_examples: Any,
) -> int:
    """Train one batch of real text on every backend and compare the backends op by op.

    Each op's error is its own: every backend gets the reference's inputs, and is judged against the formula in float64.
    Exit status 1 if any op leaves the error bound that its formula implies.

    --task takes a step of fine-tuning instead of one of pretraining, on the examples of --train, or on labels that are
    made from the text: the output says how. Its stage "inference" is the whole model, with the head.

    --report DIR writes DIR/index.html, one page without need of a network, and what it shows as DIR/facts.json. It also
    measures the machine's peaks, memory over time, energy, and at which sizes one backend overtakes another.
    """
    refuse_unwritable(json=json_file, markdown=markdown_file)
    if recorded and report is None:
        raise UserError("--with: puts a result on a page: name the page's folder by --report")
    if prices is not None and report is None and json_file is None:
        raise UserError("--prices: costs are shown by --report DIR and --json FILE: give one of them")
    priced = read_prices(prices, names()) if prices is not None else None
    others = _read_others(report, recorded)
    kernels = load_kernels(kernel)
    compared = chosen_backends(backends, threads)
    for place in compared:
        place.require_dtype(dtype)
    set_products(compared, products)
    context.with_resource(determinism(deterministic))
    inputs = step_inputs(config, text, tokens, max_seq_length, seed, labelled=labelled(**of_examples))
    if report is not None:
        _make_folder(report)
    extras = _extras(compared, dtype) if report or json_file else None
    with ExitStack() as stack:
        status = stack.enter_context(notes.status("reading the text"))
        stack.enter_context(show_compiling(status.update))
        found = compare(
            lambda backend: inputs.make_model(backend, dtype),
            inputs.make_batch,
            compared,
            steps,
            kernels=kernels,
            progress=status.update,
            extras=extras,
        )
    refuse_uncalled(kernels)
    described = _described(config, inputs, dtype, steps, found) | {"deterministic": deterministic}
    console.print(f"{described['name']}: {described['summary']}", highlight=False)
    inputs.say_how()
    for run in found.runs:
        console.print(f"{run.backend.name}: {run.backend.describe()}", highlight=False)
    for table in tables(found, console, ulp):
        show(table)
    console.print(verdict(found), highlight=False, soft_wrap=True)
    if said := warning(found.disturbance):
        console.print(f"[yellow]{said}[/yellow]", highlight=False, soft_wrap=True)
    if extras is not None:
        _write_facts(found, kernels, described, extras, priced, json_file, report, others)
    if markdown_file is not None:
        markdown_file.write_text(markdown(found, described, machine(), ulp))
    return 0 if found.ok else 1


def _read_others(report: Path | None, recorded: list[Path]) -> list[Recorded]:
    """What `--with` names. Raises BackendUnavailable where a page cannot be made, UserError for a file of no use."""
    if report is None:
        return []
    missing = [library for library in NEEDED if find_spec(library) is None]
    if missing:
        raise BackendUnavailable(f"--report needs {' and '.join(missing)}: {pip_install('[report]')}")
    from minibert.page import read_recorded

    return [read_recorded(path) for path in recorded]


def _make_folder(report: Path) -> None:
    if report.exists() and not report.is_dir():
        raise UserError(f"--report: {report} is a file: name a folder")
    try:
        report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--report: the folder {report} cannot be made: {error.strerror}") from None
    refuse_unwritable(page=report / "index.html", json=report / "facts.json")


def _extras(compared: list[Backend], dtype: str) -> Extras:
    gpu = any(not on_cpu(backend) and not backend.emulated for backend in compared)
    return Extras("float64" if dtype == "float64" else "float32", open_meter(gpu))


def _write_facts(
    found: Comparison, kernels: Mapping[Op, Kernel], described: Mapping[str, Any], extras: Extras,
    prices: Prices | None, json_file: Path | None, report: Path | None, others: list[Recorded],
) -> None:  # fmt: skip
    """What `--json` and `--report` ask for, and how long it took."""
    from minibert.lab.compare.facts import facts

    scaling = None
    if report is not None and found.ok:  # how fast a wrong op is nobody needs to know
        with extras.taking("crossovers"):
            scaling = _crossovers([run.backend for run in found.runs], kernels)
    document = {
        "command": shlex.join(["minibert", *sys.argv[1:]]),
        **facts(found, described, machine(), prices, scaling),
    }
    for file in (json_file, report and report / "facts.json"):
        if file is not None:
            file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    if report is None:
        return
    from minibert.page import write_page

    with extras.taking("page"):
        page = write_page(report, document, others)
    took = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in extras.seconds.items())
    console.print(f"report: {page} ({took})", highlight=False, soft_wrap=True)


def _crossovers(compared: list[Backend], kernels: Mapping[Op, Kernel]) -> dict[str, Any] | None:
    """At which sizes one backend overtakes another, on the threads that are set and with the kernels of `compare`."""
    places = [backend for backend in compared if not backend.emulated]
    if not places:
        return None
    from minibert.lab.measure.scaling import QUICK_AXES, Base, measure

    base = Base(threads=max(place.num_threads() for place in places))
    with ExitStack() as stack:
        status = stack.enter_context(notes.status("crossovers"))
        for backend in compared[1:] or compared:
            stack.enter_context(backend.using(kernels))
        try:
            found = measure(places, QUICK_AXES, base, ROUNDS, lambda text: status.update(f"crossovers: {text}"))
        except UserError as error:  # a kernel of one's own that does not take these sizes
            notes.print(f"no crossovers: {error}", highlight=False, soft_wrap=True)
            return None
    return found | {"what": f"{found['what']}, in float32"}


def _described(name: str, inputs: Inputs, dtype: str, steps: int, found: Comparison) -> dict[str, Any]:
    batch, config, predicted = found.batch, inputs.config, found.batch.counted
    task = "" if inputs.task == MLM else f"{inputs.task}, "
    return {
        "name": name,
        "task": inputs.task,
        "examples": inputs.how,
        **asdict(config),
        "dtype": dtype,
        "steps": steps,
        "sequences": found.samples,
        "tokens": len(batch.input_ids),
        "predicted": predicted,
        "summary": (
            f"{task}L{config.num_hidden_layers} C{config.hidden_size} H{config.num_attention_heads} "
            f"V{config.vocab_size}, {dtype}; "
            f"{found.samples} sequences, {len(batch.input_ids)} tokens, {predicted} predicted; {steps} steps"
        ),
    }
