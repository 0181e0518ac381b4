"""What the CUDA backend asks of a device: the calls below and nothing else.

Two drivers answer, `cupy_driver.CupyDriver` on a GPU and `emulator.driver.EmulatorDriver` anywhere: the host code that
runs on a GPU is the host code that is tested everywhere. Addresses are integers. Everything but `allocate`, `release`
and `host_buffer` is queued on the current stream, in order, and returns at once; `download` and `synchronize` wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

from minibert.kernels.gpu.launch import CudaKernel

ALIGNMENT = 256  # bytes: of every address that `allocate` gives

Stream = Any  # in-order queue of a device
Event = Any  # a point in a stream
Graph = Any  # what was captured from a stream


class DeviceMemoryExhausted(MemoryError):
    """The device has no block of that size left."""


class Matrix(NamedTuple):
    """One operand of a product, or a batch of them: row-major; `transposed` says that memory holds its transpose."""

    address: int
    leading: int  # elements from one row in memory to the next
    batch_stride: int  # elements from one matrix of the batch to the next; 0: the same one for all
    transposed: bool = False


class Product(NamedTuple):
    """out (batch, m, n) = a (batch, m, k) b (batch, k, n), then the epilogue; stored as `dtype`, summed in float32.

    epilogue: None; "bias": + bias (n,); "gelu": + bias, kept in `before`, then GELU in its tanh form; "bias_gradient",
    of a batch of 1: `bias` (m,) receives the sums of a over k.
    mode, of float32 operands: "float32", or "tf32" (operands rounded to 10 bits of mantissa, on tensor cores).
    """

    m: int
    n: int
    k: int
    batch: int
    a: Matrix
    b: Matrix
    out: Matrix  # never transposed
    dtype: np.dtype[Any]  # float32, float16, bfloat16
    mode: str = "float32"
    epilogue: str | None = None
    bias: int = 0  # address of (n,) dtype; for "bias_gradient" of (m,) dtype
    before: int = 0  # address of (m, n) dtype, leading dimension as out


class Driver(Protocol):
    """A device."""

    name: str  # "cupy" or "emulator"
    multiprocessors: int

    def describe(self) -> str:
        """Device, library, versions: for a table."""

    def allocate(self, nbytes: int) -> int:
        """A block of memory, for good until `release`; raises DeviceMemoryExhausted."""

    def release(self, address: int) -> None:
        """Give a block back; nothing that is queued may still use it."""

    def recycle(self, address: int, nbytes: int) -> None:
        """From here on in this stream the block at `address` holds `nbytes` that nobody has written; 0: it is free."""

    def host_buffer(self, nbytes: int) -> np.ndarray:
        """(nbytes,) uint8 of host memory that the device can read while the host goes on (page-locked on a GPU)."""

    def upload(self, buffer: np.ndarray, address: int) -> None:
        """Copy a host buffer to the device; read when its turn comes, so it must stay as it is until then."""

    def download(self, address: int, nbytes: int) -> np.ndarray:
        """(nbytes,) uint8, once all that was queued before has run."""

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        """Set every byte."""

    def launch(
        self, kernel: CudaKernel, defines: Mapping[str, Any], grid: tuple[int, ...], shared: int,
        arguments: Sequence[bytes], op: str,
    ) -> None:  # fmt: skip
        """Run a kernel; compiled on first use. `op` names the call in errors."""

    def multiply(self, product: Product) -> None:
        """A matrix product by a library."""

    def synchronize(self) -> None:
        """Wait for all streams; raises what went wrong on the way."""

    def new_stream(self) -> Stream: ...

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        """A block in which `stream` is the current one."""

    def record(self) -> Event:
        """Mark this point of the current stream."""

    def wait(self, event: Event) -> None:
        """Let the current stream wait for an event of another."""

    def finished(self, event: Event) -> bool:
        """Whether the device has come past that point."""

    def begin_capture(self) -> None:
        """From here on, remember what is queued on the current stream instead of running it."""

    def end_capture(self) -> Graph: ...

    def replay(self, graph: Graph) -> None:
        """Queue all that was captured, in one call."""

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device."""
