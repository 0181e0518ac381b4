"""A device that computes nothing: memory is counted as on any other, and a BERT of any size takes seconds.

The host side of the CUDA backend makes and drops the same arrays whatever is in them; here they hold zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np

from minibert.backends.cuda.backend import CudaBackend
from minibert.backends.cuda.driver import DeviceMemoryExhausted


class IdleDriver:
    """See `minibert.backends.cuda.driver.Driver`. `most` is the most that was taken of it."""

    name = "emulator"
    multiprocessors = 132

    def __init__(self, total: int) -> None:
        self.total, self.taken, self.most = total, 0, 0
        self._blocks: dict[int, int] = {}
        self._addresses = count(1 << 20, 1 << 40)  # far apart

    def describe(self) -> str:
        return "a device that computes nothing"

    def allocate(self, nbytes: int) -> int:
        if self.taken + nbytes > self.total:
            raise DeviceMemoryExhausted(f"{nbytes} bytes of {self.total}")
        self.taken += nbytes
        self.most = max(self.most, self.taken)
        address = next(self._addresses)
        self._blocks[address] = nbytes
        return address

    def release(self, address: int) -> None:
        self.taken -= self._blocks.pop(address)

    def memory(self) -> tuple[int, int]:
        return self.total - self.taken, self.total

    def host_buffer(self, nbytes: int) -> np.ndarray:
        return np.empty(nbytes, np.uint8)

    def download(self, address: int, nbytes: int) -> np.ndarray:
        return np.zeros(nbytes, np.uint8)

    def finished(self, event: Any) -> bool:
        return True

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        yield

    def _nothing(self, *arguments: Any, **options: Any) -> None: ...

    recycle = upload = fill = launch = multiply = synchronize = new_stream = record = wait = _nothing
    begin_capture = end_capture = replay = _nothing


def idle_backend(total: int = 1 << 40) -> CudaBackend:
    """The CUDA backend on such a device with so many bytes."""
    return CudaBackend(IdleDriver(total))
