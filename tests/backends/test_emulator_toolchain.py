"""What the emulator refuses, its compiler and its cache, and gdb."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.backends.base import BackendUnavailable
from minibert.backends.emulator import toolchain
from minibert.backends.emulator.process import EmulatorCrash
from minibert.errors import UserError
from tests.emulator_device import KERNELS, Device, marked, needs_compiler

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    made = Device()
    yield made
    made.process.close()


# Refusals


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('extern "C" __global__ void k(int* y) { asm volatile("bar.sync 0;"); }', r"k\.cu:2: inline PTX .*a twin"),
        ('extern "C" __global__ void k(int* y) { j<<<1, 2>>>(y); }', r"k\.cu:2: a launch from the device"),
        ("template <class T> __global__ void k(T* y) {}", r"k\.cu:2: kernel k is a template"),
        ("__global__ void k() { extern __shared__ float t[4]; }", r"k\.cu:2: expected extern __shared__ TYPE name\[\]"),
        ("__global__ void k(cudaTextureObject_t t) {}", r"k\.cu:2: textures"),
        ("__cluster_dims__(2) __global__ void k() {}", r"k\.cu:2: thread block clusters"),
        ("__managed__ int x;", r"k\.cu:2: managed"),
        ("__device__ void f() { wgmma_fence(); }", r"k\.cu:2: wgmma"),
        ("__device__ void f() { cooperative_groups::this_grid().sync(); }", r"k\.cu:2: blocks run one after another"),
        ("__device__ void f() { cooperative_groups::coalesced_threads(); }", "only the block and tiles of fixed size"),
        ("__global__ void k(int* y) { *y = int(__activemask()); }", "no __activemask"),
        ("__global__ void k(int* y) { *y = undeclared; }", r"k\.cu:2:\d+: error: .undeclared. was not declared"),
        ('__global__ void k(int* y) { double d[9]; __shfl_sync(~0u, *(float4*)d, 0); }', "at most 8 bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_emulated_is_refused(tmp_path: Path, line: str, message: str) -> None:
    source = tmp_path / "k.cu"
    source.write_text(f"// asm, <<< and wgmma in a comment are nothing\n{line}\n")
    with pytest.raises(UserError, match=message):
        toolchain.compile_kernels(source, {}, [], sanitize=True)


def test_launches_that_a_gpu_would_refuse(device: Device) -> None:
    y = device.empty(256)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"block": 1025}, "expected 1 to 1024"),
        ({"block": 0}, "expected 1 to 1024"),
        ({"grid": 0}, "expected 1 to 2147483647"),
        ({"shared": 227 * 1024 + 1}, "a block has at most 232448"),
        ({"arguments": (y,)}, "ones takes 2 arguments, got 1"),
        ({"arguments": (y, 3)}, "argument 1 of ones has 4 bytes, got 8"),
        ({"kernel": "twos"}, "has no kernel twos: it has .*ones"),
        ({"schedule": "sideways"}, "expected forward, reverse or random"),
    ]
    for changes, message in bad:
        call: dict[str, Any] = {"kernel": "ones", "grid": 1, "block": 64, "arguments": (y, np.int32(0)), **changes}
        head = (call.pop("kernel"), call.pop("grid"), call.pop("block"), *call.pop("arguments"))
        with pytest.raises(UserError, match=message):
            device.run("crashes.cu", *head, **call)
    assert not device.run("crashes.cu", "ones", 1, 64, y, np.int32(0), shared=100 * 1024).findings


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BackendUnavailable, match=r"g\+\+ is not found: apt install g\+\+"):
        toolchain.compiler()


# The cache


def test_an_edited_header_compiles_anew(tmp_path: Path) -> None:
    (tmp_path / "k.cu").write_text('#include "size.cuh"\nextern "C" __global__ void k(float* y) { *y = SIZE; }\n')
    built = []
    for size in (1, 2, 1):
        (tmp_path / "size.cuh").write_text(f"#define SIZE {size}\n")
        built.append(toolchain.compile_kernels(tmp_path / "k.cu", {}, [], sanitize=False))
    assert built[0] == built[2] != built[1]
    assert toolchain.compile_kernels(tmp_path / "k.cu", {"A": "1"}, [], sanitize=False) not in built
    assert toolchain.compile_kernels(tmp_path / "k.cu", {}, [], sanitize=True) not in built


def test_what_is_damaged_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIBERT_CACHE_DIR", str(tmp_path / "cache"))

    def build() -> Path:
        return toolchain.compile_kernels(KERNELS / "crashes.cu", {}, [], sanitize=False)

    whole = build().read_bytes()
    assert build().parent.stat().st_mode & 0o077 == 0
    build().write_bytes(whole[:-1000])
    with pytest.warns(UserWarning, match=r"\.so is damaged, or another user's: it is compiled anew"):
        again = build()
    assert len(again.read_bytes()) == len(whole)


def test_builders_at_once_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIBERT_CACHE_DIR", str(tmp_path / "cache"))
    built: list[Path] = []

    def build() -> None:
        built.append(toolchain.compile_kernels(KERNELS / "crashes.cu", {}, [], sanitize=False))

    builders = [threading.Thread(target=build) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(600)
    assert len(built) == 3 and len(set(built)) == 1
    assert [p.name for p in (tmp_path / "cache" / "emulator").iterdir()] == [built[0].name]  # nothing is left lying


@pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb: apt install gdb")
def test_gdb_stops_in_a_kernel(tmp_path: Path) -> None:
    line = marked("crashes.cu", "stop ones")
    script = f"""
import numpy as np
from tests.emulator_device import Device
device = Device(gdb="crashes.cu:{line}")
y = device.empty(256)
print("findings", device.run("crashes.cu", "ones", 1, 64, y, np.int32(0)).findings)
print("first", device.read(y, (64,), "f4")[0])
device.process.close()
"""
    commands = "info breakpoints\nbacktrace 2\ndelete\ncontinue\n"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], input=commands, cwd=root, capture_output=True, text=True, timeout=600
    )
    if "ptrace: Operation not permitted" in done.stdout + done.stderr:
        pytest.skip("gdb may not trace processes here")
    assert f"crashes.cu:{line}" in done.stdout, done.stdout + done.stderr
    assert "findings []" in done.stdout and "first 1.0" in done.stdout, done.stdout + done.stderr


def test_an_edited_header_in_a_folder_within_is_compiled_again(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "inner.cuh").write_text("constexpr int ANSWER = 1;\n")
    (tmp_path / "parts" / "outer.cuh").write_text('#include "inner.cuh"\n')
    source = tmp_path / "answer.cu"
    source.write_text('#include "parts/outer.cuh"\nextern "C" __global__ void answer(int* out) { out[0] = ANSWER; }\n')
    first = toolchain.compile_kernels(source, {}, [], sanitize=False)
    assert toolchain.compile_kernels(source, {}, [], sanitize=False) == first
    (tmp_path / "parts" / "inner.cuh").write_text("constexpr int ANSWER = 2;\n")
    assert toolchain.compile_kernels(source, {}, [], sanitize=False) != first


def test_a_name_means_another_file_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for number in (1, 2, 1):
        folder = tmp_path / str(number)
        if not folder.exists():
            folder.mkdir()
            kernel = f'extern "C" __global__ void answer(int* out) {{ out[0] = {number}; }}\n'
            (folder / "answer.cu").write_text(kernel)
        monkeypatch.chdir(folder)
        for _ in range(2):  # what was found once is found by the times of its files
            made.append(toolchain.compile_kernels(Path("answer.cu"), {}, [], sanitize=False))
    assert made[0] == made[1] == made[4] == made[5] != made[2] == made[3]


@pytest.mark.parametrize("disk_is_full", [False, True])
def test_a_cache_that_cannot_be_written(
    disk_is_full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Kernels are compiled all the same, for this process."""
    monkeypatch.setenv("MINIBERT_CACHE_DIR", str(tmp_path))
    if disk_is_full:  # files can be made, but nothing be written into them
        monkeypatch.setattr(toolchain.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))  # noqa: SIM115
    else:
        (tmp_path / "emulator").symlink_to("/proc/self")  # a folder in which not even root may write
    with pytest.warns(UserWarning, match=r"cannot keep what it compiles .* set MINIBERT_CACHE_DIR"):
        library = toolchain.compile_kernels(KERNELS / "crashes.cu", {}, [], sanitize=False)
    assert library.is_file() and tmp_path not in library.parents
    monkeypatch.setattr(toolchain.tempfile, "tempdir", str(tmp_path / "nowhere"))
    toolchain._folder_in.cache_clear()
    toolchain._of_this_process.cache_clear()  # removes it
    with pytest.raises(BackendUnavailable, match=r"no place for compiled kernels .* set MINIBERT_CACHE_DIR"):
        toolchain.compile_kernels(KERNELS / "crashes.cu", {}, [], sanitize=False)
    assert not library.exists()


def test_a_compiler_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "ccache g++")
    with pytest.raises(BackendUnavailable, match=r"\$CXX names 'ccache g\+\+', which is no program"):
        toolchain.compiler()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(UserError, match="false ended with exit status 1 and said nothing"):
        toolchain.emulator_executable()


def test_what_cuda_has_without_a_header_and_large_local_arrays(device: Device, tmp_path: Path) -> None:
    source = tmp_path / "k.cu"
    source.write_text("""
#include <cuda_fp16.h>
extern "C" __global__ void k(float* y, int n) {
    float large[120000];  // 480000 bytes: a GPU gives a thread 512 KiB
    for (int i = 0; i < 120000; ++i) large[i] = i + n;
    __half2 h = __hmin2(__floats2half2_rn(-3, 4), __floats2half2_rn(5, 6));
    h = __hmax2(__floats2half2_rn(1, -2), __hneg2(__habs2(h)));
    y[0] = large[119999 - n] + __low2float(h) + __high2float(h);
    y[1] = isnan(y[0] / 0.0f) + 2 * isinf(y[0] / 0.0f) + 4 * isfinite(y[0]);
}
""")
    y = device.empty(256)
    library = toolchain.compile_kernels(source, {}, [], sanitize=True)
    arguments = [y.to_bytes(8, "little"), bytes(4)]
    assert not device.process.launch(library, "k", (1,), (1,), 0, arguments).findings
    assert device.read(y, (2,), "f4").tolist() == [119999 + 1 - 2, 2 + 4]


def test_recursion_without_end_is_told() -> None:
    device = Device()
    with pytest.raises(EmulatorCrash, match="recursion without end, or local arrays beyond the 512 KiB"):
        device.run("crashes.cu", "recurses", 1, 1, device.empty(256), np.int32(0), sanitize=False)
    device.process.close()


@pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb: apt install gdb")
def test_leaving_gdb_ends_the_command(tmp_path: Path) -> None:
    """Once: not to be asked again for each check that is left."""
    words = ["minibert", "check", "softmax", "--backend", "emulator", "--gdb", "softmax/gpu.cu:60"]
    code = f"import sys; sys.argv = {words!r}; from minibert.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], input="quit\n", capture_output=True, text=True, timeout=600)
    if "ptrace: Operation not permitted" in done.stdout + done.stderr:
        pytest.skip("gdb may not trace processes here")
    assert done.returncode == 130 and done.stdout.count("(gdb)") == 1, done.stdout + done.stderr
