"""Where a GPU is stricter than a CPU, or gives other numbers, so does the emulator.

The kernels are in tests/emulator_kernels/fidelity.cu; comments there mark the lines that must be named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from minibert.backends.emulator.findings import Finding
from tests.emulator_device import SCHEDULES, Device, marked, needs_compiler

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    made = Device()
    yield made
    made.process.close()


def findings(device: Device, kernel: str, grid: int = 1, **options: Any) -> list[Finding]:
    x, y = device.array(np.arange(128, dtype="f4")), device.empty(512)
    return device.run("fidelity.cu", kernel, grid, 64, x, y, np.int32(64), shared=512, **options).findings


# Alignment


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("float4_of_global", "in global memory: read of 16 bytes {} (the address is 4 bytes past a multiple of 16)"),
        ("float4_of_shared", "in shared memory: read of 16 bytes {} (the address is 12 bytes past a multiple of 16)"),
        ("float4_to_dynamic_shared", "in shared memory: write of 16 bytes {} (the address is 8 bytes past a"),
        ("float4_of_local", "in local memory: read of 16 bytes {} (the address is 4 bytes past a multiple of 16)"),
        ("float2_to_global", "in global memory: write of 8 bytes {} (the address is 4 bytes past a multiple of 8)"),
        ("int4_of_global", "in global memory: read of 16 bytes {} (the address is 8 bytes past a multiple of 16)"),
        ("uint4_copied", "in global memory: read of 16 bytes {} (the address is 12 bytes past a multiple of 16)"),
        ("uint4_by_ldg", "in global memory: read of 16 bytes {} (the address is 4 bytes past a multiple of 16)"),
        ("double2_of_global", "in global memory: read of 16 bytes {} (the address is 8 bytes past a multiple of 16)"),
        ("half2_of_shared", "in shared memory: read of 4 bytes {} (the address is 2 bytes past a multiple of 4)"),
        ("long_long_of_global", "in global memory: read of 8 bytes {} (the address is 4 bytes past a multiple of 8)"),
        ("aligned_struct", "in global memory: read of 16 bytes {} (the address is 8 bytes past a multiple of 16)"),
        ("float4_at_a_computed_place", "in global memory: read of 16 bytes {} (the address is 8 bytes past a multiple"),
    ],
)  # fmt: skip
def test_misaligned_vectors(device: Device, kernel: str, said: str) -> None:
    (found,) = findings(device, kernel)
    assert (found.kind, found.line) == ("misaligned access", marked("fidelity.cu", f"fault {kernel}"))
    assert said.format("by thread (0,0,0) of block (0,0,0)") in str(found)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_needs_no_alignment(device: Device, schedule: str) -> None:
    assert [str(f) for f in findings(device, "aligned_enough", schedule=schedule)] == []


# Integers


@pytest.mark.parametrize("kernel", ["divides_by_zero", "remainder_by_zero"])
def test_an_integer_divided_by_zero(device: Device, kernel: str) -> None:
    (found,) = findings(device, kernel)
    assert (found.kind, found.line) == ("integer division by zero", marked("fidelity.cu", f"fault {kernel}"))
