"""An NVIDIA GPU through CuPy 14: memory, streams, events and graphs by the CUDA runtime, kernels by the driver API.

Kernels are compiled by NVRTC (see nvrtc.py) and products done by cuBLASLt (see cublaslt.py). One GPU: the first that
CUDA_VISIBLE_DEVICES shows. All calls come from one thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from minibert.backends.base import BackendUnavailable
from minibert.backends.cuda import cublaslt, matmul, nvrtc
from minibert.backends.cuda.driver import DeviceMemoryExhausted, Event, Graph, Product, Stream
from minibert.errors import UserError, pip_install
from minibert.kernels.gpu.launch import STORAGE, WAVES, CudaKernel

OLDEST = 80  # compute capability: the kernels copy asynchronously and multiply bfloat16 on tensor cores
SHARED_UNASKED = 48 * 1024  # bytes of dynamic shared memory that every kernel may have

# cudaError_t and CUresult, where CuPy gives them no name
MEMORY_ALLOCATION, INSUFFICIENT_DRIVER, NO_DEVICE, NOT_READY = 2, 35, 100, 600
INVALID_VALUE = 1

LATER = "an earlier kernel may be the cause: CUDA_LAUNCH_BLOCKING=1 stops at the one that fails"


# ------------------------------------------------------------------------------------------------- can it run here?


def available() -> None:
    """Raise BackendUnavailable, with what is missing and what would mend it, unless a GPU can be used here."""
    driver = driver_version()
    try:
        import cupy
    except ImportError as error:
        said = " ".join(str(error).replace("=", "").split())  # CuPy frames pages of advice
        reason = "CuPy is not installed" if error.name == "cupy" else f"CuPy does not load ({said:.300})"
        raise BackendUnavailable(f"{reason}: {_extra(driver)}") from error
    runtime = cupy.cuda.runtime
    if runtime.is_hip:
        raise BackendUnavailable(f"this CuPy was built for AMD GPUs: {_extra(driver)}")
    if driver is None:
        raise BackendUnavailable(
            "no NVIDIA driver (libcuda.so.1) on this machine: it takes an NVIDIA GPU and its driver"
        )
    built = runtime.runtimeGetVersion()
    if driver // 1000 < built // 1000:
        remedy = f"update the driver, or {_extra(driver)} in place of this CuPy" if driver >= 12000 else "update it"
        raise BackendUnavailable(
            f"the NVIDIA driver is of CUDA {_dotted(driver)}, and CuPy {cupy.__version__} was built for CUDA "
            f"{_dotted(built)}, which needs a driver of CUDA {built // 1000}.0 or newer: {remedy}"
        )
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if error.status == INSUFFICIENT_DRIVER:
            raise BackendUnavailable(
                f"the NVIDIA driver, of CUDA {_dotted(driver)}, is too old for CUDA {_dotted(built)} of CuPy "
                f"{cupy.__version__}: update the driver"
            ) from error
        if error.status != NO_DEVICE:
            raise BackendUnavailable(f"the GPU cannot be reached: {error}") from error
        count = 0
    if count == 0:
        raise BackendUnavailable(
            "an NVIDIA driver but no GPU: none is fitted, or CUDA_VISIBLE_DEVICES (or the container) hides it"
        )
    properties = runtime.getDeviceProperties(runtime.getDevice())
    capability = 10 * properties["major"] + properties["minor"]
    if capability < OLDEST:
        raise BackendUnavailable(
            f"{properties['name'].decode()} has compute capability {properties['major']}.{properties['minor']}; the "
            f"kernels need 8.0 (Ampere) or newer"
        )
    nvrtc.toolkit(driver // 1000)
    cublaslt.load(built // 1000)


def driver_version() -> int | None:
    """The newest CUDA that the NVIDIA driver here runs, such as 12040; None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if library.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _extra(driver: int | None) -> str:
    if driver is None or driver < 12000:
        return f"{pip_install('[cuda12]')} or, with a driver of CUDA 13, {pip_install('[cuda13]')}"
    return pip_install(f"[cuda{min(driver // 1000, 13)}]")


# -------------------------------------------------------------------------------------------------------- the driver


class CupyDriver:
    """The current GPU. Raises BackendUnavailable, as `available` does, where there is none to use."""

    name = "cupy"

    def __init__(self) -> None:
        available()
        import cupy

        self._cupy, self._runtime, self._api = cupy, cupy.cuda.runtime, cupy.cuda.driver
        self._failures = (self._runtime.CUDARuntimeError, self._api.CUDADriverError)
        self._device = self._runtime.getDevice()
        self._runtime.setDevice(self._device)
        self._runtime.free(0)  # makes the context that calls of the driver API need
        self._properties = self._runtime.getDeviceProperties(self._device)
        self.multiprocessors = int(self._properties["multiProcessorCount"])
        self.most_shared = int(
            self._runtime.deviceGetAttribute(self._runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, self._device)
        )
        self._driver_version, self._runtime_version = (
            self._runtime.driverGetVersion(),
            self._runtime.runtimeGetVersion(),
        )
        self._newest = self._driver_version // 1000
        self._arch = architecture(10 * self._properties["major"] + self._properties["minor"], self._newest)
        self._streams: list[Any] = []  # all of them, for good: cuBLASLt's workspaces are known by their handles
        self._stream = self.new_stream()  # not the default stream, which cannot be captured
        self._captured: Any = None  # the stream that is being captured
        self._modules: dict[tuple[Any, ...], int] = {}
        self._functions: dict[tuple[Any, ...], int] = {}
        self._shared: dict[int, int] = {}  # function -> dynamic shared memory that it was allowed
        self.refusals: set[str] = set()  # by cuBLASLt: these products are slow
        self._products = cublaslt.CublasLt(
            cublaslt.load(self._runtime_version // 1000), self.allocate, self._copy_on_device
        )

    def describe(self) -> str:
        p = self._properties
        slow = f", which refused {len(self.refusals)} kinds of product" if self.refusals else ""
        return (
            f"{p['name'].decode()} (compute capability {p['major']}.{p['minor']}), driver of CUDA "
            f"{_dotted(self._driver_version)}, CUDA {_dotted(self._runtime_version)}, CuPy {self._cupy.__version__}, "
            f"NVRTC {'.'.join(map(str, nvrtc.toolkit(self._newest).version))}, cuBLASLt "
            f"{self._products.version()}{slow}"
        )

    # ------------------------------------------------------------------------------------------------- memory

    def allocate(self, nbytes: int) -> int:
        try:
            return int(self._runtime.malloc(max(1, nbytes)))  # of 0 bytes it would be null
        except self._runtime.CUDARuntimeError as error:
            if error.status != MEMORY_ALLOCATION:
                raise RuntimeError(f"{nbytes} bytes of device memory: {error}; {LATER}") from error
            free, total = self.memory()
            raise DeviceMemoryExhausted(
                f"no block of {nbytes} bytes: {free} of {total} bytes of the GPU's memory are free"
            ) from error

    def release(self, address: int) -> None:
        self._runtime.free(address)

    def recycle(self, address: int, nbytes: int) -> None:
        """Nothing to do: the emulator poisons the block here."""

    def memory(self) -> tuple[int, int]:
        free, total = self._runtime.memGetInfo()
        return int(free), int(total)

    def host_buffer(self, nbytes: int) -> np.ndarray:
        held = self._cupy.cuda.alloc_pinned_memory(max(1, nbytes))
        return np.frombuffer(held, np.uint8, max(1, nbytes))[:nbytes]

    def upload(self, buffer: np.ndarray, address: int) -> None:
        if not buffer.flags.c_contiguous:
            raise ValueError("a host buffer must be contiguous")
        self._runtime.memcpyAsync(
            address, buffer.ctypes.data, buffer.nbytes, self._runtime.memcpyHostToDevice, self._stream.ptr
        )

    def download(self, address: int, nbytes: int) -> np.ndarray:
        if self._captured is not None:
            raise RuntimeError("the host cannot read from the device while a graph is captured: nothing runs yet")
        host = np.empty(nbytes, np.uint8)
        if nbytes:
            with self._failing_late("reading from the device"):
                self._runtime.memcpyAsync(
                    host.ctypes.data, address, nbytes, self._runtime.memcpyDeviceToHost, self._stream.ptr
                )
                self._runtime.streamSynchronize(self._stream.ptr)
        return host

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        self._runtime.memsetAsync(address, byte, nbytes, self._stream.ptr)

    def _copy_on_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._runtime.memcpyAsync(target, source, nbytes, self._runtime.memcpyDeviceToDevice, stream)

    # ------------------------------------------------------------------------------------------------- kernels

    def launch(
        self, kernel: CudaKernel, defines: Mapping[str, Any], grid: tuple[int, ...], shared: int,
        arguments: Sequence[bytes], op: str,
    ) -> None:  # fmt: skip
        key = (kernel, *defines.items())
        function = self._functions.get(key)
        if function is None:
            function = self._functions[key] = self._load(kernel, defines, op)
        if shared > self._shared[function]:
            self._allow(function, shared, kernel, op)
        values = (ctypes.c_char_p * len(arguments))(*arguments)  # cuLaunchKernel's void**: where each value lies
        try:
            self._api.launchKernel(
                function, *grid, kernel.block, 1, 1, shared, self._stream.ptr, ctypes.addressof(values), 0
            )
        except self._failures as error:
            raise RuntimeError(
                f"op {op}: kernel {kernel.signature.name}, grid {grid}, block {kernel.block}, {shared} bytes of shared "
                f"memory: {error}; {LATER}"
            ) from error

    def multiply(self, product: Product) -> None:
        try:
            self._products.matmul(self._stream.ptr, product)
        except cublaslt.NoAlgorithm as refusal:
            self.refusals.add(str(refusal))
            self._multiply_otherwise(product)

    def _multiply_otherwise(self, product: Product) -> None:
        """What the library refuses: it may still do the product alone, where no rounding comes in between."""
        blocks = -(-product.batch * product.m * product.n // matmul.THREADS)
        if product.epilogue == "bias_gradient":
            self.multiply(product._replace(epilogue=None, bias=0))
            kernel, arguments = matmul.operand_sums, matmul.sums_arguments(product)
            blocks = -(-product.m // matmul.ROWS)
        elif product.epilogue == "gelu" and product.dtype == np.float32:
            before = product.out._replace(address=product.before)
            self.multiply(product._replace(epilogue="bias", out=before, before=0))
            kernel, arguments = matmul.gelu_rows, matmul.gelu_arguments(product)
        else:
            kernel, arguments = matmul.matmul_any, matmul.matmul_arguments(product)
        grid = (min(blocks, WAVES * self.multiprocessors), 1, 1)
        self.launch(kernel, {"STORAGE": STORAGE[product.dtype.name]}, grid, 0, arguments, "product")

    def _load(self, kernel: CudaKernel, defines: Mapping[str, Any], op: str) -> int:
        """The kernel's function; its file is compiled and loaded on first use."""
        name, path = kernel.signature.name, kernel.file.path
        key = (path, *sorted(defines.items()))
        try:
            if key not in self._modules:
                compiled = nvrtc.compile_kernels(path, defines, self._arch, newest=self._newest)
                self._modules[key] = self._api.moduleLoadData(compiled.image)
            function = int(self._api.moduleGetFunction(self._modules[key], name))
        except self._failures as error:
            raise RuntimeError(f"op {op}: kernel {name} of {path} for {self._arch} does not load: {error}") from error
        check_parameters(function, kernel)
        self._shared[function] = SHARED_UNASKED
        return function

    def _allow(self, function: int, shared: int, kernel: CudaKernel, op: str) -> None:
        attribute = self._api.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        try:
            self._api.funcSetAttribute(function, attribute, shared)
        except self._failures as error:
            raise RuntimeError(
                f"op {op}: kernel {kernel.signature.name} asks for {shared} bytes of dynamic shared memory; a block of "
                f"this GPU has {self.most_shared} in all: {error}"
            ) from error
        self._shared[function] = shared

    # ------------------------------------------------------------------------------------------ streams and graphs

    def synchronize(self) -> None:
        if self._captured is not None:
            raise RuntimeError("the host cannot wait for the device while a graph is captured: nothing runs yet")
        with self._failing_late("waiting for the device"):
            self._runtime.deviceSynchronize()

    def new_stream(self) -> Stream:
        stream = self._cupy.cuda.Stream(non_blocking=True)
        self._streams.append(stream)
        return stream

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self._stream = self._stream, stream
        try:
            yield
        finally:
            self._stream = before

    def record(self) -> Event:
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(self._stream)
        return event

    def wait(self, event: Event) -> None:
        self._stream.wait_event(event)

    def finished(self, event: Event) -> bool:
        status = self._runtime.eventQuery(event.ptr)  # CuPy's `done` would take a failure for "not yet", for ever
        if status != NOT_READY:
            with self._failing_late("an event"):
                self._runtime.check_status(status)
        return bool(status == 0)

    def begin_capture(self) -> None:
        # relaxed: while it captures, the pool may ask for memory and the host look at events of earlier uploads
        self._stream.begin_capture(self._runtime.streamCaptureModeRelaxed)
        self._captured = self._stream

    def end_capture(self) -> Graph:
        stream, self._captured = self._captured, None
        try:
            graph = stream.end_capture()
            graph.upload(stream)
        except self._failures as error:
            raise RuntimeError(f"the step was not captured as a graph: {error}") from error
        return graph

    def replay(self, graph: Graph) -> None:
        graph.launch(self._stream)

    @contextmanager
    def _failing_late(self, doing: str) -> Iterator[None]:
        try:
            yield
        except self._failures as error:
            raise RuntimeError(f"{doing}: {error}; {LATER}") from error


# ------------------------------------------------------------------------------------------------------------ parts


def architecture(capability: int, newest: int) -> str:
    """What to compile for: "sm_90" for 90; PTX of the newest that NVRTC knows, where the GPU is newer than it."""
    tools = nvrtc.toolkit(newest)
    for arch in (f"sm_{capability}", *(f"compute_{older}" for older in range(capability - 1, OLDEST - 1, -1))):
        try:
            nvrtc.check_architecture(tools, arch)
        except UserError:
            continue
        return arch
    raise BackendUnavailable(f"{tools.describe()} compiles for no GPU like this one (sm_{capability}): update it")


def check_parameters(function: int, kernel: CudaKernel) -> None:
    """Hold the compiled kernel's parameters against what launches pass, where the driver can tell (CUDA 12.4).

    Raises TypeError where they differ.
    """
    query = getattr(ctypes.CDLL("libcuda.so.1"), "cuFuncGetParamInfo", None)
    if query is None:
        return
    query.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.POINTER(ctypes.c_size_t),) * 2)
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    expected = [parameter.nbytes for parameter in kernel.signature.parameters]
    found = []
    for index in range(len(expected) + 1):
        status = query(function, index, ctypes.byref(offset), ctypes.byref(size))
        if status == INVALID_VALUE:  # there is no such parameter
            break
        if status != 0:
            return  # the driver will not tell
        found.append(size.value)
    if found != expected:
        raise TypeError(
            f"kernel {kernel.signature.name} of {kernel.file.path}: compiled, its parameters take {found} bytes, and a "
            f"launch passes {expected}"
        )
