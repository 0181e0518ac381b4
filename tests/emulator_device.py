"""A device for tests of the emulator, and how they find lines in tests/emulator_kernels."""

from __future__ import annotations

import re
import shutil
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.backends.emulator import toolchain
from minibert.backends.emulator.process import EmulatorProcess, Report

KERNELS = Path(__file__).parent / "emulator_kernels"
SCHEDULES = ("forward", "reverse", "random")

needs_compiler = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None,
    reason="the emulator needs Linux and g++: apt install g++",
)


class Device:
    """A process with arrays, for tests: arrays are found by their addresses, and never freed unless asked to."""

    def __init__(self, **options: Any) -> None:
        self.process = EmulatorProcess(1 << 30, **options)
        self.end = self.process.base + 8192

    def empty(self, nbytes: int) -> int:
        """An array that nobody has written, its end next to memory that belongs to none."""
        address = self.end
        self.end += -(-nbytes // 4096) * 4096 + 4096
        self.process.region(address, nbytes, "unwritten")
        return address

    def array(self, values: np.ndarray) -> int:
        address = self.empty(values.nbytes)
        start = address - self.process.base
        self.process.memory[start : start + values.nbytes] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self.process.region(address, values.nbytes, "written")
        return address

    def read(self, address: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
        start, nbytes = address - self.process.base, int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.process.memory[start : start + nbytes].view(dtype).reshape(shape).copy()

    def run(
        self, file: str, kernel: str, grid: int, block: int, *arguments: Any, shared: int = 0, **options: Any
    ) -> Report:
        """Launch a kernel of tests/emulator_kernels: Python ints are addresses or longs, the rest as NumPy scalars."""
        sanitize = options.get("sanitize", True) or options.get("traffic", False)
        library = toolchain.compile_kernels(KERNELS / file, {}, [], sanitize=sanitize)
        packed = [struct.pack("<q", a) if isinstance(a, int) else a.tobytes() for a in arguments]
        return self.process.launch(library, kernel, (grid,), (block,), shared, packed, **options)


def marked(file: str, mark: str) -> int:
    """The line of a file that bears a mark."""
    found = [n for n, line in enumerate((KERNELS / file).read_text().splitlines(), 1) if re.search(rf"{mark}\b", line)]
    assert len(found) == 1, f"{file}: {mark} is on {len(found)} lines"
    return found[0]
