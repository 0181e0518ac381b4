"""`minibert compare`: one training step of a BERT on every backend, op by op."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from minibert.backends import MOST_THREADS
from minibert.cli import app
from minibert.cli.compiling import show_compiling
from minibert.cli.inputs import step_inputs
from minibert.cli.kernels import HELP, load_kernels, refuse_uncalled
from minibert.cli.options import (
    PRODUCTS_HELP,
    chosen_backends,
    console,
    machine,
    notes,
    refuse_unwritable,
    set_products,
)
from minibert.cli.report import markdown, tables, verdict
from minibert.compare import Comparison, compare, facts
from minibert.config import BertConfig


@app.command("compare")
def compare_command(
    config: str = typer.Option("tiny", help="tiny, mini, minilm, small, medium, base, or a checkpoint's FOLDER."),
    text: list[Path] = typer.Option(None, help="Text files; default: the one that ships with minibert."),
    backends: str = typer.Option(
        None, help="Backends to compare, as in numpy,numba; the first is the reference. Default: all."
    ),
    steps: int = typer.Option(6, min=2, help="Training steps; the first compiles and judges, the others are timed."),
    tokens: int = typer.Option(1024, min=8, help="Tokens in the batch."),
    max_seq_length: int = typer.Option(128, min=8, help="Longest sequence."),
    kernel: list[str] = typer.Option([], help=HELP),
    dtype: str = typer.Option("float32", help="float32, float64; on a GPU or the emulator float16, bfloat16."),
    products: str = typer.Option("float32", help=PRODUCTS_HELP),
    threads: int = typer.Option(None, min=1, max=MOST_THREADS, help="Threads of every backend."),
    seed: int = typer.Option(0, min=0, help="Seed of weights, masks and dropout."),
    json_file: Path = typer.Option(None, "--json", help="Write the facts to this file as JSON."),
    markdown_file: Path = typer.Option(None, "--markdown", help="Write the tables to this file as Markdown."),
) -> int:
    """Train one batch of real text on every backend and compare the backends op by op.

    Each op's error is its own: every backend gets the reference's inputs, and is judged against the formula in float64.
    Exit status 1 if any op leaves the error bound that its formula implies.
    """
    refuse_unwritable(json_file, markdown_file)
    kernels = load_kernels(kernel)
    compared = chosen_backends(backends, threads)
    set_products(compared, products)
    inputs = step_inputs(config, text, tokens, max_seq_length, seed)
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
        )
    refuse_uncalled(kernels)
    described = _described(config, inputs.config, dtype, steps, found)
    console.print(f"{described['name']}: {described['summary']}", highlight=False)
    for run in found.runs:
        console.print(f"{run.backend.name}: {run.backend.describe()}", highlight=False)
    for table in tables(found, console):
        console.print(table)
    console.print(verdict(found), highlight=False, soft_wrap=True)
    if json_file is not None:
        json_file.write_text(json.dumps(facts(found, described, machine()), indent=1, allow_nan=False) + "\n")
    if markdown_file is not None:
        markdown_file.write_text(markdown(found, described, machine()))
    return 0 if found.ok else 1


def _described(name: str, config: BertConfig, dtype: str, steps: int, found: Comparison) -> dict[str, Any]:
    batch = found.batch
    predicted = int((batch.labels >= 0).sum())
    return {
        "name": name,
        **asdict(config),
        "dtype": dtype,
        "steps": steps,
        "sequences": found.samples,
        "tokens": len(batch.input_ids),
        "predicted": predicted,
        "summary": (
            f"L{config.num_hidden_layers} C{config.hidden_size} H{config.num_attention_heads} "
            f"V{config.vocab_size}, {dtype}; "
            f"{found.samples} sequences, {len(batch.input_ids)} tokens, {predicted} predicted; {steps} steps"
        ),
    }
