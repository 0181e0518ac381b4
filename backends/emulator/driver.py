"""The driver of the CUDA backend that runs kernels on the CPU, and looks at every step they take.

Its streams queue, as a GPU's do: nothing runs before somebody waits, so that host code which forgets to wait, or
changes a buffer too early, shows. Memory that nobody has written holds NaN. Kernels run in a process of their own.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minibert.backends.base import BackendUnavailable
from minibert.backends.cuda.driver import ALIGNMENT, DeviceMemoryExhausted, Matrix, Product
from minibert.backends.emulator.findings import Finding, TrafficLine, unset_variable
from minibert.backends.emulator.process import EmulatorCrash, EmulatorProcess
from minibert.backends.emulator.toolchain import compile_kernels, compiler, uninitialised
from minibert.kernels.activation import gelu_formula
from minibert.kernels.array_module import numpy_module
from minibert.kernels.gpu.launch import INCLUDE, CudaKernel

PAGE = 4096
ARENA = 1 << 36  # bytes of addresses
MEMORY = "MINIBERT_EMULATOR_MEMORY"  # GiB that the device has
MOST_QUEUED = 512  # calls: so that what is queued does not pile up where nobody waits
SCHEDULES = ("forward", "reverse", "random")


class KernelFault(RuntimeError):
    """A kernel did what it must not; the message has a line for each finding."""

    def __init__(self, op: str, kernel: str, findings: Sequence[Finding]) -> None:
        self.findings = list(findings)
        lines = "\n".join(f"  {finding}" for finding in findings)
        super().__init__(f"{op}: kernel {kernel}: {len(findings)} finding{'s'[: len(findings) != 1]}\n{lines}")


@dataclass(frozen=True)
class Settings:
    """How kernels run."""

    sanitize: bool = True  # look for races, bounds, unwritten memory, ...
    traffic: bool = False  # count sectors and bank conflicts
    schedule: str = SCHEDULES[0]  # the order of blocks, warps and lanes
    seed: int = 0  # of the random schedule, and of which stream goes first


class Call(NamedTuple):
    """What waits for its turn in a stream; it runs again later where it returns False, to wait for another stream."""

    run: Callable[[], bool]
    moves_memory: bool  # not lost when a kernel before it fails: arrays that live on depend on it


Stream = deque[Call]


class EmulatorDriver:
    """See `minibert.backends.cuda.driver.Driver`."""

    name = "emulator"
    multiprocessors = 2  # few, so that grid-stride loops go round more than once

    def __init__(self) -> None:
        compiler()  # says what to install where it is missing
        self.settings = Settings()
        self.notes: dict[tuple[str, str, int], Finding] = {}
        self.traffic: dict[tuple[str, int, str, str], TrafficLine] = {}
        self.total = memory_asked_for()
        self.gdb: str | None = None
        self.sources: set[Path] = set()  # .cu files of kernels that were launched
        self._process: EmulatorProcess | None = None
        self._default = Stream()
        self._streams = [self._default]
        self._current = self._default
        self._captured: list[Call] | None = None
        self._capturing: Stream | None = None  # the stream that is being captured; others go on
        self._made_in_capture: set[int] = set()  # addresses of blocks
        self._taken = 0  # bytes of blocks
        self._end = PAGE  # of the part of the arena that has been given out
        self._blocks: dict[int, int] = {}  # address -> bytes
        self._holds: dict[int, int] = {}  # address -> bytes that the block holds now
        self._released: dict[int, list[int]] = {}
        self._compared: set[tuple[Path, str]] = set()
        self._random = random.Random(0)

    @property
    def process(self) -> EmulatorProcess:
        """Started when first needed."""
        if self._process is None:
            self._process = EmulatorProcess(ARENA, gdb=self.gdb)
        return self._process

    @contextmanager
    def set(self, **changes: Any) -> Iterator[None]:
        """Other settings for the length of a `with` block."""
        self.synchronize()
        before, self.settings = self.settings, replace(self.settings, **changes)
        try:
            yield
            self.synchronize()
        finally:
            self.settings = before

    def describe(self) -> str:
        return f"CUDA emulator on the CPU (its times are not GPU speed), {Path(compiler()).name}"

    # ------------------------------------------------------------------------------------------------ memory

    def allocate(self, nbytes: int) -> int:
        if self._taken + nbytes > self.total:
            raise DeviceMemoryExhausted(f"{nbytes} bytes of {self.total}")
        self._taken += nbytes
        if self._released.get(nbytes):
            address = self._released[nbytes].pop()
        else:  # the end of the block next to a page that nobody may touch
            pages = -(-nbytes // PAGE)
            if self._end + (pages + 1) * PAGE > ARENA:
                self._taken -= nbytes
                raise DeviceMemoryExhausted(f"{nbytes} bytes, with {ARENA - self._end} of the addresses left")
            address = self.process.base + self._end + pages * PAGE - -(-nbytes // ALIGNMENT) * ALIGNMENT
            self._end += (pages + 1) * PAGE
        self._blocks[address] = nbytes
        return address

    def release(self, address: int) -> None:
        nbytes = self._blocks.pop(address)
        self._taken -= nbytes
        self._released.setdefault(nbytes, []).append(address)

    def recycle(self, address: int, nbytes: int) -> None:
        def run() -> bool:
            before = self._holds.pop(address, 0)
            if before:
                self.process.region(address, before, "freed")
            if nbytes:
                self.process.region(address, nbytes, "unwritten")
                self._holds[address] = nbytes
            return True

        if nbytes and self._captured is not None:
            self._made_in_capture.add(address)
        if self._captured is None or address in self._made_in_capture:
            self._queue(run, moves_memory=True)
        else:  # a block from before the capture is freed once, not at each replay
            self._current.append(Call(run, moves_memory=True))

    def _bytes(self, address: int, nbytes: int) -> np.ndarray:
        start = address - self.process.base
        return self.process.memory[start : start + nbytes]

    def host_buffer(self, nbytes: int) -> np.ndarray:
        return np.empty(nbytes, np.uint8)

    def upload(self, buffer: np.ndarray, address: int) -> None:
        def run() -> bool:
            self._written(address, buffer.nbytes)[...] = buffer
            return True

        self._queue(run, moves_memory=True)
        self._relieve()

    def download(self, address: int, nbytes: int) -> np.ndarray:
        self.synchronize()
        return self._bytes(address, nbytes).copy()

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        def run() -> bool:
            self._written(address, nbytes)[...] = byte
            return True

        self._queue(run, moves_memory=True)

    def _written(self, address: int, nbytes: int) -> np.ndarray:
        """Memory that the host, or a library, is about to write."""
        self.process.region(address, nbytes, "written")
        return self._bytes(address, nbytes)

    def memory(self) -> tuple[int, int]:
        return self.total - self._taken, self.total

    # ----------------------------------------------------------------------------------------------- kernels

    def launch(
        self, kernel: CudaKernel, defines: Mapping[str, Any], grid: tuple[int, ...], shared: int,
        arguments: Sequence[bytes], op: str,
    ) -> None:  # fmt: skip
        text = {name: str(value) for name, value in defines.items()}
        settings, name = self.settings, kernel.signature.name
        library = compile_kernels(kernel.file.path, text, INCLUDE, sanitize=settings.sanitize or settings.traffic)
        packed = list(arguments)
        self.sources.add(kernel.file.path)
        self._compare_signatures(kernel, library)

        def run() -> bool:
            try:
                report = self.process.launch(
                    library, name, grid, (kernel.block, 1, 1), shared, packed, sanitize=settings.sanitize,
                    traffic=settings.traffic, schedule=settings.schedule, seed=settings.seed,
                )  # fmt: skip
            except EmulatorCrash as crash:
                raise EmulatorCrash(f"{op}: {crash}", crash.findings) from None
            for line in report.traffic:
                self._count(line)
            told = unset_variables(library, name, kernel.file.signatures) if settings.sanitize else []
            for note in (*report.notes, *(finding for finding in told if finding.is_note)):
                self.notes.setdefault((note.kind, note.file, note.line), note)
            findings = report.findings + [finding for finding in told if not finding.is_note]
            if findings:
                raise KernelFault(op, name, findings)
            return True

        self._queue(run)
        self._relieve()

    def _compare_signatures(self, kernel: CudaKernel, library: Path) -> None:
        """What was read from the source is what the compiler saw: else arguments would be packed wrongly."""
        if (library, kernel.signature.name) in self._compared:
            return
        compiled = self.process.load(library)[kernel.signature.name]
        read = [("pointer", 8) if p.is_pointer else ("value", p.nbytes) for p in kernel.signature.parameters]
        seen = [("pointer" if a.kind == "pointer" else "value", a.bytes) for a in compiled]
        if read != seen:
            raise TypeError(f"kernel {kernel.signature.name}: its source reads as {read}, the compiler saw {seen}")
        self._compared.add((library, kernel.signature.name))

    def _count(self, line: TrafficLine) -> None:
        key = line.file, line.line, line.space, line.access
        self.traffic[key] = line if key not in self.traffic else self.traffic[key].plus(line)

    def multiply(self, product: Product) -> None:
        @np.errstate(all="ignore")  # a GPU does not warn
        def run() -> bool:
            left, right = (self._operand(product, matrix, a) for matrix, a in ((product.a, True), (product.b, False)))
            result = np.matmul(left, right)
            if product.epilogue == "bias_gradient":
                terms = self._operand(product._replace(mode="float32"), product.a, True)  # no product: as they are
                sums = self._written(product.bias, product.m * product.dtype.itemsize).view(product.dtype)
                sums[...] = terms[0].sum(axis=1).astype(product.dtype)
            elif product.epilogue is not None:
                result = result + self._vector(product.bias, product.n, product.dtype)
            if product.epilogue == "gelu":
                self._store(product, product.before, result)
                result = gelu_formula(numpy_module, result, approximate="tanh")
            self._store(product, product.out.address, result)
            return True

        self._queue(run)
        self._relieve()

    def _store(self, product: Product, address: int, values: np.ndarray) -> None:
        size, row = product.dtype.itemsize, product.n
        if product.out.leading == row or product.m == 1:  # one batch of whole rows after the other
            out = self._written(address, product.batch * product.m * row * size).view(product.dtype)
            out.reshape(values.shape)[...] = values.astype(product.dtype)
            return
        for i, stored in enumerate(values.reshape(-1, row).astype(product.dtype)):  # what lies between is left alone
            matrix, own = divmod(i, product.m)
            start = matrix * product.out.batch_stride + own * product.out.leading
            self._written(address + start * size, row * size).view(product.dtype)[...] = stored

    def _vector(self, address: int, count: int, dtype: np.dtype[Any]) -> np.ndarray:
        return self._bytes(address, count * dtype.itemsize).view(dtype).astype(np.float32)

    def _operand(self, product: Product, matrix: Matrix, is_a: bool) -> np.ndarray:
        """(batch, rows, columns) float32: what tensor cores or plain arithmetic would read."""
        rows, columns = (product.m, product.k) if is_a else (product.k, product.n)
        kept = (columns, rows) if matrix.transposed else (rows, columns)  # as memory has it
        count = (product.batch - 1) * matrix.batch_stride + (kept[0] - 1) * matrix.leading + kept[1]
        values = self._bytes(matrix.address, count * product.dtype.itemsize).view(product.dtype).astype(np.float32)
        strides = (4 * matrix.batch_stride, 4 * matrix.leading, 4)
        found = np.lib.stride_tricks.as_strided(values, (product.batch, *kept), strides)
        found = found.swapaxes(1, 2) if matrix.transposed else found
        return rounded_to_tf32(found) if product.mode == "tf32" and product.dtype == np.float32 else found

    # ----------------------------------------------------------------------------------------------- streams

    def _queue(self, run: Callable[[], bool], moves_memory: bool = False) -> None:
        call = Call(run, moves_memory)
        if self._captured is not None and self._current is self._capturing:
            self._captured.append(call)
            return
        self._current.append(call)

    def _relieve(self) -> None:
        """Called where somebody hears of a fault: not where blocks are given back, which is wherever an array dies."""
        if len(self._current) > MOST_QUEUED and self._captured is None:
            self.synchronize()

    def synchronize(self) -> None:
        """Run what is queued, a stream chosen anew for each call. Raises KernelFault."""
        if self._captured is not None:
            raise RuntimeError("waiting for the device while a graph is captured: a GPU would refuse it")
        try:
            while any(self._streams):
                ready = [stream for stream in self._streams if stream]
                self._random.shuffle(ready)
                for stream in ready:
                    if stream[0].run():
                        stream.popleft()
                        break
                else:
                    raise RuntimeError("streams wait for events that nothing will record")
        except BaseException as error:
            if isinstance(error, EmulatorCrash):
                self._holds.clear()  # the next process knows of no block
            for stream in self._streams:
                waiting = [call for call in stream if call.moves_memory]
                stream.clear()
                for call in waiting:
                    call.run()
            raise

    def new_stream(self) -> Stream:
        self._streams.append(Stream())
        return self._streams[-1]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def record(self) -> list[bool]:
        event = [False]

        def run() -> bool:
            event[0] = True
            return True

        self._queue(run, moves_memory=True)  # what is uploaded after a fault has been read, too
        return event

    def wait(self, event: list[bool]) -> None:
        self._queue(lambda: event[0])

    def finished(self, event: list[bool]) -> bool:
        return event[0]

    def begin_capture(self) -> None:
        self._captured, self._capturing = [], self._current
        self._made_in_capture.clear()

    def end_capture(self) -> list[Call]:
        graph, self._captured, self._capturing = self._captured, None, None
        assert graph is not None
        return graph

    def replay(self, graph: list[Call]) -> None:
        self._current.extend(graph)


def unset_variables(library: Path, kernel: str, kernels: Container[str]) -> list[Finding]:
    """What the compiler said of the variables of a kernel, and of the functions that it may call."""
    return [
        unset_variable(one, kernel)
        for one in uninitialised(library)
        if one.function == kernel or one.function not in kernels
    ]


def memory_asked_for() -> int:
    """Bytes of the device, by the environment. Raises BackendUnavailable for what is no size."""
    given = os.environ.get(MEMORY, "").strip() or "8"
    try:
        gibibytes = float(given)
    except ValueError:
        gibibytes = 0.0
    if not 0 < gibibytes <= ARENA / 2**30:
        raise BackendUnavailable(f"${MEMORY}: expected GiB of memory, above 0 to {ARENA / 2**30:g}, got {given!r}")
    return round(gibibytes * 2**30)


def rounded_to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 to 10 bits of mantissa, to nearest: what tensor cores keep of it."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)).view("f4")
