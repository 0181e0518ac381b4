"""`check` alone finds every faulty kernel of the table and says of which op and sample; right ones beside them pass.

Of each kernel only the demand is put that the table names, which is one of those that `check` puts; and that alone runs
a kernel in a process of its own which may harm this one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from minibert.kernels import OPS, Op
from minibert.kernels.drawing import Drawn
from minibert.lab.conform import drawn, guarded
from minibert.lab.conform.case import Case, Input
from minibert.lab.conform.check import CHECKS, CheckResult, run_check
from minibert.lab.conform.own_kernels import TriedKernel
from tests.conftest import ROOT
from tests.faults.cpu_table import CPU
from tests.faults.finding import module_of
from tests.faults.table import KINDS, Fault

numba = pytest.importorskip("minibert.backends.numba_backend").backend

HERE = ROOT / "tests" / "faults"
SAMPLE = re.compile(r"(sample \d+|part in a step|\d+ [a-z]|values [a-z]|shapes \()")  # how messages name an input
RIGHT = [(file, op) for file, op in dict.fromkeys((fault.file, fault.op) for fault in CPU)]


@pytest.fixture(autouse=True, scope="module")
def _soon_done() -> Iterator[None]:
    """What is drawn for an op serves all its faults; those are not made small, nor waited for as long as by `check`."""
    inputs: dict[str, Input | None] = {}
    draw = drawn.drawn_input

    def draw_once(case: Case, wanted: Drawn) -> Input | None:
        name = f"{case.op.name} {wanted!r}"
        if name not in inputs:
            if not next(iter(inputs), name).startswith(f"{case.op.name} "):
                inputs.clear()  # of another op
            inputs[name] = draw(case, wanted)
        return inputs[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "drawn_input", draw_once)
        patch.setattr(drawn, "SHRINKING_SECONDS", 0.1)
        patch.setattr(guarded, "CALL_SECONDS", 2.0)
        yield


def put(demand: str, op: Op, file: str, function: str) -> CheckResult:
    """One demand to a function of a file, on Numba in float32."""
    kernel = getattr(module_of(file), function)
    if demand == "guarded":  # by the name that another process finds it by
        kernel = TriedKernel(kernel, f"{HERE / file}:{function}={op.name}", op)
    with numba.using({op: kernel}):
        return run_check(demand, op, numba, "float32")


@pytest.mark.parametrize("fault", CPU, ids=str)
def test_check_finds(fault: Fault) -> None:
    result = put(fault.by, OPS[fault.op], fault.file, fault.function)
    assert not result.ok, f"not found: {fault.name}"
    assert re.match(rf"{fault.op} on numba in float32 (fails|is poor by) {fault.by} \(seed 0\): ", result.message)
    assert SAMPLE.search(result.message) and "raised" not in result.message, result.message


@pytest.mark.parametrize(("file", "op"), RIGHT, ids=[op for _, op in RIGHT])
def test_the_right_kernel_beside_them_passes(file: str, op: str) -> None:
    """By each demand that finds a fault of its op: so none is found for a trivial reason."""
    for demand in {fault.by for fault in CPU if fault.op == op}:
        result = put(demand, OPS[op], file, f"right_{op}")
        assert result.ok, result.message


def test_the_table_tells_what_everything_is() -> None:
    assert len({fault.spec for fault in CPU}) == len(CPU) >= 85
    assert {fault.kind for fault in CPU} <= set(KINDS)
    assert {fault.by for fault in CPU} <= set(CHECKS)
    assert len({fault.report for fault in CPU if fault.report}) >= 20
    assert {fault.file for fault in CPU} == {f"cpu/{path.name}" for path in (HERE / "cpu").glob("*.py")}
