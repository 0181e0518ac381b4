"""CUDA kernels compiled without a GPU: where NVRTC is found, what it says, and what is kept on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minibert.backends.base import BackendUnavailable
from minibert.backends.cuda import nvrtc
from minibert.backends.cuda.nvrtc import Resources, compile_kernels, read_log
from minibert.errors import UserError

NEEDS_NVRTC = pytest.mark.skipif(nvrtc.available() is not None, reason=str(nvrtc.available()))

SCALE = """#include "gpu_common.cuh"
extern "C" __global__ void __launch_bounds__(128) scale(const Storage* __restrict__ x, Storage* __restrict__ y, int n) {
    __shared__ float unit[4];
    if (threadIdx.x < 4) unit[threadIdx.x] = load(x);
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) store(y + i, load(x + i) * 3 + unit[i % 4]);
}
extern "C" __global__ void __launch_bounds__(32) count(int* __restrict__ total) { total[threadIdx.x] = WIDTH; }
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is found that an earlier test, or the user, compiled; no toolkit of one test is that of another."""
    monkeypatch.setenv("MINIBERT_CACHE_DIR", str(tmp_path / "cache"))
    yield
    nvrtc.toolkit.cache_clear()


def written(folder: Path, source: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "gpu.cu"
    path.write_text(source, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------ without NVRTC


def test_an_nvrtc_that_cannot_serve_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare, broken = tmp_path / "bare" / "libnvrtc.so.13", tmp_path / "broken" / "libnvrtc.so.13"
    for path in (bare, broken):
        path.parent.mkdir()
        path.write_bytes(b"no library")
    for name in nvrtc.HEADERS:
        (broken.parent / name).touch()
    monkeypatch.setattr(nvrtc, "_places", lambda: iter([(bare, (bare.parent,)), (broken, (broken.parent,))]))
    nvrtc.toolkit.cache_clear()
    with pytest.raises(BackendUnavailable) as raised:
        nvrtc.toolkit()
    assert f"{bare} has no cuda_fp16.h" in str(raised.value)
    assert f"{broken} does not load" in str(raised.value)


@pytest.mark.parametrize("layout", ["13", "12"])
def test_the_wheels_of_nvidia_are_found(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, include = {
        "13": ("nvidia/cu13/lib", "nvidia/cu13/include"),
        "12": ("nvidia/cuda_nvrtc/lib", "nvidia/cuda_runtime/include"),
    }[layout]
    (tmp_path / library).mkdir(parents=True)
    for name in (f"libnvrtc.so.{layout}", f"libnvrtc.alt.so.{layout}", f"libnvrtc-builtins.so.{layout}"):
        (tmp_path / library / name).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    path, folders = next(nvrtc._places())
    assert path == tmp_path / library / f"libnvrtc.so.{layout}"
    assert tmp_path / include in folders


def test_the_assemblers_log_is_read() -> None:
    """As NVRTC 13 writes it, of two kernels and a device function that is called."""
    log = """k.cu(5): warning #177-D: variable "unused" was declared but never referenced
ptxas info    : 12 bytes gmem
ptxas info    : Compiling entry function 'spill' for 'sm_90'
ptxas info    : Function properties for spill
ptxas         .     344 bytes stack frame, 616 bytes spill stores, 660 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 344 bytes cumulative stack size
ptxas info    : Compiling entry function 'trig' for 'sm_90'
ptxas info    : Function properties for trig
    224 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 224 bytes cumulative stack size, 128 bytes smem, 380 bytes cmem[0]
ptxas info    : Function properties for _Z4slowf
ptxas         .     16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
"""
    kernels, functions = read_log(log)
    assert kernels == {"spill": Resources(32, 0, 344, 616, 660), "trig": Resources(40, 128, 224, 0, 0)}
    assert functions == {"_Z4slowf": Resources(0, 0, 16, 4, 8)}
    assert functions["_Z4slowf"].spill_bytes == 12


# --------------------------------------------------------------------------------------------------------- with NVRTC


@NEEDS_NVRTC
def test_a_kernel_becomes_machine_code_and_figures(tmp_path: Path) -> None:
    path = written(tmp_path / "scale", SCALE)
    made = compile_kernels(path, {"STORAGE": "__half", "WIDTH": 3}, "sm_90")
    assert made.image[:4] == b"\x7fELF" and b"scale" in made.image
    assert set(made.resources) == {"scale", "count"} and not made.functions
    used = made.resources["scale"]
    assert 8 <= used.registers <= 64 and used.shared_bytes == 16 and used.spill_bytes == 0
    assert made.path is not None and made.path.read_bytes() == made.image


@NEEDS_NVRTC
def test_ptx_for_a_gpu_that_is_not_known_yet(tmp_path: Path) -> None:
    made = compile_kernels(written(tmp_path / "scale", SCALE), {"WIDTH": 3}, "compute_90")
    assert b".target sm_90" in made.image and not made.resources
    assert made.path is not None and made.path.suffix == ".ptx"


@NEEDS_NVRTC
def test_products_and_sums_are_fused_unless_strict(tmp_path: Path) -> None:
    path = written(tmp_path / "scale", SCALE)
    fused = compile_kernels(path, {"WIDTH": 3}, "compute_90").image
    strict = compile_kernels(path, {"WIDTH": 3}, "compute_90", strict=True).image
    assert b"fma.rn.f32" in fused and b"fma.rn.f32" not in strict
    for image in (fused, strict):  # subnormal numbers are numbers
        assert b".ftz" not in image and b".approx" not in image


@NEEDS_NVRTC
def test_what_was_compiled_comes_from_disk(tmp_path: Path) -> None:
    path = written(tmp_path / "scale", SCALE)
    first = compile_kernels(path, {"WIDTH": 3}, "sm_90")
    second = compile_kernels(path, {"WIDTH": 3, "STORAGE": "float"}, "sm_90")  # float is what is meant without a word
    assert (first.from_disk, second.from_disk) == (False, True)
    assert second._replace(from_disk=False) == first
    for other in ({"WIDTH": 4}, {"WIDTH": 3, "STORAGE": "__nv_bfloat16"}):
        assert not compile_kernels(path, other, "sm_90").from_disk
    assert not compile_kernels(path, {"WIDTH": 3}, "sm_80").from_disk
    assert not compile_kernels(path, {"WIDTH": 3}, "sm_90", strict=True).from_disk


@NEEDS_NVRTC
@pytest.mark.parametrize("of_all_kernels", [False, True])
def test_an_edited_header_is_compiled_anew(
    of_all_kernels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "wide", '#include "width.cuh"\n' + SCALE.partition("\n")[2].splitlines()[-1])
    header = path.with_name("width.cuh")
    if of_all_kernels:
        monkeypatch.setattr(nvrtc, "KERNELS", tmp_path / "kernels")
        header = tmp_path / "kernels" / "width.cuh"
        header.parent.mkdir()
    header.write_text("#define WIDTH 3\n")
    before = compile_kernels(path, {}, "compute_90")
    assert compile_kernels(path, {}, "compute_90").from_disk
    header.write_text("#define WIDTH 4\n")
    after = compile_kernels(path, {}, "compute_90")
    assert not after.from_disk and after.path != before.path and after.image != before.image


@NEEDS_NVRTC
@pytest.mark.parametrize(
    "damage", [lambda code: code[:-1], lambda code: b"", lambda code: code[:99] + b"?" + code[100:]]
)
def test_damaged_code_is_compiled_anew(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = written(tmp_path / "scale", SCALE)
    whole = compile_kernels(path, {"WIDTH": 3}, "sm_90")
    assert whole.path is not None
    whole.path.write_bytes(damage(whole.image))
    again = compile_kernels(path, {"WIDTH": 3}, "sm_90")
    assert not again.from_disk and again.image == whole.image == whole.path.read_bytes()


@NEEDS_NVRTC
def test_without_a_place_to_keep_it_code_is_compiled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINIBERT_CACHE_DIR", str(tmp_path / "file"))
    made = compile_kernels(written(tmp_path / "scale", SCALE), {"WIDTH": 3}, "sm_90")
    assert made.path is None and made.image[:4] == b"\x7fELF"


@NEEDS_NVRTC
def test_an_error_tells_its_file_and_line(tmp_path: Path) -> None:
    path = written(tmp_path / "scale", SCALE.replace("load(x);", "lode(x);"))
    with pytest.raises(UserError) as raised:
        compile_kernels(path, {"WIDTH": 3}, "sm_90")
    assert str(raised.value) == f'{path}:4: identifier "lode" is undefined'
    path.with_name("part.cuh").write_text("\nint f() { return 1 }\n")
    with pytest.raises(UserError, match=r"part\.cuh:2: expected a"):
        compile_kernels(written(tmp_path / "scale", '#include "part.cuh"\n'), {}, "sm_90")
    with pytest.raises(UserError, match=r"gpu\.cu:1: cannot open source file"):
        compile_kernels(written(tmp_path / "scale", '#include "absent.cuh"\n'), {}, "sm_90")


@NEEDS_NVRTC
@pytest.mark.parametrize("arch", ["sm_9", "90", "sm_90 ", ""])
def test_an_architecture_that_is_none_is_refused(arch: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not know .*; it knows .*sm_90"):
        compile_kernels(written(tmp_path / "scale", SCALE), {"WIDTH": 3}, arch)
