"""How `minibert diff` and `minibert bisect` are told their two sides, and the step or the run that both take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from minibert import backends
from minibert.backends import MOST_THREADS
from minibert.backends.base import NARROW
from minibert.cli.options import DTYPE_HELP, PRODUCTS_HELP, set_products
from minibert.errors import UserError
from minibert.lab.conform.own_kernels import HELP
from minibert.lab.lockstep.trace import Recording, Side, load
from minibert.model.config import NAMED

Kernels = Annotated[list[str], typer.Option(help=HELP + " It runs on side B.")]
BThreads = Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="Threads of side B.")]
BDtype = Annotated[str | None, typer.Option(help="Dtype of side B: float32 or float64.")]
Config = Annotated[str, typer.Option(help=f"{', '.join(NAMED)}, or a checkpoint's FOLDER.")]
Text = Annotated[list[Path] | None, typer.Option(help="Text files; default: the one that ships with minibert.")]
Tokens = Annotated[int, typer.Option(min=8, help="Tokens in the batch.")]
MaxSeqLength = Annotated[int, typer.Option(min=8, help="Longest sequence.")]
Dtype = Annotated[str, typer.Option(help=DTYPE_HELP)]
Products = Annotated[str, typer.Option(help=PRODUCTS_HELP)]
Threads = Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="Threads of both sides.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of weights, masks and dropout.")]


def side(
    name: str, dtype: str, kernels: Mapping[Any, Any] | None = None, threads: int | None = None, option: str = "--dtype"
) -> Any:  # fmt: skip
    """A backend (by its name, or your own by FILE.py:NAME), or else the trace in that file.

    `option` is what gave the dtype. Raises UserError where it cannot be a side.
    """
    if name not in backends.names() and (Path(name).is_file() or (":" not in name and Path(name).suffix)):
        if kernels or threads:
            raise UserError(f"side B is the trace {name}: --kernel and --b-threads need a backend there")
        return load(Path(name))
    backend = backends.get(name)
    backend.require_dtype(dtype, option)
    return Side(backend, dtype, dict(kernels or {}), threads)


def second_side(
    a: str, b: str | None, dtype: str, b_dtype: str | None, kernels: Mapping[Any, Any], threads: int | None
) -> Any:
    """Side B: by default A again, in its dtype. Raises UserError as `side` does."""
    given = (dtype, "--dtype") if b_dtype is None else (b_dtype, "--b-dtype")
    return side(a if b is None else b, given[0], kernels, threads, given[1])


def fit(a: Side | Recording, b: Side | Recording, products: str) -> None:
    """Set how both multiply. Raises UserError for sides that cannot be compared."""
    if a.dtype != b.dtype and (a.dtype in NARROW or b.dtype in NARROW):
        raise UserError(
            f"side A is in {a.dtype}, side B in {b.dtype}: in 16 bits the optimiser runs other ops; give both one dtype"
        )
    places = [s.backend for s in (a, b) if isinstance(s, Side)]
    if products != "float32" or any(place.product_mode != products for place in places):
        set_products(places, products)


def described(one: Side | Recording) -> str:
    """What a side is, in a line."""
    if isinstance(one, Side):
        return one.describe()
    return f"trace of {one.what}; recorded on {one.facts.get('machine', {}).get('processor', 'an unknown machine')}"
