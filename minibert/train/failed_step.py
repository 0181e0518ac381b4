"""A step that gave NaN or infinity, kept next to its run: the weights it began with, and the batch of the pass it was.

`minibert diff A B --again FOLDER` goes through it again, call by call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import join
from typing import Any, NamedTuple

import numpy as np

from minibert import backends
from minibert.errors import UserError
from minibert.model.checkpoint import read_arrays, write_arrays

BATCH = "batch.safetensors"  # beside the model


class FailedStep(NamedTuple):
    """What a pass was computed from, beside the weights."""

    batch: dict[str, np.ndarray]  # the fields of a PackedBatch
    task: str  # as `minibert diff --task` has it
    dtype: str
    seed: int
    number: int  # of the pass: with the seed it names the dropout masks


def write_failed_step(folder: Path, model: Any, step: FailedStep) -> None:
    """Raises UserError or OSError where it cannot be written."""
    model.save_pretrained(folder)
    about = {name: value for name, value in step._asdict().items() if name != "batch"}
    write_arrays(folder / BATCH, step.batch, {"failed_step": json.dumps(about)})


def read_failed_step(folder: Path) -> FailedStep:
    """Raises UserError for a folder that no run wrote when it stopped."""
    arrays, metadata = read_arrays(folder / BATCH)
    try:
        about: Mapping[str, Any] = json.loads(metadata["failed_step"])
        return FailedStep(arrays, str(about["task"]), str(about["dtype"]), int(about["seed"]), int(about["number"]))
    except (KeyError, OverflowError, RecursionError, TypeError, ValueError):
        raise UserError(f"{folder / BATCH} is no step of a run: expected what a run wrote as it stopped") from None


def command(folder: Path, backend: Any, kernels: Sequence[str]) -> str:
    """The line to paste. `kernels` are those of one's own, as `--kernel` takes them."""
    own = [word for spec in kernels for word in ("--kernel", spec)]
    products = [] if backend.product_mode == "float32" else ["--products", backend.product_mode]
    return join(["minibert", "diff", "numpy", backends.spec_of(backend), "--again", str(folder), *products, *own])
