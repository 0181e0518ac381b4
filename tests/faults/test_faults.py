"""`check` alone finds every faulty kernel of the table and says of which op and sample; right ones beside them pass."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import pytest

from minibert.backends.own import own_module
from minibert.kernels import OPS, Op
from minibert.lab.conform.check import CheckResult, planned, run_check
from minibert.lab.conform.own_kernels import TriedKernel
from tests.conftest import ROOT
from tests.faults.cpu_table import CPU
from tests.faults.table import KINDS, Fault

numba = pytest.importorskip("minibert.backends.numba_backend").backend

RIGHT = [(file, op) for file, op in dict.fromkeys((fault.file, fault.op) for fault in CPU)]


@cache
def module_of(file: str) -> ModuleType:
    """Run once: what one fault compiles, the others of its file need not."""
    return own_module(str(ROOT / "tests" / "faults" / file))


def first_failure(op: Op, file: str, function: str, only: tuple[str, ...] = ()) -> CheckResult | None:
    """Of the demands that `check` puts to an op, in its order; or of some alone."""
    kernel = TriedKernel(getattr(module_of(file), function), f"tests/faults/{file}:{function}={op.name}", op)
    with numba.using({op: kernel}):
        for name, dtype in planned(numba, op):
            if not only or name in only:
                result = run_check(name, op, numba, dtype)
                if not result.ok:
                    return result
    return None


@pytest.mark.parametrize("fault", CPU, ids=str)
def test_check_finds(fault: Fault) -> None:
    failed = first_failure(OPS[fault.op], fault.file, fault.function, (fault.by,) if fault.by else ())
    assert failed is not None, f"{fault.name}: not found"
    assert failed.message.startswith(f"{fault.op} on numba in {failed.dtype} fails {failed.check} ")
    assert "raised" not in failed.message, failed.message


@pytest.mark.parametrize(("file", "op"), RIGHT, ids=[op for _, op in RIGHT])
def test_the_right_kernel_beside_them_passes(file: str, op: str) -> None:
    """By every demand that finds a fault of its op: so none was found for a trivial reason."""
    demands = tuple({fault.by for fault in CPU if fault.op == op})
    failed = first_failure(OPS[op], file, f"right_{op}", () if "" in demands else demands)
    assert failed is None, failed and failed.message


def test_the_table_tells_what_everything_is() -> None:
    assert len({fault.spec for fault in CPU}) == len(CPU) >= 85
    assert {fault.kind for fault in CPU} <= set(KINDS)
    assert len({fault.report for fault in CPU if fault.report}) >= 20
    files = {fault.file for fault in CPU}
    assert files == {f"cpu/{path.name}" for path in (ROOT / "tests" / "faults" / "cpu").glob("*.py")}
