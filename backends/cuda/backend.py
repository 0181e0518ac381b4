"""The CUDA backend: kernels of `kernels/*/gpu.cu` on whatever plays the device, products by its library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from minibert.backends.base import NARROW, Backend, storage_of
from minibert.backends.cuda.array import DeviceArray, NotOnDevice, ghost
from minibert.backends.cuda.driver import Driver
from minibert.backends.cuda.graph import Capture, LiveInt
from minibert.backends.cuda.pool import GraphPool, HostBuffers, Pool, SharedPool
from minibert.backends.cuda.product import multiply
from minibert.errors import UserError
from minibert.kernels.array_module import numpy_module
from minibert.kernels.gpu.launch import CudaKernel, on_host
from minibert.kernels.op import Array, Op, holds_floats, outputs
from minibert.kernels.view.gpu import copy_strided


class DeviceModule:
    """What a formula that moves elements and computes nothing needs of an array module."""

    def __init__(self, device: CudaBackend) -> None:
        self.device = device

    def asarray(self, x: Any, dtype: Any = None) -> DeviceArray:
        return self.device.asarray(x, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        return self.device.zeros(shape, dtype)

    def broadcast_to(self, x: DeviceArray, shape: tuple[int, ...]) -> DeviceArray:
        return x.broadcast_to(shape)

    def concatenate(self, arrays: Sequence[DeviceArray], axis: int = 0) -> DeviceArray:
        first = arrays[0]
        if not -first.ndim <= axis < first.ndim:
            raise ValueError(f"concatenate: no axis {axis} in an array of shape {first.shape}")
        axis %= first.ndim
        before, after = first.shape[:axis], first.shape[axis + 1 :]
        if any((a.shape[:axis], a.shape[axis + 1 :]) != (before, after) for a in arrays):
            shapes = ", ".join(str(a.shape) for a in arrays)
            raise ValueError(f"concatenate along axis {axis}: shapes differ elsewhere: {shapes}")
        shape = (*before, sum(a.shape[axis] for a in arrays), *after)
        if prod(before) == 1 and all(_follows(b, a) for a, b in pairwise(arrays)):  # weights, in an optimiser's array
            return DeviceArray(self.device, first.block, first.address, ghost(shape, first.dtype))
        out = self.device.empty(shape, first.dtype)
        start = 0
        for a in arrays:
            part = (slice(None),) * axis + (slice(start, start + a.shape[axis]),)
            self.device.copy_into(out[part], a)
            start += a.shape[axis]
        return out

    def __getattr__(self, name: str) -> Any:
        raise NotOnDevice(f"no {name} on a device: it takes a kernel")


def _follows(b: DeviceArray, a: DeviceArray) -> bool:
    """Whether `b` lies in memory right after `a`, both row by row."""
    neighbours = b.block is a.block and b.address == a.address + a.nbytes and b.dtype == a.dtype
    return neighbours and a.is_contiguous and b.is_contiguous


class CudaBackend(Backend):
    """Arrays of one device. It is also what a gpu.py reaches as `x.device`."""

    dtypes = ("float32", "float16", "bfloat16")
    product_modes = ("float32", "tf32")

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver.name, DeviceModule(self), kernel_files="gpu")
        self.driver = driver
        self.pool = Pool(driver)
        self.host_buffers = HostBuffers(driver)
        self.capture: Capture | None = None  # the graph that is being captured
        self.graph_pool = GraphPool(driver, self.pool)
        self._ahead: dict[int, tuple[np.ndarray, DeviceArray]] = {}  # uploaded early, by the id of what it came from
        self._ahead_event: Any = None
        self._ahead_stream: Any = None
        self._ahead_pool: Any = None
        self._op = "an array"  # that runs now: for errors

    # --------------------------------------------------------------------------------------------------- ops

    def _run(self, op: Op, arrays: tuple[Array, ...], params: dict[str, Any]) -> Any:
        before, self._op = self._op, op.name
        try:
            kernel = self.kernel(op)
            result = self._by_formula(op, arrays, params) if kernel is None else kernel(*arrays, **params)
        finally:
            self._op = before
        return tuple(arrays[i] for i in op.writes) if op.writes else result

    def _by_formula(self, op: Op, arrays: tuple[Array, ...], params: dict[str, Any]) -> Any:
        """On the device where nothing is computed (views); else on the host, by NumPy."""
        try:
            result = op.formula(self.xp, *arrays, **params)
        except NotOnDevice:
            if self.capture is not None:
                raise UserError(
                    f"op {op.name} has no CUDA kernel: its formula runs on the host, which a graph cannot hold; write "
                    f"a kernel, or leave --graph out"
                ) from None
            result = op.formula(numpy_module, *map(self._computable, arrays), **params)
        stored = tuple(self._stored(op, arrays, i, r) for i, r in enumerate(outputs(result)))
        result = stored if isinstance(result, tuple) else stored[0]
        for written, value in zip(op.writes, outputs(result), strict=False):
            arrays[written][...] = value
        return result

    def _computable(self, x: Array) -> np.ndarray:
        """On the host; 16 bits are for memory alone, arithmetic is in float32."""
        host = self.numpy(x)
        return host.astype(np.float32) if host.dtype.name in NARROW else host

    def _stored(self, op: Op, arrays: tuple[Array, ...], number: int, result: Any) -> DeviceArray:
        """Output `number` of a formula, on the device, in the dtype that a kernel would have given it."""
        if isinstance(result, DeviceArray):
            return result
        host = np.asarray(result)
        if not holds_floats(host) or number in op.whole_outputs:
            return self.asarray(host, dtype=op.whole_outputs.get(number))
        storage = storage_of(op, arrays) or np.dtype(np.float32)
        wide = storage.name in NARROW and number in op.wide_outputs
        return self.asarray(host, dtype=np.float32 if wide else storage)

    def launch(
        self, kernel: CudaKernel, grid: tuple[int, ...], shared: int, arguments: Sequence[bytes],
        defines: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Queue a kernel whose arguments are packed and checked."""
        self.driver.launch(kernel, defines, grid, shared, arguments, self._op)

    def gemm(
        self, a: DeviceArray, b: DeviceArray, *, bias: DeviceArray | None = None, epilogue: str | None = None,
        out: DeviceArray | None = None,
    ) -> Any:  # fmt: skip
        """a (..., m, k) @ b (..., k, n) by the library; operands that are transposed views are not copied.

        epilogue "bias" adds `bias` (n,); "gelu" also applies the tanh form and gives (out, before); "bias_gradient", of
        two matrices, gives (out, the sums of a over k).
        """
        return multiply(self, a, b, bias, epilogue, out)

    # ------------------------------------------------------------------------------------------------ arrays

    @property
    def multiprocessors(self) -> int:
        return self.driver.multiprocessors

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """An array whose elements nobody has written."""
        layout = ghost(tuple(int(n) for n in shape), np.dtype(dtype))
        block = self.pool.allocate(max(1, layout.nbytes), self._op)
        return DeviceArray(self, block, block.address, layout)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        made = self.empty(shape, dtype)
        self.driver.fill(made.address, made.nbytes, 0)
        return made

    def asarray(self, x: Any, dtype: Any = None) -> DeviceArray:
        """An array here; one that came from the host is uploaded, and if it holds integers remembered."""
        if id(x) in self._ahead and dtype is None and self.capture is None:
            self.driver.wait(self._ahead_event)
            return self._ahead.pop(id(x))[1]
        if isinstance(x, DeviceArray):
            if dtype is None or np.dtype(dtype) == x.dtype:
                return x
            return self.asarray(self.numpy(x), dtype)
        host = np.asarray(x, dtype=dtype)
        if host.dtype.kind not in "biufV":
            raise TypeError(f"a device holds numbers: expected integers, floats or booleans, got {host.dtype}")
        host = host.astype(host.dtype.newbyteorder("="), copy=False)
        made = self.empty(host.shape, host.dtype)
        size = max(1, host.nbytes)  # a graph keeps its buffers: it reads them again
        buffer = self.host_buffers.take(size) if self.capture is None else self.driver.host_buffer(size)
        if host.size:
            np.copyto(buffer[: host.nbytes].view(host.dtype).reshape(host.shape), host)
            self.driver.upload(buffer[: host.nbytes], made.address)
        if host.dtype.kind in "iub":
            made.host = host.copy()
            made.host.flags.writeable = False
        if self.capture is not None:
            self.capture.uploaded(buffer[: host.nbytes], host.dtype, x, made.host)
        else:
            self.host_buffers.give_back(buffer)
        return made

    def upload_ahead(self, arrays: Sequence[np.ndarray]) -> None:
        """Upload on a stream of its own, while kernels run on the other; `asarray` finds these very arrays."""
        if self._ahead_stream is None:
            self._ahead_stream, self._ahead_pool = self.driver.new_stream(), SharedPool(self.driver, self.pool)
        self._ahead = {}
        self._ahead_pool.mark()
        before, self.pool = self.pool, self._ahead_pool
        try:
            with self.driver.on(self._ahead_stream):
                self._ahead = {id(x): (x, self.asarray(x)) for x in arrays}
                self._ahead_event = self.driver.record()
        finally:
            self.pool = before

    def numpy(self, x: Any) -> np.ndarray:
        """A copy on the host, once all that was queued has run."""
        if not isinstance(x, DeviceArray):
            return np.asarray(x)
        x = x.contiguous()
        if not x.size:
            return np.empty(x.shape, x.dtype)
        return self.driver.download(x.address, x.nbytes).view(x.dtype).reshape(x.shape)

    def copy_into(self, target: DeviceArray, source: DeviceArray) -> None:
        """target[...] = source, which broadcasts. Raises TypeError for another dtype: nothing is converted unasked."""
        if source.dtype != target.dtype:
            raise TypeError(f"expected {target.dtype}, got {source.dtype}: convert with backend.asarray(x, dtype)")
        try:
            source = source.broadcast_to(target.shape)
        except ValueError:
            raise ValueError(f"expected values of shape {target.shape}, or such as broadcast, got {source}") from None
        if not target.size:
            return
        if any(count > 1 and stride == 0 for count, stride in zip(target.shape, target.strides, strict=True)):
            raise ValueError(f"the elements of {target} share memory (broadcast_to): they cannot be written one by one")
        same = (source.address, source.strides) == (target.address, target.strides)
        if source.block is target.block and not same and source.overlaps(target):
            source = source.copy()  # else some elements would be read after they were written
        copy_strided(source, target)

    def derived(self, compute: Callable[..., np.ndarray], *sources: Any) -> DeviceArray:
        """compute(*sources) by the host, uploaded; the sources are integers that came from the host, or numbers.

        In a captured graph it is computed anew for each replay, so its shape must follow from theirs alone.
        """
        if self.capture is not None:
            return self.capture.derived(compute, sources)
        return self.asarray(compute(*(on_host(s) if isinstance(s, DeviceArray) else s for s in sources)))

    def live_floats(self, compute: Callable[..., np.ndarray], *numbers: Any) -> tuple[np.ndarray, DeviceArray | None]:
        """compute(*numbers), float32; in a captured graph also where a kernel reads them anew at each replay."""
        return compute(*numbers), None if self.capture is None else self.capture.derived(compute, numbers)

    @contextmanager
    def capturing(self) -> Iterator[Capture]:
        """Record what is queued in the block, to be replayed; nothing of it runs yet."""
        if self.capture is not None:
            raise RuntimeError("a graph is being captured already")
        self.pool.trim()  # blocks that only lie there could not be given back while it is captured
        if not self.graph_pool.graphs:
            self.graph_pool = GraphPool(self.driver, self.pool)
        capture, outer = Capture(self, self.graph_pool), self.pool
        self.driver.begin_capture()
        self.capture, self.pool = capture, capture.pool
        try:
            yield capture
        finally:
            self.capture, self.pool = None, outer  # also where what follows fails
            capture.graph = self.driver.end_capture()

    def live_int(self, value: int) -> LiveInt:
        """A number for the graph that is being captured, to be changed (`current`) before each replay."""
        live = LiveInt(value)
        live.current = value
        assert self.capture is not None, "within `with backend.capturing():`"
        live.array = self.capture.derived(lambda n: np.array(n, np.uint32), (live,))
        return live

    # ---------------------------------------------------------------------------------------------- the rest

    def synchronize(self) -> None:
        self.driver.synchronize()

    def device_memory(self) -> int:
        return self.driver.memory()[0] + self.pool.held

    @contextmanager
    def peak_memory(self) -> Iterator[Callable[[], int]]:
        before, outer = self.pool.used, self.pool.peak
        self.pool.peak = before
        peak: int | None = None
        try:
            yield lambda: self.pool.peak - before if peak is None else peak
        finally:
            peak = self.pool.peak - before
            self.pool.peak = max(outer, self.pool.peak)

    @contextmanager
    def live_memory(self) -> Iterator[Callable[[], int]]:
        before = self.pool.used
        yield lambda: self.pool.used - before

    def orders(self) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
        """A GPU orders its blocks as it likes: once more is all that can be asked."""
        yield "one run", nullcontext()
        yield "another", nullcontext()

    def describe(self) -> str:
        return f"{self.driver.describe()}, float32 products in {self.product_mode}"
