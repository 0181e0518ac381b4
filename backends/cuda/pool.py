"""Blocks of device memory that are used again: a step makes and drops the same arrays over and over."""

from __future__ import annotations

import weakref
from collections import defaultdict, deque

import numpy as np

from minibert.backends.cuda.driver import DeviceMemoryExhausted, Driver, Event

SMALLEST = 512  # bytes
STEPS = 8  # sizes between two powers of two: at most an eighth is wasted


def rounded(nbytes: int) -> int:
    """The size of the block that serves `nbytes`: one of eight steps between powers of two."""
    if nbytes <= SMALLEST:
        return SMALLEST
    step = max(SMALLEST, (1 << (nbytes - 1).bit_length()) // (2 * STEPS))
    return -(-nbytes // step) * step


class Block:
    """Memory in use; it goes back to its pool when nobody holds it any more."""

    __slots__ = ("__weakref__", "address", "nbytes", "op", "pool", "size")

    def __init__(self, pool: Pool, address: int, size: int, nbytes: int, op: str) -> None:
        self.pool, self.address, self.size, self.nbytes, self.op = pool, address, size, nbytes, op

    def __del__(self) -> None:
        self.pool._give_back(self)


class Pool:
    """Blocks of one driver, handed out in the order of one stream: a block given back is reused after what used it."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.used = self.peak = 0  # bytes, as asked for
        self._free: dict[int, list[int]] = defaultdict(list)  # size -> addresses
        self._live: weakref.WeakSet[Block] = weakref.WeakSet()

    def allocate(self, nbytes: int, op: str) -> Block:
        """A block for `nbytes`, made for `op`; raises DeviceMemoryExhausted with what takes up the memory."""
        size = rounded(nbytes)
        address = self._reuse(size) if self._free[size] else self._new(size, nbytes, op)
        self.driver.recycle(address, nbytes)
        block = Block(self, address, size, nbytes, op)
        self._live.add(block)
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        return block

    def _reuse(self, size: int) -> int:
        return self._free[size].pop()

    def _new(self, size: int, nbytes: int, op: str) -> int:
        try:
            return self.driver.allocate(size)
        except DeviceMemoryExhausted:
            self.trim()
        try:
            return self.driver.allocate(size)
        except DeviceMemoryExhausted:
            raise DeviceMemoryExhausted(self._report(nbytes, op)) from None

    def _report(self, nbytes: int, op: str) -> str:
        free, total = self.driver.memory()
        largest = sorted(self._live, key=lambda block: -block.nbytes)[:5]
        holders = ", ".join(f"{block.nbytes / 2**20:.1f} MiB made by {block.op}" for block in largest)
        return (
            f"{op} asked for {nbytes / 2**20:.1f} MiB of {self.driver.name}'s memory, of which {free / 2**20:.1f} of "
            f"{total / 2**20:.0f} MiB are free; live arrays hold {self.used / 2**20:.1f} MiB, the largest: "
            f"{holders or 'none'}. Try a smaller batch, or shorter sequences"
        )

    def trim(self) -> None:
        """Give every block that nobody holds back to the device."""
        self.driver.synchronize()  # what is queued may still use them
        for addresses in self._free.values():
            for address in addresses:
                self.driver.release(address)
        self._free.clear()

    def _give_back(self, block: Block) -> None:
        self.used -= block.nbytes
        self.driver.recycle(block.address, 0)
        self._free[block.size].append(block.address)


class SharedPool(Pool):
    """Blocks that one stream fills and others read: filled again after what was queued when they were given back."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._given_back: dict[int, Event] = {}

    def _reuse(self, size: int) -> int:
        address = self._free[size].pop(0)
        self.driver.wait(self._given_back.pop(address))
        return address

    def _give_back(self, block: Block) -> None:
        self.used -= block.nbytes
        self._given_back[block.address] = self.driver.record()
        self._free[block.size].append(block.address)


class HostBuffers:
    """Host memory to upload from, used again once the device has read it."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._read: dict[int, deque[tuple[Event, np.ndarray]]] = defaultdict(deque)

    def take(self, nbytes: int) -> np.ndarray:
        """A buffer of at least `nbytes`."""
        size = rounded(nbytes)
        waiting = self._read[size]
        if waiting and self.driver.finished(waiting[0][0]):
            return waiting.popleft()[1]
        return self.driver.host_buffer(size)

    def give_back(self, buffer: np.ndarray) -> None:
        """Its upload is queued; once that has run, it is free."""
        self._read[buffer.nbytes].append((self.driver.record(), buffer))
