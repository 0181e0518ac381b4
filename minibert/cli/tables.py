"""`minibert backends` and `minibert ops`: what runs here, and by what."""

from __future__ import annotations

import inspect
import re

import numpy as np
import typer
from rich.markup import escape

from minibert import backends as registry
from minibert.backends import Backend
from minibert.cli import app
from minibert.cli.legend import show
from minibert.cli.options import BACKENDS, OWN_HELP, chosen_backends, console, plain_table
from minibert.kernels import OPS, Op
from minibert.kernels.op import BertSize
from minibert.kernels.readings import cost

ON_CUDA = ("cupy", "emulator")
CUDA = Backend("cuda", None, kernel_files="gpu")  # it runs nothing
COST = ("gradient", "MFLOP", "MB")


@app.command("backends")
def list_backends() -> None:
    """List the backends: which run here, with their libraries and threads, and what the others lack."""
    table = plain_table("backend", "runs", "what it is, or what would mend it")
    for name, backend, reason in registry.available():
        table.add_row(name, "yes" if backend else "no", escape(backend.describe() if backend else reason))
    show(table, {"runs": "on this machine"})


@app.command("ops")
def list_ops(
    names: list[str] = typer.Argument(None, metavar="[OP ...]", help="Only these, with the source of their formulas."),
    backends: str = typer.Option(None, *BACKENDS, help=f"Only these backends, as in numpy,numba. {OWN_HELP}"),
) -> None:
    """List the ops: what runs each on each backend, what each costs at the shapes of MiniLM, and its formula."""
    from minibert.lab.conform.check import find_op

    compared = kernels_of(backends)
    header = ["op", *compared, *COST, "formula"]
    table = plain_table(*header)
    for column in table.columns[:-1]:
        column.no_wrap = True
    table.columns[-1].overflow = "fold"
    for op in [find_op(name) for name in names] if names else OPS.values():
        arrays, params = op.bench(np.random.default_rng(0), BertSize())
        work = cost(op, *(np.asarray(a, "f4") if a.dtype.kind == "f" else a for a in map(np.asarray, arrays)), **params)
        costs = ["yes" if op.vjp else "", f"{work.flops / 1e6:,.1f}", f"{work.bytes / 1e6:,.1f}"]
        table.add_row(op.name, *(b.by(op) for b in compared.values()), *costs, escape(formula_of(op)))
    meanings = {"cuda": "of cupy and emulator", "gradient": "the op has one"}
    show(table, {**meanings, header[1]: "what runs the op there: a kernel, a library or the formula"})
    if names:
        for name in names:
            console.print(f"\n[bold]{name}[/bold], {inspect.getsourcefile(OPS[name].formula)}\n")
            console.print(escape(inspect.getsource(OPS[name].formula)), highlight=False)


def kernels_of(names: str | None) -> dict[str, Backend]:
    """By the name of its column, what tells which ops a backend has kernels for; by default all kinds of kernels.

    Those for CUDA are found without a GPU and without g++: `cupy` and `emulator` run the same.
    """
    if names is None:
        here = {place.name: place for place in registry.usual() if place.kernel_files != CUDA.kernel_files}
        return {**here, "cuda": CUDA}
    wanted = [name.strip() for name in names.split(",")]
    others = [name for name in wanted if name not in ON_CUDA]
    found = dict(zip(others, chosen_backends(",".join(others), None) if others else [], strict=True))
    return {found[name].name if name in found else name: found.get(name, CUDA) for name in wanted}


def formula_of(op: Op) -> str:
    """The clause of the family's docstring that bears the op's name: `softmax: y = ...`."""
    for paragraph in (inspect.getmodule(op.formula).__doc__ or "").split("\n\n"):
        text = " ".join(paragraph.split())
        found = re.search(rf"(?:^|\s){op.name}: (.*)", text)
        if found:
            others = "|".join(name for name in OPS if name != op.name)
            return re.split(rf"[;.,]? (?:{others}): |; (?=keeps)|\. (?=[A-Z])|\.$", found.group(1))[0].rstrip(".")
    return ""
