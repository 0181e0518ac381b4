"""What `check` says of a kernel of tests/faults/."""

from __future__ import annotations

from functools import cache
from types import ModuleType

from minibert.backends import Backend
from minibert.backends.own import own_module
from minibert.kernels import Op
from minibert.lab.conform.check import CheckResult, planned, run_check
from minibert.lab.conform.own_kernels import TriedKernel
from tests.conftest import ROOT


@cache
def module_of(file: str) -> ModuleType:
    """Run once: what one fault compiles, the others of its file need not."""
    return own_module(str(ROOT / "tests" / "faults" / file))


def first_failure(
    backend: Backend, op: Op, file: str, function: str, only: tuple[str, ...] = (), dtype: str = "float32"
) -> CheckResult | None:
    """Of the demands that `check` puts to an op, in its order; or of some alone."""
    kernel = TriedKernel(getattr(module_of(file), function), f"tests/faults/{file}:{function}={op.name}", op)
    with backend.using({op: kernel}):
        for name, of_dtype in planned(backend, op, [dtype]):
            if not only or name in only:
                result = run_check(name, op, backend, of_dtype)
                if not result.ok:
                    return result
    return None
