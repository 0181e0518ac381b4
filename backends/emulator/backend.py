"""The backend `emulator`: CUDA kernels on the CPU, each step of them looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from minibert.backends.cuda.backend import CudaBackend
from minibert.backends.emulator.driver import SCHEDULES, EmulatorDriver


class EmulatorBackend(CudaBackend):
    emulated = True

    def __init__(self, driver: EmulatorDriver) -> None:
        super().__init__(driver)
        self.emulator = driver
        self.schedules: Sequence[str] = SCHEDULES

    def orders(self) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
        for schedule in self.schedules:
            yield f"the {schedule} schedule", self.emulator.set(schedule=schedule)


backend = EmulatorBackend(EmulatorDriver())
