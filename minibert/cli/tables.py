"""`minibert backends` and `minibert ops`: what runs here, and by what."""

from __future__ import annotations

import inspect
import re

import numpy as np
import typer
from rich.markup import escape

from minibert import backends as registry
from minibert.cli import app
from minibert.cli.options import chosen_backends, console, plain_table
from minibert.kernels import OPS, Op
from minibert.kernels.op import BertSize
from minibert.kernels.readings import cost


@app.command("backends")
def list_backends() -> None:
    """List the backends: which run here, with their libraries and threads, and what the others lack."""
    table = plain_table("backend", "runs", "what it is, or what would mend it")
    for name, backend, reason in registry.available():
        table.add_row(name, "yes" if backend else "no", escape(backend.describe() if backend else reason))
    console.print(table)


@app.command("ops")
def list_ops(
    names: list[str] = typer.Argument(None, metavar="[OP ...]", help="Only these, with the source of their formulas."),
    backends: str = typer.Option(None, help="Only these backends, as in numpy,numba."),
) -> None:
    """List the ops: what runs each on each backend, what each costs at the shapes of MiniLM, and its formula."""
    from minibert.lab.conform.check import find_op

    compared = chosen_backends(backends, None)
    table = plain_table("op", *(b.name for b in compared), "gradient", "MFLOP", "MB", "formula")
    table.columns[-1].overflow = "fold"
    for op in [find_op(name) for name in names] if names else OPS.values():
        arrays, params = op.bench(np.random.default_rng(0), BertSize())
        work = cost(op, *(np.asarray(a, "f4") if a.dtype.kind == "f" else a for a in map(np.asarray, arrays)), **params)
        table.add_row(
            op.name,
            *(b.by(op) for b in compared),
            "yes" if op.vjp else "",
            f"{work.flops / 1e6:,.1f}",
            f"{work.bytes / 1e6:,.1f}",
            escape(_formula(op)),
        )
    console.print(table)
    if names:
        for name in names:
            console.print(f"\n[bold]{name}[/bold], {inspect.getsourcefile(OPS[name].formula)}\n")
            console.print(escape(inspect.getsource(OPS[name].formula)), highlight=False)


def _formula(op: Op) -> str:
    """The clause of the family's docstring that bears the op's name: `softmax: y = ...`."""
    for paragraph in (inspect.getmodule(op.formula).__doc__ or "").split("\n\n"):
        text = " ".join(paragraph.split())
        found = re.search(rf"(?:^|\s){op.name}: (.*)", text)
        if found:
            others = "|".join(name for name in OPS if name != op.name)
            return re.split(rf"[;.,]? (?:{others}): |; (?=keeps)|\. (?=[A-Z])|\.$", found.group(1))[0].rstrip(".")
    return ""
