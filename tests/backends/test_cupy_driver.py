"""The driver of a GPU, on a CuPy that works on host memory; its calls against the real CuPy's, where that is installed.

Nothing here has seen a GPU.
"""

from __future__ import annotations

import ctypes
import inspect
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.backends.base import BackendUnavailable
from minibert.backends.cuda import cublaslt, cupy_driver, nvrtc
from minibert.backends.cuda.backend import CudaBackend
from minibert.backends.cuda.cupy_driver import CupyDriver
from minibert.backends.cuda.driver import DeviceMemoryExhausted
from minibert.backends.cuda.matmul import (
    gelu_arguments,
    gelu_rows,
    matmul_any,
    matmul_arguments,
    operand_sums,
    sums_arguments,
)
from minibert.data import SHIPPED_TEXT
from minibert.errors import UserError
from minibert.kernels.gpu.launch import CudaFile
from tests.column_major import Case, ColumnMajor
from tests.imagined_cupy import Api, FakeCupy, FakeEvent, FakeStream, Runtime, RuntimeFailure
from tests.toy_tasks import command

SOURCE = """extern "C" __global__ void __launch_bounds__(128) mixed(
    const Storage* __restrict__ x, int rows, long long count, float scale, unsigned char flag, Stream stream) {}
"""
ARGUMENTS = [struct.pack("<Q", 2**40 + 512), struct.pack("<i", -7), struct.pack("<q", 2**33), struct.pack("<f", 0.5)]
ARGUMENTS += [b"\x01", bytes(range(32))]


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    """A machine with a GPU of compute capability 9.0 and all that it takes."""
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(cupy_driver, "driver_version", lambda: 12040)
    monkeypatch.setattr(
        nvrtc, "toolkit", lambda newest=None: SimpleNamespace(version=(12, 9), describe=lambda: "NVRTC")
    )
    monkeypatch.setattr(nvrtc, "check_architecture", lambda tools, arch: None)
    monkeypatch.setattr(cupy_driver.cublaslt, "load", lambda major: ColumnMajor())
    monkeypatch.setattr(cupy_driver, "check_parameters", lambda function, kernel: None)
    return fake


@pytest.fixture
def device(cupy: FakeCupy) -> CupyDriver:
    return CupyDriver()


# ----------------------------------------------------------------------------------------------- can it run here?


def refused() -> str:
    with pytest.raises(BackendUnavailable) as failure:
        cupy_driver.available()
    return str(failure.value)


def test_where_everything_is_there_it_is_available_and_says_what_it_is(cupy: FakeCupy) -> None:
    cupy_driver.available()
    assert CupyDriver().describe() == (
        "NVIDIA Imagined (compute capability 9.0), driver of CUDA 12.4, CUDA 12.9, CuPy 14.2.0, NVRTC 12.9, "
        "cuBLASLt 12.9.1"
    )


@pytest.mark.parametrize("driver, extra", [(None, "cuda12"), (12080, "cuda12"), (13000, "cuda13"), (14010, "cuda13")])
def test_without_cupy_the_extra_that_fits_the_driver_is_named(
    driver: int | None, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(cupy_driver, "driver_version", lambda: driver)
    assert re.match(rf"CuPy is not installed: pip install 'minibert-lab\[{extra}\]'", refused())


def test_a_cupy_that_does_not_load_is_told_from_one_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('=====\\n libfoo.so.1: cannot open')")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert refused().startswith("CuPy does not load (libfoo.so.1: cannot open): pip install")


def test_no_driver(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_driver, "driver_version", lambda: None)
    assert "no NVIDIA driver" in refused()


def test_a_driver_older_than_cupy_names_both_versions_and_both_ways_out(cupy: FakeCupy) -> None:
    cupy.cuda.runtime.built = 13020
    said = refused()
    assert "driver is of CUDA 12.4" in said and "built for CUDA 13.2" in said and "driver of CUDA 13.0 or newer" in said
    assert "minibert-lab[cuda12]" in said


@pytest.mark.parametrize("status, said", [(35, "too old for CUDA 12.9"), (100, "no GPU"), (999, "cudaError999")])
def test_what_the_runtime_says_of_devices(cupy: FakeCupy, status: int, said: str) -> None:
    cupy.cuda.runtime.failing["getDeviceCount"] = status
    assert said in refused()


def test_no_gpu_one_of_amd_and_one_too_old(cupy: FakeCupy) -> None:
    cupy.cuda.runtime.devices = 0
    assert "CUDA_VISIBLE_DEVICES" in refused()
    cupy.cuda.runtime.devices, cupy.cuda.runtime.capability = 1, (7, 5)
    assert "NVIDIA Imagined has compute capability 7.5" in refused()
    cupy.cuda.runtime.is_hip = True
    assert "AMD" in refused()


@pytest.mark.parametrize("module, name", [(nvrtc, "toolkit"), (cublaslt, "load")])
def test_a_missing_library_says_which(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    def missing(*arguments: Any) -> Any:
        raise BackendUnavailable(f"{name} is missing")

    monkeypatch.setattr(module, name, missing)
    assert refused() == f"{name} is missing"


def test_a_machine_without_a_driver_has_no_driver_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(cupy_driver.ctypes, "CDLL", missing)
    assert cupy_driver.driver_version() is None


def test_ptx_is_compiled_for_a_gpu_that_nvrtc_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"sm_90", "compute_90", "compute_80", "sm_80"}

    def check(tools: Any, arch: str) -> None:
        if arch not in known:
            raise UserError(arch)

    monkeypatch.setattr(nvrtc, "toolkit", lambda newest: SimpleNamespace(describe=lambda: "NVRTC 12.9"))
    monkeypatch.setattr(nvrtc, "check_architecture", check)
    assert [cupy_driver.architecture(c, 12) for c in (80, 90, 120)] == ["sm_80", "sm_90", "compute_90"]
    known.clear()
    with pytest.raises(BackendUnavailable, match=r"NVRTC 12\.9 compiles for no GPU like this one \(sm_90\)"):
        cupy_driver.architecture(90, 12)


# --------------------------------------------------------------------------------------------------------- memory


def test_bytes_go_up_and_come_down_on_the_current_stream(cupy: FakeCupy, device: CupyDriver) -> None:
    address = device.allocate(100)
    buffer = device.host_buffer(100)
    assert buffer.dtype == np.uint8 and buffer.shape == (100,) and address % 256 == 0
    buffer[...] = np.arange(100)
    stream = device.new_stream()
    with device.on(stream):
        device.upload(buffer, address)
        device.fill(address + 10, 5, 3)
        found = device.download(address, 100)
    assert found.tolist() == [*range(10), *[3] * 5, *range(15, 100)]
    kinds = [("memcpyAsync", 1, 100), ("memsetAsync", 5), ("memcpyAsync", 2, 100), ("streamSynchronize",)]
    assert cupy.cuda.runtime.log[-4:] == [(*kind, stream.ptr) for kind in kinds]
    device.release(address)
    assert address not in cupy.cuda.runtime.blocks
    assert device.host_buffer(0).shape == device.download(0, 0).shape == (0,)
    assert device.allocate(0) != 0


def test_memory_that_runs_out_is_told_from_other_failures(cupy: FakeCupy, device: CupyDriver) -> None:
    cupy.cuda.runtime.failing["malloc"] = 2
    with pytest.raises(DeviceMemoryExhausted, match="no block of 12345 bytes: 1000 of 4000 bytes"):
        device.allocate(12345)
    cupy.cuda.runtime.failing["malloc"] = 700
    with pytest.raises(RuntimeError, match="cudaError700; an earlier kernel may be the cause"):
        device.allocate(12345)


def test_a_run_too_large_for_the_gpu_is_refused_before_it_begins(
    cupy: FakeCupy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cupy.cuda.runtime, "memGetInfo", lambda: (300_000_000, 1_000_000_000))
    monkeypatch.setitem(backends._loaded, "cupy", CudaBackend(CupyDriver()))
    run = ["pretrain", SHIPPED_TEXT, "--output", tmp_path / "run", "--config", "mini", "--backend", "cupy"]
    assert command(monkeypatch, *run, "--tokens-per-batch", 65536, "--dtype", "bfloat16") == 2
    *table, said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"error: the run would take about [\d,.]+ MB of memory, and 300.0 MB are free on cupy: the same updates fit "
        r"with --tokens-per-batch \d+ --gradient-accumulation-steps \d+", said
    ), said  # fmt: skip
    assert ["free", "300.0"] in [row.split() for row in table], table
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------------- kernels


@pytest.fixture
def mixed(cupy: FakeCupy, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A kernel with a parameter of every size; compiling it gives its name and -D's."""
    (tmp_path / "gpu.cu").write_text(SOURCE)

    def compile_kernels(path: Any, defines: Any, arch: str, *, newest: int) -> Any:
        return SimpleNamespace(image=f"{path.name} {dict(defines)} {arch} {newest}".encode())

    monkeypatch.setattr(nvrtc, "compile_kernels", compile_kernels)
    cupy.cuda.driver.sizes = [len(argument) for argument in ARGUMENTS]
    return CudaFile(str(tmp_path / "gpu.py")).kernel("mixed", block=96)


def test_a_launch_passes_every_value_and_loads_its_code_once(cupy: FakeCupy, device: CupyDriver, mixed: Any) -> None:
    for _ in range(2):
        device.launch(mixed, {"STORAGE": "float"}, (3, 2, 1), 1024, ARGUMENTS, "softmax")
    device.launch(mixed, {"STORAGE": "__half"}, (1, 1, 1), 0, ARGUMENTS, "softmax")
    api = cupy.cuda.driver
    assert api.loaded == [f"gpu.cu {{'STORAGE': '{x}'}} sm_90 12".encode() for x in ("float", "__half")]
    function, grid, block, shared, stream, values, extra = api.launched[0]
    assert (grid, block, shared, extra) == ((3, 2, 1), (96, 1, 1), 1024, 0)
    assert stream == device._stream.ptr and values == ARGUMENTS
    assert api.launched[1][0] == function != api.launched[2][0]
    assert api.allowed == []


def test_more_than_48_kib_of_shared_memory_is_asked_for_once(cupy: FakeCupy, device: CupyDriver, mixed: Any) -> None:
    for shared in (60000, 60000, 50000, 70000):
        device.launch(mixed, {}, (1, 1, 1), shared, ARGUMENTS, "attention")
    assert [(attribute, value) for _, attribute, value in cupy.cuda.driver.allowed] == [(8, 60000), (8, 70000)]
    with pytest.raises(RuntimeError, match=r"op attention: kernel mixed asks for 300000 bytes .* has 232448 in all"):
        device.launch(mixed, {}, (1, 1, 1), 300000, ARGUMENTS, "attention")


def test_a_launch_that_fails_names_op_and_kernel(cupy: FakeCupy, device: CupyDriver, mixed: Any) -> None:
    cupy.cuda.driver.fails = True
    with pytest.raises(
        RuntimeError, match=r"op gelu: kernel mixed, grid \(9, 1, 1\), block 96.*CUDA_ERROR_INVALID_VALUE"
    ):
        device.launch(mixed, {}, (9, 1, 1), 0, ARGUMENTS, "gelu")


@pytest.mark.parametrize(
    "sizes, message",
    [([8, 4, 8, 4, 1, 32], ""), ([8, 4, 8, 4, 1, 16], "16"), ([8, 4], "8, 4"), ([8, 4, 8, 4, 1, 32, 4], "4")],
)
def test_compiled_parameters_are_held_against_the_launchs(
    mixed: Any, sizes: list[int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def query(function: int, index: int, offset: Any, size: Any) -> int:
        if index >= len(sizes):
            return 1
        size[0] = sizes[index]
        return 0

    pointer = ctypes.POINTER(ctypes.c_size_t)
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, pointer, pointer)
    library = SimpleNamespace(cuFuncGetParamInfo=prototype(query))
    monkeypatch.undo()  # the fixture leaves the check out
    monkeypatch.setattr(cupy_driver.ctypes, "CDLL", lambda name: library)
    if not message:
        cupy_driver.check_parameters(7, mixed)
        monkeypatch.setattr(cupy_driver.ctypes, "CDLL", lambda name: SimpleNamespace())  # a driver before 12.4
        cupy_driver.check_parameters(7, mixed)
        return
    with pytest.raises(
        TypeError, match=rf"mixed .*take \[.*{message}\] bytes, and a launch passes \[8, 4, 8, 4, 1, 32\]"
    ):
        cupy_driver.check_parameters(7, mixed)


def test_products_go_to_the_library_and_what_it_refuses_to_a_kernel(
    cupy: FakeCupy, device: CupyDriver, mixed: Any
) -> None:
    case = Case(epilogue="bias", bias_offset=4)
    device.multiply(case.product)
    case.compare()
    assert cupy.cuda.driver.launched == []
    assert not device.refusals

    def launched(refused: Case, kernel: Any) -> tuple[Any, ...]:
        cupy.cuda.driver.sizes = [parameter.nbytes for parameter in kernel.signature.parameters]
        device.multiply(refused.product)
        return cupy.cuda.driver.launched[-1][1:]

    stream = device._stream.ptr
    whole = Case(m=300, n=7, k=3, batch=2, epilogue="gelu")  # 4200 elements in rows of 7, which AUX cannot take
    assert launched(whole, gelu_rows) == (
        (17, 1, 1), (256, 1, 1), 0, stream, gelu_arguments(whole.product), 0,
    )  # fmt: skip
    np.testing.assert_allclose(whole.before, whole.expected_before, atol=1e-5)  # by the library
    rounded = Case(m=300, n=7, k=3, batch=2, epilogue="gelu", dtype=np.float16)
    assert launched(rounded, matmul_any)[4] == matmul_arguments(rounded.product)
    assert [image.split(b" sm")[0] for image in cupy.cuda.driver.loaded] == [
        f"matmul.cu {{'STORAGE': '{storage}'}}".encode() for storage in ("float", "__half")
    ]
    assert len(device.refusals) == 2 and device.describe().endswith("which refused 2 kinds of product")
    summed = Case(m=300, n=7, k=3, epilogue="bias_gradient", bias_offset=4)  # where vector stores could not go
    assert launched(summed, operand_sums) == (
        (10, 1, 1), (256, 1, 1), 0, stream, sums_arguments(summed.product), 0,
    )  # fmt: skip
    np.testing.assert_allclose(summed.out, summed.expected, atol=1e-5)  # by the library
    assert np.isnan(summed.bias).all() and len(device.refusals) == 3
    launched(Case(m=300, n=7, k=3, epilogue="bias_gradient", bias_offset=4), operand_sums)
    assert len(device.refusals) == 3  # of the same kind, elsewhere in memory


# --------------------------------------------------------------------------------------------- streams and graphs


def test_streams_wait_for_each_other_and_the_host_for_all(cupy: FakeCupy, device: CupyDriver) -> None:
    first, second = device._stream, device.new_stream()
    event = device.record()
    assert event.stream is first
    with device.on(second):
        device.wait(event)
    assert second.log == [("wait", event)] and device._stream is first
    runtime = cupy.cuda.runtime
    for runtime.event_status, expected in ((0, True), (600, False)):
        assert device.finished(event) is expected
    runtime.event_status = 700
    with pytest.raises(RuntimeError, match="cudaError700; an earlier kernel"):
        device.finished(event)
    device.synchronize()
    runtime.failing["deviceSynchronize"] = 700
    with pytest.raises(RuntimeError, match="waiting for the device: cudaError700"):
        device.synchronize()


def test_a_step_is_captured_relaxed_sent_ahead_and_replayed(cupy: FakeCupy, device: CupyDriver) -> None:
    device.begin_capture()
    assert device._stream.log == [("begin", 2)]
    for wait in (device.synchronize, lambda: device.download(0, 4)):
        with pytest.raises(RuntimeError, match="while a graph is captured"):
            wait()
    graph = device.end_capture()
    device.replay(graph)
    assert graph.log == [("upload", device._stream), ("launch", device._stream)]
    device.synchronize()


def test_a_capture_that_breaks_off_says_so_and_ends(cupy: FakeCupy, device: CupyDriver) -> None:
    device.begin_capture()
    device._stream.captures = RuntimeFailure(901)
    with pytest.raises(RuntimeError, match="not captured as a graph: cudaError901"):
        device.end_capture()
    device.synchronize()


# ------------------------------------------------------------------------------------------------- the real CuPy


@pytest.fixture
def real() -> Iterator[Any]:
    yield pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)


def parameters(function: Any) -> list[str]:
    """Names of what a compiled function of CuPy takes, from the signature at the head of its docstring."""
    found = re.match(r"\w+(?:\.\w+)?\(([^)]*)\)", function.__doc__ or "")
    assert found is not None, f"{function} shows no signature"
    names = [part.split("=")[0].split()[-1] for part in found[1].split(",") if part.strip()]
    return names[1:] if names[:1] == ["self"] else names


@pytest.mark.parametrize("module, fake", [("runtime", Runtime), ("driver", Api)])
def test_the_real_cupy_has_these_functions_constants_and_errors(real: Any, module: str, fake: Any) -> None:
    there = getattr(real.cuda, module)
    for name, ours in vars(fake).items():
        if name.startswith("_"):
            continue
        theirs = getattr(there, name)
        if inspect.isfunction(ours):
            assert parameters(theirs) == list(inspect.signature(ours).parameters)[1:], name
        elif inspect.isclass(ours):
            assert issubclass(theirs, RuntimeError), name
        else:
            assert theirs == ours, name


def test_the_real_streams_events_and_graphs_have_these_methods(real: Any) -> None:
    for name, fake in (("Stream", FakeStream), ("Event", FakeEvent)):
        for method, ours in vars(fake).items():
            if inspect.isfunction(ours):
                theirs = inspect.signature(getattr(getattr(real.cuda, name), method))
                assert list(theirs.parameters) == list(inspect.signature(ours).parameters), (name, method)
    for method in ("launch", "upload"):
        assert parameters(getattr(real.cuda.Graph, method)) == ["stream"]
    assert parameters(real.cuda.alloc_pinned_memory) == ["size"]


def test_the_real_page_locked_memory_is_written_through_numpy(real: Any) -> None:
    memory = np.zeros(512, np.uint8)
    held = real.cuda.PinnedMemoryPointer(SimpleNamespace(ptr=memory.ctypes.data, size=memory.nbytes), 0)
    np.frombuffer(held, np.uint8, 100)[7:9] = 5
    assert memory.nonzero()[0].tolist() == [7, 8]


def test_the_real_errors_bear_their_status(real: Any) -> None:
    error = real.cuda.runtime.CUDARuntimeError(cupy_driver.MEMORY_ALLOCATION)
    assert error.status == 2 and "cudaErrorMemoryAllocation" in str(error)
    numbers = {"InsufficientDriver": 35, "NoDevice": 100, "NotReady": 600}
    for name, status in numbers.items():
        assert f"cudaError{name}" in str(real.cuda.runtime.CUDARuntimeError(status))
    ours = (cupy_driver.INSUFFICIENT_DRIVER, cupy_driver.NO_DEVICE, cupy_driver.NOT_READY)
    assert tuple(numbers.values()) == ours
    assert real.cuda.runtime.runtimeGetVersion() // 1000 in (12, 13)
