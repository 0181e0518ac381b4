"""`--kernel FILE.py:FUNCTION=OP`: a kernel of one's own, swapped in for the length of a command."""

from __future__ import annotations

import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from minibert.backends.base import Kernel
from minibert.check import find_op
from minibert.errors import UserError
from minibert.kernels import Op
from minibert.kernels.array_module import numpy_module
from minibert.kernels.op import outputs

HELP = "Try a kernel of your own: FILE.py:FUNCTION=OP, a function of the op's arrays and parameters. May be repeated."


class TriedKernel:
    """A kernel on trial: it knows whether it was called, and its exceptions are its writer's to mend, in one line."""

    def __init__(self, kernel: Kernel, spec: str) -> None:
        self.kernel, self.spec, self.called = kernel, spec, False

    def __call__(self, *arrays: Any, **params: Any) -> Any:
        self.called = True
        try:
            return self.kernel(*arrays, **params)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--kernel {self.spec} raised {type(error).__name__}: {reason}") from error


def load_kernels(specs: Iterable[str]) -> dict[Op, TriedKernel]:
    """The functions that `--kernel` options name, by op. Raises UserError for a name that is not there."""
    kernels: dict[Op, TriedKernel] = {}
    for spec in specs:
        place, _, name = spec.rpartition("=")
        file, _, function = place.rpartition(":")
        if not (file and function and name):
            raise UserError(f"--kernel: expected FILE.py:FUNCTION=OP, got {spec!r}")
        op = find_op(name)
        if op in kernels:
            raise UserError(f"--kernel: {name} is given twice; choose one")
        kernels[op] = TriedKernel(_function(Path(file), function), spec)
    return kernels


def refuse_misshapen(kernels: dict[Op, TriedKernel]) -> None:
    """Raise UserError for a kernel whose results have the wrong number or shape: what runs after it would break."""
    for op, kernel in kernels.items():
        arrays, params = next(iter(op.samples(np.random.default_rng(0))))
        given = [np.asarray(a, "f4") if a.dtype.kind == "f" else np.asarray(a) for a in arrays]
        expected = [np.shape(r) for r in outputs(op.formula(numpy_module, *given, **params))]
        got = [np.shape(r) for r in outputs(kernel(*given, **params))]
        if not op.writes and got != expected:
            raise UserError(f"--kernel: {op.name}: expected results of shapes {expected}, got {got}")
        kernel.called = False  # a step is yet to call it


def refuse_uncalled(kernels: dict[Op, TriedKernel]) -> None:
    """Raise UserError where a kernel was never run: whatever was printed is not about it."""
    for op, kernel in kernels.items():
        if not kernel.called:
            raise UserError(
                f"--kernel: no step calls {op.name}, so it was not tried; `minibert compare` lists those it calls"
            )


def _function(path: Path, function: str) -> Kernel:
    if not path.is_file():
        raise UserError(f"--kernel: there is no file {path}")
    try:
        found = runpy.run_path(str(path), run_name=path.stem)
    except Exception as error:  # whatever the user's file does: it is the user's to mend
        raise UserError(f"--kernel: {path} does not run: {type(error).__name__}: {error}") from error
    if not callable(found.get(function)):
        functions = ", ".join(k for k, v in found.items() if callable(v) and not k.startswith("_")) or "none"
        raise UserError(f"--kernel: {path} has no function {function!r}; it has {functions}")
    return found[function]
