"""`--kernel FILE.py:FUNCTION=OP`, or package.module:FUNCTION=OP: a kernel of one's own for the length of a command."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from minibert.backends import Backend
from minibert.backends.base import Kernel
from minibert.backends.own import defined_in, described, own_module
from minibert.errors import UserError
from minibert.kernels import Op
from minibert.kernels.array_module import numpy_module
from minibert.kernels.gpu.launch import CudaKernel
from minibert.kernels.op import outputs
from minibert.lab.conform.check import find_op
from minibert.lab.conform.raised import raised_at

HELP = (
    "Try a kernel of your own: FILE.py:FUNCTION=OP, a function of the op's arrays and parameters; on cupy and emulator "
    "it launches CUDA kernels. May be repeated."
)
MISPLACED = (
    "its file has CUDA kernels, which take arrays of --backend emulator or cupy",  # given NumPy's
    "on this backend a function launches CUDA kernels, and its file has none",  # given a device's
)


class TriedKernel:
    """A kernel on trial: it knows whether it was called, and its exceptions are its writer's to mend, in one line.

    `mistake` is why it cannot be tried at all: its CUDA source does not compile, or it is not written for the arrays
    of this backend. What it merely gets wrong is for the checks to say.
    """

    def __init__(self, kernel: Kernel, spec: str, op: Op) -> None:
        self.kernel, self.spec, self.op, self.called = kernel, spec, op, False
        self.mistake: UserError | None = None

    def __call__(self, *arrays: Any, **params: Any) -> Any:
        self.called = True
        on_device = any(_on_device(a) for a in arrays)
        try:
            result = self.kernel(*arrays, **params)
        except UserError as error:  # a .cu file that does not compile, say: it names its line
            self.mistake = error
            raise
        except (Exception, SystemExit) as error:
            raised = f"--kernel {self.spec} raised {described(error)}{raised_at(error)}"
            told = UserError(f"{raised} (arrays of shapes {', '.join(str(tuple(a.shape)) for a in arrays)})")
            if isinstance(error, TypeError | AttributeError) and on_device != self._launches():
                told = self.mistake = UserError(f"{raised}; {MISPLACED[on_device]}")
            raise told from error
        if on_device and not self.op.writes and not all(map(_on_device, outputs(result))):
            kinds = ", ".join(type(r).__name__ for r in outputs(result))
            self.mistake = UserError(
                f"--kernel {self.spec}: expected arrays made by x.device.empty(shape, dtype), got {kinds}"
            )
            raise self.mistake
        return result

    def anew(self) -> TriedKernel:
        """The kernel as it is when its file is read, whatever this one remembers of its calls."""
        return load_kernels([self.spec])[self.op]

    def _launches(self) -> bool:
        """Whether the file that the function is in has CUDA kernels."""
        return any(isinstance(v, CudaKernel) for v in getattr(self.kernel, "__globals__", {}).values())


def _on_device(x: Any) -> bool:
    return hasattr(x, "address")


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
        kernels[op] = TriedKernel(_function(file, function), spec, op)
    return kernels


def given_again(specs: Iterable[str]) -> str:
    """The options that give these kernels again, to go behind a command."""
    return "".join(f" --kernel {shlex.quote(spec)}" for spec in specs)


def refuse_untriable(kernels: dict[Op, TriedKernel]) -> None:
    """Raise the UserError of a kernel that cannot be tried at all."""
    for kernel in kernels.values():
        if kernel.mistake is not None:
            raise kernel.mistake


def refuse_misshapen(kernels: dict[Op, TriedKernel], place: Backend | None = None) -> None:
    """Raise UserError for a kernel whose results have the wrong number or shape: what runs after it would break.

    It is tried on arrays of `place`; by default on NumPy's.
    """
    for op, kernel in kernels.items():
        arrays, params = next(iter(op.samples(np.random.default_rng(0))))
        given = [np.asarray(a, "f4") if a.dtype.kind == "f" else np.asarray(a) for a in arrays]
        expected = [np.shape(r) for r in outputs(op.formula(numpy_module, *given, **params))]
        try:
            results = outputs(kernel(*(place.asarray(a) if place else a for a in given), **params))
            if place is not None:
                place.synchronize()
        except RuntimeError as error:  # what a kernel did on the device shows when somebody waits for it
            raise UserError(f"--kernel {kernel.spec}: {error}") from error
        got = [tuple(r.shape) if hasattr(r, "shape") else type(r).__name__ for r in results]
        if not op.writes and got != expected:
            found = ", ".join(map(str, got))
            raise UserError(f"--kernel: {op.name}: expected results of shapes {expected}, got [{found}]")
        kernel.called = False  # a step is yet to call it


def refuse_uncalled(kernels: dict[Op, TriedKernel]) -> None:
    """Raise UserError where a kernel was never run: whatever was printed is not about it."""
    for op, kernel in kernels.items():
        if not kernel.called:
            raise UserError(
                f"--kernel: no step calls {op.name}, so it was not tried; `minibert compare` lists those it calls"
            )


def _function(place: str, function: str) -> Kernel:
    """The function of a file or module. Raises UserError where there is none."""
    if place.endswith((".cu", ".cuh")):
        raise UserError(f"--kernel: {place} is CUDA C: name the .py file whose function launches its kernels")
    if place.endswith(".py") and not Path(place).is_file():
        raise UserError(f"--kernel: there is no file {place}")
    try:
        module = own_module(place)
    except (Exception, SystemExit) as error:  # whatever the user's file does: it is the user's to mend
        raise UserError(f"--kernel: {place} does not run: {described(error)}") from error
    found, functions = getattr(module, function, None), defined_in(module)
    if isinstance(found, CudaKernel):
        raise UserError(
            f"--kernel: {function} of {place} is a CUDA kernel: name the function that launches it; "
            f"there is {functions}"
        )
    if not callable(found):
        raise UserError(f"--kernel: {place} has no function {function!r}; it has {functions}")
    return found
