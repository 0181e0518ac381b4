"""A stand-in for CuPy that works on host memory: the calls that `CupyDriver` makes, and nothing else.

Every function has the name and the parameters of CuPy's own; tests/backends/test_cupy_driver.py holds them to it.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np


class RuntimeFailure(RuntimeError):
    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"cudaError{status}")


class ApiFailure(RuntimeError):
    pass


class Runtime:
    """cupy.cuda.runtime, on host memory; what is queued runs at once."""

    CUDARuntimeError = RuntimeFailure
    memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = 1, 2, 3
    streamCaptureModeRelaxed, cudaDevAttrMaxSharedMemoryPerBlockOptin = 2, 97
    is_hip = False

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.blocks: dict[int, np.ndarray] = {}
        self.event_status, self.devices, self.capability, self.built = 0, 1, (9, 0), 12090
        self.failing: dict[str, int] = {}  # function -> status

    def _may_fail(self, name: str) -> None:
        if name in self.failing:
            raise RuntimeFailure(self.failing[name])

    def check_status(self, status: int) -> None:
        if status:
            raise RuntimeFailure(status)

    def driverGetVersion(self) -> int:
        return 12040

    def runtimeGetVersion(self) -> int:
        return self.built

    def getDeviceCount(self) -> int:
        self._may_fail("getDeviceCount")
        return self.devices

    def getDevice(self) -> int:
        return 0

    def setDevice(self, device: int) -> None:
        self.log.append(("setDevice", device))

    def getDeviceProperties(self, device: int) -> dict[str, Any]:
        major, minor = self.capability
        return {"name": b"NVIDIA Imagined", "major": major, "minor": minor, "multiProcessorCount": 132}

    def deviceGetAttribute(self, attrib: int, device: int) -> int:
        return {97: 232448}[attrib]

    def deviceSynchronize(self) -> None:
        self._may_fail("deviceSynchronize")
        self.log.append(("deviceSynchronize",))

    def malloc(self, size: int) -> int:
        self._may_fail("malloc")
        assert size > 0
        block = np.full(size + 256, 0xFF, np.uint8)
        address = block.ctypes.data + -block.ctypes.data % 256
        self.blocks[address] = block
        return address

    def free(self, ptr: int) -> None:
        if ptr:
            del self.blocks[ptr]

    def memGetInfo(self) -> tuple[int, int]:
        return 1000, 4000

    def memcpyAsync(self, dst: int, src: int, size: int, kind: int, stream: int) -> None:
        self._may_fail("memcpyAsync")
        self.log.append(("memcpyAsync", kind, size, stream))
        ctypes.memmove(dst, src, size)

    def memsetAsync(self, ptr: int, value: int, size: int, stream: int) -> None:
        self.log.append(("memsetAsync", size, stream))
        ctypes.memset(ptr, value, size)

    def streamSynchronize(self, stream: int) -> None:
        self.log.append(("streamSynchronize", stream))

    def eventQuery(self, event: int) -> int:
        return self.event_status


class Api:
    """cupy.cuda.driver: what would be launched is written down."""

    CUDADriverError = ApiFailure
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.loaded: list[bytes] = []
        self.allowed: list[tuple[int, int, int]] = []
        self.sizes: list[int] = []
        self.fails = False

    def moduleLoadData(self, image: bytes) -> int:
        self.loaded.append(image)
        return 100 + len(self.loaded)

    def moduleGetFunction(self, module: int, funcname: str) -> int:
        return module * 1000 + len(funcname)

    def funcSetAttribute(self, f: int, attribute: int, value: int) -> None:
        if value > 232448:
            raise ApiFailure("CUDA_ERROR_INVALID_VALUE: invalid argument")
        self.allowed.append((f, attribute, value))

    def launchKernel(
        self, f: int, grid_dim_x: int, grid_dim_y: int, grid_dim_z: int, block_dim_x: int, block_dim_y: int,
        block_dim_z: int, shared_mem_bytes: int, stream: int, kernel_params: int, extra: int,
    ) -> None:  # fmt: skip
        if self.fails:
            raise ApiFailure("CUDA_ERROR_INVALID_VALUE: invalid argument")
        pointers = (ctypes.c_void_p * len(self.sizes)).from_address(kernel_params)
        values = [ctypes.string_at(p, size) for p, size in zip(pointers, self.sizes, strict=True)]
        grid, block = (grid_dim_x, grid_dim_y, grid_dim_z), (block_dim_x, block_dim_y, block_dim_z)
        self.launched.append((f, grid, block, shared_mem_bytes, stream, values, extra))


class FakeStream:
    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: Any = None
    ) -> None:
        assert non_blocking
        self.ptr, self.log = id(self), []
        self.captures: Any = FakeGraph()

    def wait_event(self, event: Any) -> None:
        self.log.append(("wait", event))

    def begin_capture(self, mode: Any = None) -> None:
        self.log.append(("begin", mode))

    def end_capture(self) -> Any:
        if isinstance(self.captures, Exception):
            raise self.captures
        return self.captures


class FakeEvent:
    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        assert disable_timing
        self.ptr, self.stream = 5, None

    def record(self, stream: Any = None) -> None:
        self.stream = stream


class FakeGraph:
    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []

    def upload(self, stream: Any = None) -> None:
        self.log.append(("upload", stream))

    def launch(self, stream: Any = None) -> None:
        self.log.append(("launch", stream))


class FakeCupy:
    __version__ = "14.2.0"

    def __init__(self) -> None:
        self.cuda = SimpleNamespace(
            runtime=Runtime(), driver=Api(), Stream=FakeStream, Event=FakeEvent,
            alloc_pinned_memory=lambda size: bytearray(-(-size // 512) * 512),
        )  # fmt: skip
