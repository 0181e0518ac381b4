"""`check` alone finds every faulty kernel of the table and says of which op and sample; right ones beside them pass."""

from __future__ import annotations

import pytest

from minibert.kernels import OPS
from tests.conftest import ROOT
from tests.faults.cpu_table import CPU
from tests.faults.finding import first_failure
from tests.faults.table import KINDS, Fault

numba = pytest.importorskip("minibert.backends.numba_backend").backend

RIGHT = [(file, op) for file, op in dict.fromkeys((fault.file, fault.op) for fault in CPU)]


@pytest.mark.parametrize("fault", CPU, ids=str)
def test_check_finds(fault: Fault) -> None:
    failed = first_failure(numba, OPS[fault.op], fault.file, fault.function, (fault.by,) if fault.by else ())
    assert failed is not None, f"{fault.name}: not found"
    assert failed.message.startswith(f"{fault.op} on numba in {failed.dtype} fails {failed.check} ")
    assert "raised" not in failed.message, failed.message


@pytest.mark.parametrize(("file", "op"), RIGHT, ids=[op for _, op in RIGHT])
def test_the_right_kernel_beside_them_passes(file: str, op: str) -> None:
    """By every demand that finds a fault of its op: so none was found for a trivial reason."""
    demands = tuple({fault.by for fault in CPU if fault.op == op})
    failed = first_failure(numba, OPS[op], file, f"right_{op}", () if "" in demands else demands)
    assert failed is None, failed and failed.message


def test_the_table_tells_what_everything_is() -> None:
    assert len({fault.spec for fault in CPU}) == len(CPU) >= 85
    assert {fault.kind for fault in CPU} <= set(KINDS)
    assert len({fault.report for fault in CPU if fault.report}) >= 20
    files = {fault.file for fault in CPU}
    assert files == {f"cpu/{path.name}" for path in (ROOT / "tests" / "faults" / "cpu").glob("*.py")}
