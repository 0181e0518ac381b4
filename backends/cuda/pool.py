"""Blocks of device memory that are used again: a step makes and drops the same arrays over and over."""

from __future__ import annotations

import weakref
from collections import defaultdict, deque

import numpy as np

from minibert.backends.cuda.driver import DeviceMemoryExhausted, Driver, Event

LARGEST_KEPT = 16 << 20  # bytes of host memory
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
            self.make_room()
        try:
            return self.driver.allocate(size)
        except DeviceMemoryExhausted:
            raise DeviceMemoryExhausted(self._report(nbytes, op)) from None

    def _report(self, nbytes: int, op: str) -> str:
        free, total = self.driver.memory()
        live = self.live()
        held = sum(block.nbytes for block in live)
        largest = sorted(live, key=lambda block: -block.nbytes)[:5]
        holders = ", ".join(f"{block.nbytes / 2**20:.1f} MiB made by {block.op}" for block in largest)
        return (
            f"{op} asked for {nbytes / 2**20:.1f} MiB of {self.driver.name}'s memory, of which {free / 2**20:.1f} of "
            f"{total / 2**20:.0f} MiB are free; live arrays hold {held / 2**20:.1f} MiB, the largest: "
            f"{holders or 'none'}. Try a smaller batch, or shorter sequences"
        )

    def live(self) -> list[Block]:
        """Blocks in use, here and in the pool that this one stands beside."""
        return list(self._live)

    @property
    def held(self) -> int:
        """Bytes of the device's blocks that are here, in use or not."""
        free = sum(size * len(addresses) for size, addresses in self._free.items())
        return free + sum(block.size for block in self._live)

    def make_room(self) -> None:
        """What can be done before memory is given up for exhausted."""
        self.trim()

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


class GraphPool(Pool):
    """Blocks whose addresses graphs have by heart: not used for anything else as long as one of them lives.

    Graphs share them, as they run one after the other: what one needs only within itself another may overwrite.
    """

    def __init__(self, driver: Driver, usual: Pool) -> None:
        super().__init__(driver)
        self.usual = usual
        self.graphs = 0  # that live

    def make_room(self) -> None:
        """Nobody can wait while a graph is captured; `usual` was trimmed before."""

    def live(self) -> list[Block]:
        return [*super().live(), *self.usual.live()]

    def leave(self) -> None:
        """A graph is gone. After the last, the usual pool has all that is free here, and all that will be."""
        self.graphs -= 1
        if self.graphs:
            return
        for size, addresses in self._free.items():
            self.usual._free[size] += addresses
        self._free = self.usual._free


class SharedPool(Pool):
    """Blocks that one stream fills and another reads: filled again after all that was queued to read them."""

    def __init__(self, driver: Driver, usual: Pool) -> None:
        super().__init__(driver)
        self.usual = usual
        self._read: list[tuple[int, int]] = []  # (size, address) of blocks given back since the last mark
        self._marks: dict[int, Event] = {}  # of blocks that are free

    def mark(self) -> None:
        """On the stream that reads: blocks that were given back until here may be filled again after this point."""
        read, self._read = self._read, []
        event = self.driver.record() if read else None
        for size, address in read:
            self._marks[address] = event
            self._free[size].append(address)

    def make_room(self) -> None:
        self.trim()
        self.usual.trim()

    def trim(self) -> None:
        self.mark()
        super().trim()
        self._marks.clear()

    def live(self) -> list[Block]:
        return [*super().live(), *self.usual.live()]

    def _reuse(self, size: int) -> int:
        address = self._free[size].pop(0)
        self.driver.wait(self._marks.pop(address))
        return address

    def _give_back(self, block: Block) -> None:
        self.used -= block.nbytes
        self._read.append((block.size, block.address))  # whichever stream is the current one: `mark` knows


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
        if buffer.nbytes > LARGEST_KEPT:  # a model's weights, once; page-locked memory is scarce
            self.driver.synchronize()
            return
        self._read[buffer.nbytes].append((self.driver.record(), buffer))
