"""`minibert diff A B`: one training step on two sides, call by call, and who is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from minibert import __version__, backends
from minibert.cli import app, sides
from minibert.cli.compiling import show_compiling
from minibert.cli.diff_report import MEANINGS, facts, recorded_facts, summary, table, verdict
from minibert.cli.drift_report import DRIFT_MEANINGS, drift_facts, drift_tables, drift_verdict
from minibert.cli.inputs import Inputs, failed_inputs, step_inputs
from minibert.cli.labelled import MLM, labelled
from minibert.cli.legend import ULP_HELP, show
from minibert.cli.options import console, machine, notes, refuse_unwritable, takes_options_of
from minibert.data import PackedBatch
from minibert.errors import UserError
from minibert.lab.conform.own_kernels import load_kernels, refuse_uncalled, refuse_untriable
from minibert.lab.lockstep.diff import diff
from minibert.lab.lockstep.drift import drift
from minibert.lab.lockstep.trace import MakeModel, Recording, Side, record, save

SIDES_HELP = "A backend, as numba or FILE.py:NAME, or a trace FILE that --record wrote here or on another machine."


@app.command("diff")
@takes_options_of(labelled)
def diff_command(
    a: str = typer.Argument(help=SIDES_HELP),
    b: str | None = typer.Argument(None, help="The same. Default: A again, with what --kernel and --b-... make of it."),
    kernel: sides.Kernels = [],  # noqa: B006
    b_threads: sides.BThreads = None,
    b_dtype: sides.BDtype = None,
    config: sides.Config = "tiny",
    text: sides.Text = None,
    tokens: sides.Tokens = 1024,
    max_seq_length: sides.MaxSeqLength = 128,
    again: Path | None = typer.Option(
        None,
        metavar="FOLDER",
        help="The step that a run kept there as it stopped at NaN: its weights, batch, dtype, seed and task.",
    ),
    step: int = typer.Option(1, min=1, help="Which step on one batch is compared; those before it run unseen."),
    steps: int = typer.Option(1, min=1, help="Train so many steps, each side on its own results, and compare all."),
    dtype: sides.Dtype = "float32",
    products: sides.Products = "float32",
    threads: sides.Threads = None,
    seed: sides.Seed = 0,
    ulp: bool = typer.Option(False, "--ulp", help=ULP_HELP),
    every: bool = typer.Option(False, "--all", help="Print every call in order, not the worst alone."),
    record_file: Path | None = typer.Option(None, "--record", help="Run A alone and write its trace to this file."),
    json_file: Path | None = typer.Option(None, "--json", help="Write the culprit and every call to this JSON file."),
    **of_examples: Any,
) -> int:
    """Compare one training step of a BERT on two sides, call by call: where they part, and who is wrong.

    Each result is judged against the formula in float64 on the inputs it was computed from, and B runs every op once
    more on A's inputs. The first call of which a result leaves its error bound is the culprit: exit status 1.

    With --steps, all calls of so many steps, and of each op what it adds of its own and what it inherits.
    """
    refuse_unwritable(trace=record_file, json=json_file)
    if threads is not None:
        backends.set_num_threads(threads)
    kernels = load_kernels(kernel)
    if record_file is not None and (b is not None or kernels or b_threads or b_dtype):
        raise UserError("--record runs side A alone: leave out B and its options")
    if steps > 1 and (step > 1 or record_file is not None or every):
        raise UserError("--steps compares every step from the first: leave out --step, --record and --all")
    inputs = None
    if again is not None:
        if steps > 1 or step > 1:
            raise UserError("--again is about one step: leave out --step and --steps")
        inputs, failed = failed_inputs(again)
        config, dtype, seed, text = str(again), failed.dtype, failed.seed, None
        tokens, max_seq_length = len(failed.batch["input_ids"]), int(failed.batch["position_ids"].max()) + 1
    first = sides.side(a, dtype)
    if b is None and record_file is None and not (kernels or b_threads or b_dtype is not None):
        raise UserError("expected two sides, as in `minibert diff numpy numba`, or --kernel, --b-threads or --b-dtype")
    second = sides.second_side(a, b, dtype, b_dtype, kernels, b_threads)
    sides.fit(first, second, products)
    inputs = inputs or step_inputs(config, text, tokens, max_seq_length, seed, steps, labelled(**of_examples))
    what = ", ".join((config, *([inputs.task] if inputs.how else []), dtype, f"seed {seed}"))
    if steps > 1:
        status = _drift(first, second, inputs, steps, what, json_file, ulp)
        refuse_untriable(kernels)
        refuse_uncalled(kernels)
        return status
    model_config, make_model, batch = inputs.config, inputs.make_model, inputs.make_batch()
    settings = {
        "task": inputs.task, "config": asdict(model_config), "weights": config, "tokens": tokens,
        "max_seq_length": max_seq_length, "seed": seed, "step": step, "batch": _digest(batch),
    }  # fmt: skip
    for side in (first, second):
        if isinstance(side, Recording):
            _refuse_other_settings(side, settings)
    with ExitStack() as stack:
        status_line = stack.enter_context(notes.status("side A"))
        stack.enter_context(show_compiling(status_line.update))
        if record_file is not None:
            return _record(first, make_model, batch, step, settings, record_file, json_file)
        found = diff(first, second, make_model, batch, step, progress=status_line.update)
    refuse_untriable(kernels)
    if found.ok:
        refuse_uncalled(kernels)
    if json_file is not None:
        about = {"machine": machine(), "settings": settings, "a": sides.described(first), "b": sides.described(second)}
        json_file.write_text(json.dumps(about | facts(found), indent=1, allow_nan=False) + "\n")
    console.print(verdict(found), highlight=False, soft_wrap=True)
    console.print(f"{what}: {summary(found, batch)}", highlight=False, soft_wrap=True)
    inputs.say_how()
    for name, side in (("A", first), ("B", second)):
        console.print(f"{name}: {sides.described(side)}", highlight=False, soft_wrap=True)
    show(table(found, every, "--all", ulp), MEANINGS)
    return 0 if found.ok else 1


def _drift(
    a: Side | Recording,
    b: Side | Recording,
    inputs: Inputs,
    steps: int,
    what: str,
    json_file: Path | None,
    ulp: bool,
) -> int:
    """Many steps in lockstep."""
    if isinstance(a, Recording) or isinstance(b, Recording):
        raise UserError("--steps: a trace holds one step; give two backends")
    batches = inputs.make_batches()
    with notes.status("making the models") as status, show_compiling(status.update):
        found = drift(a, b, inputs.make_model, batches.batch, steps, progress=status.update)
    if json_file is not None:
        about = {"machine": machine(), "task": inputs.task, "a": sides.described(a), "b": sides.described(b)}
        json_file.write_text(json.dumps(about | drift_facts(found), indent=1, allow_nan=False) + "\n")
    console.print(drift_verdict(found, steps), highlight=False, soft_wrap=True)
    console.print(what, highlight=False)
    inputs.say_how()
    for name, side in (("A", a), ("B", b)):
        console.print(f"{name}: {sides.described(side)}", highlight=False, soft_wrap=True)
    for shown in drift_tables(found, ulp):
        show(shown, DRIFT_MEANINGS)
    return 0 if found.ok else 1


def _digest(batch: PackedBatch) -> str:
    held = (batch.input_ids, batch.token_type_ids, batch.cu_seqlens, batch.labels)
    return hashlib.blake2b(b"".join(x.tobytes() for x in held), digest_size=16).hexdigest()


def _refuse_other_settings(trace: Recording, settings: Mapping[str, Any]) -> None:
    recorded = {"task": MLM} | trace.facts.get("settings", {})  # older traces do not name it
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
    json_file: Path | None,
) -> int:
    if isinstance(side, Recording):
        raise UserError(f"--record: {side.name} is a trace already; give a backend")
    if step > 1:
        raise UserError("--record: weights of a later step are not in a trace; leave out --step")
    made = record(side, make_model, batch, step)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    save(made, path, {"machine": machine(), "date": date, "minibert": __version__, "settings": settings})
    if json_file is not None:
        about = {"machine": machine(), "settings": settings, "a": sides.described(side), "trace": str(path)}
        json_file.write_text(json.dumps(about | recorded_facts(made), indent=1, allow_nan=False) + "\n")
    console.print(
        f"{path}: {len(made.calls)} calls on {made.what}; loss {made.loss!r}", highlight=False, soft_wrap=True
    )
    return 0
