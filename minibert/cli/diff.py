"""`minibert diff A B`: one training step on two sides, call by call, and who is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from minibert import __version__, backends
from minibert.backends import MOST_THREADS
from minibert.backends.base import NARROW
from minibert.cli import app
from minibert.cli.compiling import show_compiling
from minibert.cli.diff_report import facts, summary, table, verdict
from minibert.cli.inputs import step_inputs
from minibert.cli.kernels import HELP, load_kernels, refuse_uncalled, refuse_untriable
from minibert.cli.options import console, machine, notes, refuse_unwritable
from minibert.config import NAMED
from minibert.data import (
    PackedBatch,
)
from minibert.errors import UserError
from minibert.lockstep import diff
from minibert.trace import MakeModel, Recording, Side, load, record, save

SIDES_HELP = "A backend, as numba, or a trace FILE that --record wrote here or on another machine."


@app.command("diff")
def diff_command(
    a: str = typer.Argument(help=SIDES_HELP),
    b: str | None = typer.Argument(None, help="The same. Default: A again, with what --kernel and --b-... make of it."),
    kernel: list[str] = typer.Option([], help=HELP + " It runs on side B."),
    b_threads: int | None = typer.Option(None, min=1, max=MOST_THREADS, help="Threads of side B."),
    b_dtype: str | None = typer.Option(None, help="Dtype of side B: float32 or float64."),
    config: str = typer.Option("tiny", help=f"{', '.join(NAMED)}, or a checkpoint's FOLDER."),
    text: list[Path] = typer.Option(None, help="Text files; default: the one that ships with minibert."),
    tokens: int = typer.Option(1024, min=8, help="Tokens in the batch."),
    max_seq_length: int = typer.Option(128, min=8, help="Longest sequence."),
    step: int = typer.Option(1, min=1, help="Which training step is compared; those before it run unseen."),
    dtype: str = typer.Option("float32", help="float32, float64; on a GPU or the emulator float16, bfloat16."),
    threads: int = typer.Option(None, min=1, max=MOST_THREADS, help="Threads of both sides."),
    seed: int = typer.Option(0, min=0, help="Seed of weights, masks and dropout."),
    every: bool = typer.Option(False, "--all", help="Print every call in order, not the worst alone."),
    record_file: Path | None = typer.Option(None, "--record", help="Run A alone and write its trace to this file."),
    json_file: Path | None = typer.Option(None, "--json", help="Write the culprit and every call to this JSON file."),
) -> int:
    """Compare one training step of a BERT on two sides, call by call: where they part, and who is wrong.

    Each result is judged against the formula in float64 on the inputs it was computed from, and B runs every op once
    more on A's inputs. The first call of which a result leaves its error bound is the culprit: exit status 1.
    """
    refuse_unwritable(record_file, json_file)
    if threads is not None:
        backends.set_num_threads(threads)
    kernels = load_kernels(kernel)
    if record_file is not None and (b is not None or kernels or b_threads or b_dtype):
        raise UserError("--record runs side A alone: leave out B and its options")
    first = _side(a, dtype)
    if b is None and record_file is None and not (kernels or b_threads or b_dtype):
        raise UserError("expected two sides, as in `minibert diff numpy numba`, or --kernel, --b-threads or --b-dtype")
    second = _side(b or a, b_dtype or dtype, kernels, b_threads)
    _refuse_narrow_beside_wide(first, second)
    model_config, make_model, make_batch = step_inputs(config, text, tokens, max_seq_length, seed)
    batch = make_batch()
    settings = {
        "config": asdict(model_config), "weights": config, "tokens": tokens, "max_seq_length": max_seq_length,
        "seed": seed, "step": step, "batch": _digest(batch),
    }  # fmt: skip
    for side in (first, second):
        if isinstance(side, Recording):
            _refuse_other_settings(side, settings)
    with ExitStack() as stack:
        status = stack.enter_context(notes.status("side A"))
        stack.enter_context(show_compiling(status.update))
        if record_file is not None:
            return _record(first, make_model, batch, step, settings, record_file)
        found = diff(first, second, make_model, batch, step, progress=status.update)
    refuse_untriable(kernels)
    if found.ok:
        refuse_uncalled(kernels)
    console.print(verdict(found), highlight=False, soft_wrap=True)
    console.print(f"{config}, {dtype}, seed {seed}: {summary(found, batch)}", highlight=False, soft_wrap=True)
    for name, side in (("A", first), ("B", second)):
        console.print(f"{name}: {_described(side)}", highlight=False, soft_wrap=True)
    console.print(table(found, every, console.width))
    if json_file is not None:
        about = {"machine": machine(), "settings": settings, "a": _described(first), "b": _described(second)}
        json_file.write_text(json.dumps(about | facts(found), indent=1, allow_nan=False) + "\n")
    return 0 if found.ok else 1


def _side(name: str, dtype: str, kernels: Mapping[Any, Any] | None = None, threads: int | None = None) -> Any:
    """A backend of that name, or else the trace in that file."""
    if name not in backends.names() and (Path(name).suffix or Path(name).is_file()):
        if kernels or threads:
            raise UserError(f"side B is the trace {name}: --kernel and --b-threads need a backend there")
        return load(Path(name))
    backend = backends.get(name)
    if dtype not in backend.dtypes:
        raise UserError(f"backend {name} has arrays of {', '.join(backend.dtypes)}: not {dtype!r}")
    return Side(backend, dtype, dict(kernels or {}), threads)


def _refuse_narrow_beside_wide(a: Side | Recording, b: Side | Recording) -> None:
    if a.dtype != b.dtype and (a.dtype in NARROW or b.dtype in NARROW):
        raise UserError(
            f"side A is in {a.dtype}, side B in {b.dtype}: in 16 bits the optimiser runs other ops; give both one dtype"
        )


def _digest(batch: PackedBatch) -> str:
    held = (batch.input_ids, batch.token_type_ids, batch.cu_seqlens, batch.labels)
    return hashlib.blake2b(b"".join(x.tobytes() for x in held), digest_size=16).hexdigest()


def _refuse_other_settings(trace: Recording, settings: Mapping[str, Any]) -> None:
    recorded = trace.facts.get("settings", {})
    for key, value in json.loads(json.dumps(settings)).items():
        if recorded.get(key) != value:
            if key in ("config", "batch"):
                raise UserError(
                    f"{trace.name} was recorded with another {key}: give the --config and --text it was made by"
                )
            option = "config" if key == "weights" else key.replace("_", "-")
            raise UserError(f"{trace.name} was recorded with --{option} {recorded.get(key)}, here it is {value}")


def _record(
    side: Side | Recording,
    make_model: MakeModel,
    batch: PackedBatch,
    step: int,
    settings: Mapping[str, Any],
    path: Path,
) -> int:
    if isinstance(side, Recording):
        raise UserError(f"--record: {side.name} is a trace already; give a backend")
    if step > 1:
        raise UserError("--record: weights of a later step are not in a trace; leave out --step")
    made = record(side, make_model, batch, step)
    save(made, path, {"machine": machine(), "minibert": __version__, "settings": settings})
    console.print(
        f"{path}: {len(made.calls)} calls on {made.what}; loss {made.loss!r}", highlight=False, soft_wrap=True
    )
    return 0


def _described(side: Side | Recording) -> str:
    if isinstance(side, Side):
        return side.describe()
    return f"trace of {side.what}; recorded on {side.facts.get('machine', {}).get('processor', 'an unknown machine')}"
