"""Every fault of cuda_table.py is found by `check` alone, and no right kernel of the same files is called wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from minibert.kernels import OPS
from tests.conftest import ROOT
from tests.faults.cuda_table import CUDA
from tests.faults.finding import first_failure
from tests.faults.table import KINDS, Fault
from tests.planted import emulator

if TYPE_CHECKING:
    from minibert.backends.emulator.backend import EmulatorBackend

# What a message tells: the sample and what came, the finding, where the kernel stands, or the launch that is refused.
TELLING = r"\(shapes .+\).*: .+|: kernel \w+: \d+ finding|kernel \w+ did not finish|: grid is one to three numbers"

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


@pytest.mark.parametrize("fault", CUDA, ids=str)
def test_check_finds_it(backend: EmulatorBackend, fault: Fault) -> None:
    only = (fault.by,) if fault.by else ()
    failed = first_failure(backend, OPS[fault.op], fault.file, fault.function, only, fault.dtype)
    assert failed is not None, f"{fault.name}: not found"
    assert re.match(rf"{fault.op} on emulator in {fault.dtype} (fails|is poor by) {failed.check} ", failed.message)
    assert re.search(TELLING, failed.message), failed.message


@pytest.mark.parametrize(("file", "op"), [(file, op) for file, ops in RIGHT.items() for op in ops])
def test_a_right_kernel_passes(
    backend: EmulatorBackend, file: str, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(backend.emulator.process, "_seconds", 60.0)  # of a launch, however busy the machine
    dtype = "float16" if file == "sixteen_bits" else "float32"
    failed = first_failure(backend, OPS[op], f"cuda/{file}.py", f"right_{op}", dtype=dtype)
    assert failed is None, failed and failed.message


def test_every_fault_is_in_the_table_once() -> None:
    assert {fault.kind for fault in CUDA} <= set(KINDS)
    assert len({(fault.file, fault.function, fault.op) for fault in CUDA}) == len(CUDA)
    files = {path.stem for path in (ROOT / "tests" / "faults" / "cuda").glob("*.py")}
    assert files == {Path(fault.file).stem for fault in CUDA} == set(RIGHT)
