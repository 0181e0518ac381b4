"""`minibert bisect A B --steps N`: the first step, op and element at which a run leaves its bound, and a test of it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

from minibert import backends
from minibert.cli import app, sides
from minibert.cli.compiling import show_compiling
from minibert.cli.diff_report import MEANINGS, facts, finite, table, verdict
from minibert.cli.inputs import step_inputs
from minibert.cli.labelled import labelled
from minibert.cli.legend import ULP_HELP, show
from minibert.cli.options import console, machine, notes, refuse_unwritable, takes_options_of
from minibert.errors import UserError
from minibert.lab.conform.own_kernels import load_kernels, refuse_uncalled, refuse_untriable
from minibert.lab.lockstep.bisect import Bisection, bisect
from minibert.lab.lockstep.reproduce import Case, smallest
from minibert.lab.lockstep.trace import Recording


@app.command("bisect")
@takes_options_of(labelled)
def bisect_command(
    a: str = typer.Argument(help="A backend, as numpy or FILE.py:NAME: the side that trains."),
    b: str | None = typer.Argument(
        None, help="Another, which repeats each step. Default: A again, with what --kernel and --b-... make of it."
    ),
    steps: int = typer.Option(50, min=1, help="Training steps to look through."),
    output: Path = typer.Option(Path("."), "--output", "-o", help="Folder for the test and its inputs."),
    kernel: sides.Kernels = [],  # noqa: B006
    b_threads: sides.BThreads = None,
    b_dtype: sides.BDtype = None,
    config: sides.Config = "tiny",
    text: sides.Text = None,
    tokens: sides.Tokens = 1024,
    max_seq_length: sides.MaxSeqLength = 128,
    dtype: sides.Dtype = "float32",
    products: sides.Products = "float32",
    threads: sides.Threads = None,
    seed: sides.Seed = 0,
    ulp: bool = typer.Option(False, "--ulp", help=ULP_HELP),
    json_file: Path | None = typer.Option(None, "--json", help="Write what was found to this JSON file."),
    **of_examples: Any,
) -> int:
    """Find the first step of a training run, in it the op, and of that the element, that leaves its error bound.

    Writes the smallest inputs on which it still does (.npz), and a pytest file that fails until the kernel is mended.
    Exit status 1 with a culprit.
    """
    refuse_unwritable(json=json_file)
    _refuse_unwritable_folder(output)
    if threads is not None:
        backends.set_num_threads(threads)
    kernels = load_kernels(kernel)
    if b is None and not (kernels or b_threads or b_dtype is not None):
        raise UserError("expected two sides, as in `minibert bisect numpy numba`, or --kernel, --b-threads, --b-dtype")
    first, second = sides.side(a, dtype), sides.second_side(a, b, dtype, b_dtype, kernels, b_threads)
    if isinstance(first, Recording) or isinstance(second, Recording):
        raise UserError("bisect: a trace holds one step and cannot be run again; give two backends, or use diff")
    sides.fit(first, second, products)
    inputs = step_inputs(config, text, tokens, max_seq_length, seed, steps, labelled(**of_examples))
    batches = inputs.make_batches()
    with notes.status("making the models") as status, show_compiling(status.update):
        run = bisect(first, second, inputs.make_model, batches.batch, steps, progress=status.update)
        refuse_untriable(kernels)
        if run.first is None:
            refuse_uncalled(kernels)
        status.update("looking for the smallest inputs")
        case = _case(run, first, second, kernel)
    written = [] if case is None else [str(path) for path in case.write(output)]
    if json_file is not None:
        json_file.write_text(json.dumps({"task": inputs.task} | _facts(run, written), indent=1, allow_nan=False) + "\n")
    console.print(said(run), highlight=False, soft_wrap=True)
    inputs.say_how()
    for name, side in (("A", first), ("B", second)):
        console.print(f"{name}: {sides.described(side)}", highlight=False, soft_wrap=True)
    if run.first is not None:
        show(table(run.found, False, "the worst", ulp), MEANINGS)
        if case is None:
            console.print(
                "run again by itself, the call is right: it hangs on what ran before it, or gives other results each "
                "time; no test was written",
                soft_wrap=True,
            )
        else:
            shapes = ", ".join(str(x.shape) for x in case.evidence.inputs)
            console.print(
                f"{written[1]}: small inputs that still go wrong, {shapes}\n{written[0]}: fails until the kernel is "
                f"mended: python -m pytest {written[0]}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
    return 0 if run.ok else 1


def _refuse_unwritable_folder(output: Path) -> None:
    """Raise UserError where a test cannot be written: before the work, not after it."""
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"--output: {existing} is a file: name a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"--output: {output} cannot be written; name another folder")


def said(run: Bisection) -> str:
    """One line: the step and the culprit in it, or that there is none."""
    judged = ", ".join(map(str, sorted(run.judged)))
    if run.unsteady is not None and run.first is None:
        return (
            f"[red]UNSTEADY[/red] step {run.unsteady} of {run.steps}: side B gave something else when it was run again "
            "from the same state: a kernel gives other results each time; `minibert check` says which"
        )
    if run.first is None:
        return (
            f"[green]no culprit[/green] in {run.steps} steps: B repeated each, and those that stood out most were "
            f"judged call by call: {judged}"
        )
    return f"step {run.first} of {run.steps} (judged: {judged}): {verdict(run.found)}{_by_calls(run)}"


def _by_calls(run: Bisection) -> str:
    """What the number of calls has to do with it, where that decides."""
    evidence = run.found.evidence
    if evidence is None or evidence.calls == 1:
        return ""
    return f"; kernel {evidence.op.name} goes wrong at its call {evidence.calls} (step {run.first})"


def _case(run: Bisection, a: Any, b: Any, specs: list[str]) -> Case | None:
    """The culprit's call by itself, on the smallest inputs; None where it does not go wrong by itself."""
    evidence = run.found.evidence
    if run.first is None or evidence is None:
        return None
    side = a if evidence.on == "A" else b
    found = smallest(evidence, side)
    line = Text.from_markup(verdict(run.found)).plain.removeprefix("CULPRIT ")
    return found and Case(found, side, specs if evidence.on == "B" else (), f"Step {run.first}: {line}{_by_calls(run)}")


def _facts(run: Bisection, written: list[str]) -> dict[str, Any]:
    distances = [{k: finite(v) if isinstance(v, float) else v for k, v in asdict(d).items()} for d in run.distances]
    found = {} if run.first is None else {"found": facts(run.found)}
    evidence = None if run.first is None else run.found.evidence
    return {
        "machine": machine(), "steps": run.steps, "first": run.first, "unsteady": run.unsteady,
        "judged": sorted(run.judged), "distances": distances, "written": written,
        "calls": evidence and evidence.calls, **found,
    }  # fmt: skip
