"""Every fault of cuda_table.py is found by `check` alone, and no right kernel of the same files is called wrong."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from minibert.kernels import OPS
from minibert.lab.conform.check import CheckResult, planned, run_check
from minibert.lab.conform.own_kernels import load_kernels
from tests.faults.cuda_table import CUDA
from tests.faults.table import KINDS, Fault
from tests.planted import emulator

if TYPE_CHECKING:
    from minibert.backends.emulator.backend import EmulatorBackend

ROOT = Path(__file__).parents[2]
HERE = "tests/faults/cuda"

# Right kernels in the files of the faults, made of the same parts.
RIGHT = {
    "softmax": ("softmax",), "softmax_memory": ("softmax_grad",), "norm": ("layer_norm", "layer_norm_grad"),
    "loss": ("cross_entropy", "linear_cross_entropy"), "update": ("adamw", "square_norm", "reduce_sum"),
    "rows": ("gather_rows", "embedding", "scatter_rows", "dropout", "gelu", "relu"),
    "product": ("linear", "linear_grad"), "sixteen_bits": ("gelu_grad",), "attention": ("attention",),
    "attention_grad": ("attention_grad",),
}  # fmt: skip


@pytest.fixture(scope="module")
def backend() -> EmulatorBackend:
    return emulator()


def first_failure(
    backend: EmulatorBackend, op: str, spec: str, dtype: str, only: Collection[str] = ()
) -> CheckResult | None:
    """Of what `minibert check OP --backend emulator --kernel SPEC` demands, in its order; or of some demands alone."""
    with backend.using(load_kernels([f"{ROOT}/{spec}"])):
        for name, of_dtype in planned(backend, OPS[op], [dtype]):
            if not only or name in only:
                result = run_check(name, OPS[op], backend, of_dtype)
                if not result.ok:
                    return result
    return None


@pytest.mark.parametrize("fault", CUDA, ids=str)
def test_check_finds_it(backend: EmulatorBackend, fault: Fault) -> None:
    failed = first_failure(backend, fault.op, fault.spec, fault.dtype, {fault.by} - {""})
    assert failed is not None, f"{fault.name}: not found"
    assert failed.message.startswith(f"{fault.op} on emulator in {fault.dtype} fails {failed.check} ")
    assert " shapes " in failed.message or "(shapes " in failed.message or " kernel " in failed.message


@pytest.mark.parametrize(("file", "op"), [(file, op) for file, ops in RIGHT.items() for op in ops])
def test_a_right_kernel_passes(backend: EmulatorBackend, file: str, op: str) -> None:
    spec, dtype = f"{HERE}/{file}.py:right_{op}={op}", "float16" if file == "sixteen_bits" else "float32"
    failed = first_failure(backend, op, spec, dtype)
    assert failed is None, failed and failed.message


def test_every_fault_is_in_the_table_once() -> None:
    assert {fault.kind for fault in CUDA} <= set(KINDS)
    assert len({(fault.file, fault.function, fault.op) for fault in CUDA}) == len(CUDA)
    files = {path.stem for path in (ROOT / HERE).glob("*.py")}
    assert files == {Path(fault.file).stem for fault in CUDA} == set(RIGHT)
