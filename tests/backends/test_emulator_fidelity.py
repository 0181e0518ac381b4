"""Where a GPU is stricter than a CPU, or gives other numbers, so does the emulator.

The kernels are in tests/emulator_kernels/fidelity.cu; comments there mark the lines that must be named.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.backends.base import BackendUnavailable
from minibert.backends.emulator import toolchain
from minibert.backends.emulator.driver import unset_variables
from minibert.backends.emulator.findings import Finding
from minibert.backends.emulator.process import SECONDS, USUAL_SECONDS, EmulatorCrash
from minibert.cli.emulator import emulator_options
from minibert.kernels import OPS, Array
from minibert.kernels.gpu.launch import CudaFile, blocks_for, contiguous
from minibert.lab.conform.check import run_check
from tests.emulator_device import KERNELS, SCHEDULES, Device, marked, needs_compiler

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    made = Device()
    yield made
    made.process.close()


def findings(device: Device, kernel: str, grid: int = 1, **options: Any) -> list[Finding]:
    x, y = device.array(np.arange(128, dtype="f4")), device.empty(512)
    return device.run("fidelity.cu", kernel, grid, 64, x, y, np.int32(64), shared=512, **options).findings


# Alignment


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("float4_of_global", "in global memory: read of 16 bytes {} (the address is 4 bytes past a multiple of 16)"),
        ("float4_of_shared", "in shared memory: read of 16 bytes {} (the address is 12 bytes past a multiple of 16)"),
        ("float4_to_dynamic_shared", "in shared memory: write of 16 bytes {} (the address is 8 bytes past a"),
        ("float4_of_local", "in local memory: read of 16 bytes {} (the address is 4 bytes past a multiple of 16)"),
        ("float2_to_global", "in global memory: write of 8 bytes {} (the address is 4 bytes past a multiple of 8)"),
        ("int4_of_global", "in global memory: read of 16 bytes {} (the address is 8 bytes past a multiple of 16)"),
        ("uint4_copied", "in global memory: read of 16 bytes {} (the address is 12 bytes past a multiple of 16)"),
        ("uint4_by_ldg", "in global memory: read of 16 bytes {} (the address is 4 bytes past a multiple of 16)"),
        ("double2_of_global", "in global memory: read of 16 bytes {} (the address is 8 bytes past a multiple of 16)"),
        ("half2_of_shared", "in shared memory: read of 4 bytes {} (the address is 2 bytes past a multiple of 4)"),
        ("long_long_of_global", "in global memory: read of 8 bytes {} (the address is 4 bytes past a multiple of 8)"),
        ("aligned_struct", "in global memory: read of 16 bytes {} (the address is 8 bytes past a multiple of 16)"),
        ("float4_at_a_computed_place", "in global memory: read of 16 bytes {} (the address is 8 bytes past a multiple"),
    ],
)  # fmt: skip
def test_misaligned_vectors(device: Device, kernel: str, said: str) -> None:
    (found,) = findings(device, kernel)
    assert (found.kind, found.line) == ("misaligned access", marked("fidelity.cu", f"fault {kernel}"))
    assert said.format("by thread (0,0,0) of block (0,0,0)") in str(found)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_needs_no_alignment(device: Device, schedule: str) -> None:
    assert [str(f) for f in findings(device, "aligned_enough", schedule=schedule)] == []


# Integers


@pytest.mark.parametrize("kernel", ["divides_by_zero", "remainder_by_zero"])
def test_an_integer_divided_by_zero(device: Device, kernel: str) -> None:
    (found,) = findings(device, kernel)
    assert (found.kind, found.line) == ("integer division by zero", marked("fidelity.cu", f"fault {kernel}"))


# Launches without an end


def loop(kernel: str) -> range:
    """The lines that a kernel goes round in."""
    return range(marked("fidelity.cu", f"loop {kernel}"), marked("fidelity.cu", f"end {kernel}") + 1)


def endless(device: Device, kernel: str, grid: int = 1, **options: Any) -> EmulatorCrash:
    x, y = device.array(np.arange(128, dtype="f4")), device.array(np.zeros(128, dtype="f4"))
    with pytest.raises(EmulatorCrash) as caught:
        device.run("fidelity.cu", kernel, grid, 64, x, y, np.int32(64), **options)
    found = caught.value.findings[-1]
    assert (found.kind, found.line in loop(kernel)) == ("no end", True)
    return caught.value


def test_an_endless_launch_tells_where_its_threads_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS, "0.1")
    device = Device()
    barrier, line, inner = (marked("fidelity.cu", f"{m} waits_in_a_function") for m in ("barrier", "loop", "inner"))
    where = "emulator_kernels/fidelity.cu"
    assert re.fullmatch(
        r"kernel waits_in_a_function did not finish in 0\.1 s of computing and was stopped: thread \(40,0,0\) of "
        rf"block \(0,0,0\) goes round in {where}:{line}, called to {where}:{inner}, threads 0-31 wait at the barrier "
        rf"of {where}:{barrier}, threads 32-39 wait for their warp at {where}:{line + 1}, threads 41-63 wait for their "
        r"turn; what arrays hold is not to be relied on",
        str(endless(device, "waits_in_a_function")),
    )
    begun = time.monotonic()
    said = str(endless(device, "steps_of_zero", grid=5, schedule="reverse"))
    assert "of block (4,0,0) goes round in" in said and "; 0 of 5 blocks have ended, 4 wait for their turn;" in said
    said = str(endless(device, "steps_of_zero", grid=5))
    assert re.search(r"goes round in \S+, threads 1-63 wait for their turn; 2 of 5 blocks have ended", said)
    endless(device, "computes_for_ever")
    device.process.close()
    assert time.monotonic() - begun < 60


def test_a_launch_may_take_what_its_size_asks_for(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    library = KERNELS / "fidelity.cu"
    held = sum(device.process._live.values())
    few, many = (device.process.seconds_for(library, "k", threads) for threads in (64, 10_064))
    assert many - few == pytest.approx(USUAL_SECONDS)
    device.process.region(device.end, 1 << 18, "unwritten")
    assert device.process.seconds_for(library, "k", 64) - few == pytest.approx(USUAL_SECONDS)
    device.process.region(device.end, 1 << 18, "freed")
    assert sum(device.process._live.values()) == held
    for wrong in ("soon", "0", "-1", "1e9"):
        monkeypatch.setenv(SECONDS, wrong)
        with pytest.raises(BackendUnavailable, match=r"\$MINIBERT_EMULATOR_SECONDS: expected seconds, above 0"):
            Device()


# Approximate functions


def approximations(device: Device, x: np.ndarray) -> np.ndarray:
    y = device.empty(64 * x.size)
    blocks = -(-x.size // 128)
    assert not device.run("fidelity.cu", "approximations", blocks, 128, device.array(x), y, np.int32(x.size)).findings
    return device.read(y, (x.size, 16), "f4")


def spacing(exact: np.ndarray) -> np.ndarray:
    """Of float32 about these numbers."""
    return np.ldexp(1.0, np.maximum(np.frexp(exact)[1] - 1, -126) - 23)


def near_one(x: np.ndarray, absolute: float, ulps: float, exact: np.ndarray) -> np.ndarray:
    return np.where((x >= 0.5) & (x <= 2), absolute, ulps * spacing(exact))


APPROXIMATIONS: dict[str, tuple[int, Any, Any]] = {  # column, exact, largest error of x and the exact value
    "__expf": (0, np.exp, lambda x, e: (2 + np.floor(np.abs(1.173 * x))) * spacing(e)),
    "__exp10f": (1, lambda x: 10**x, lambda x, e: (2 + np.floor(np.abs(2.97 * x))) * spacing(e)),
    "__logf": (2, np.log, lambda x, e: near_one(x, 2**-21.41, 3, e)),
    "__log2f": (3, np.log2, lambda x, e: near_one(x, 2**-22, 2, e)),
    "__log10f": (4, np.log10, lambda x, e: near_one(x, 2**-24, 3, e)),
    "__sinf": (5, np.sin, lambda x, e: 2**-21.41 * np.maximum(1, np.abs(x) / np.pi)),
    "__cosf": (6, np.cos, lambda x, e: 2**-21.19 * np.maximum(1, np.abs(x) / np.pi)),
    "__tanhf": (8, np.tanh, lambda x, e: 2**-11 * np.abs(e)),
    "rsqrtf": (9, lambda x: x**-0.5, lambda x, e: 2**-22.9 * e),
    "__fdividef(x, 3)": (10, lambda x: x / 3, lambda x, e: 2 * spacing(e)),
    "__fdividef(3, x)": (11, lambda x: 3 / x, lambda x, e: 2 * spacing(e)),
    "__frcp_rn": (13, lambda x: 1 / x, lambda x, e: 0.5 * spacing(e)),
    "__fsqrt_rn": (14, np.sqrt, lambda x, e: 0.5 * spacing(e)),
}


def test_approximate_functions_are_as_far_off_as_they_may_be(device: Device) -> None:
    """Never further, and far enough that a kernel which relies on more is seen."""
    rng = np.random.default_rng(0)
    sizes = [rng.uniform(0.5, 2, 3000), rng.uniform(0, 30, 3000), 2.0 ** rng.uniform(-20, 5, 3000)]
    x = np.concatenate([*sizes, *(-size for size in sizes)]).astype("f4")
    made = approximations(device, x).astype("f8")
    for name, (column, exactly, largest) in APPROXIMATIONS.items():
        with np.errstate(all="ignore"):
            exact = exactly(x.astype("f8"))
        finite = np.isfinite(exact)
        error, bound = np.abs(made[:, column] - exact)[finite], largest(x.astype("f8"), exact)[finite]
        assert (error <= bound * (1 + 1e-9)).all(), name
        assert (error > 0.8 * bound).any(), name
        assert np.isnan(made[~finite, column]).all(), name  # the logarithm, the root of a negative number
    again = approximations(device, x)
    np.testing.assert_array_equal(again, made.astype("f4"))
    np.testing.assert_array_equal(again[:, 15], again[:, 5] + again[:, 6])


def test_approximate_functions_at_the_ends(device: Device) -> None:
    special = np.array([0, 1, np.inf, -np.inf, np.nan, 2.0**126.5, -(2.0**127), -1, 150, -150], "f4")
    made = approximations(device, special)
    exp, log, sine, cosine, root, third, over = made[:, [0, 2, 5, 6, 9, 10, 11]].T
    assert exp[[0, 2, 3, 8]].tolist() == [1, np.inf, 0, np.inf] and 0 <= exp[9] < 2**-140
    assert log[[0, 1, 2]].tolist() == [-np.inf, 0, np.inf] and np.isnan(log[[3, 4, 7]]).all()
    assert (sine[0], cosine[0]) == (0, 1) and np.isnan(sine[[2, 3, 4]]).all()
    assert root[[0, 2]].tolist() == [np.inf, 0] and np.isnan(root[[3, 4, 7]]).all()
    assert third[[0, 2, 3]].tolist() == [0, np.inf, -np.inf] and third[1] != 0
    assert over[[0, 2, 3, 5, 6]].tolist() == [np.inf, 0, 0, 0, 0]  # beyond 2^126 the quotient is lost


# Several writers, and numbers that a CPU converts otherwise


def lines(mark: str) -> set[int]:
    text = (KERNELS / "fidelity.cu").read_text().splitlines()
    return {number for number, line in enumerate(text, 1) if re.search(rf"{mark}\b", line)}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_value_by_several_threads_is_told_and_is_no_fault(device: Device, schedule: str) -> None:
    x, y = device.array(np.arange(128, dtype="f4")), device.empty(512)
    report = device.run("fidelity.cu", "flag_raised_by_all", 3, 64, x, y, np.int32(64), schedule=schedule)
    assert not report.findings
    assert {(f.kind, f.line, f.space) for f in report.notes} == {
        ("same value written", line, space)
        for line, space in zip(sorted(lines("note flag_raised_by_all")), ("shared", "global"), strict=True)
    }
    assert "after an unordered write by thread" in str(report.notes[0])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kernel", ["struct_written_by_all", "all_but_the_last_agree", "flag_read_too_early"])
def test_other_values_are_a_race(device: Device, kernel: str, schedule: str) -> None:
    races = [f for f in findings(device, kernel, schedule=schedule) if f.kind == "race"]
    assert races and {f.line for f in races} <= lines(f"fault {kernel}")


def test_a_float_beyond_an_integer_is_told(device: Device) -> None:
    x, y = device.array(np.arange(64, dtype="f4")), device.empty(256)
    report = device.run("fidelity.cu", "beyond_an_integer", 1, 64, x, y, np.int32(64))
    (note,) = report.notes
    assert not report.findings and (note.kind, note.count) == ("float beyond an integer", 61)
    assert note.line in lines("note beyond_an_integer") and note.thread == (3, 0, 0)


# Hand-overs between blocks


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("kernel", "each"),
    [("left_by_one_thread", 1), ("left_by_all_threads", 4), ("fence_after_the_barrier", 4)],
)
def test_the_last_block_may_read_what_all_have_left(device: Device, kernel: str, each: int, schedule: str) -> None:
    x, y = device.array(np.arange(128, dtype="f4")), device.empty(512)
    for _ in range(2):  # the counter is back at 0
        report = device.run("fidelity.cu", kernel, 5, 64, x, y, np.int32(64), schedule=schedule, seed=2)
        assert [str(f) for f in report.findings + report.notes] == []
        expected = np.arange(each) + np.arange(5)[:, None]
        assert (device.read(y, (128,), "f4")[64 : 64 + 5 * each] == expected.ravel()).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_hand_over_within_a_block(device: Device, schedule: str) -> None:
    assert [str(f) for f in findings(device, "handed_over_within_a_block", 3, schedule=schedule)] == []


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "kernel",
    [
        "no_fence", "fence_for_the_block_only", "fence_of_another_thread", "read_before_the_atomic",
        "no_barrier_after_the_atomic",
    ],
)  # fmt: skip
def test_half_a_hand_over_is_a_race(device: Device, kernel: str, schedule: str) -> None:
    found = findings(device, kernel, 5, schedule=schedule, seed=2)  # what is read too early may be unwritten, too
    ends = {(f.kind, f.line) for f in found} | {(f.kind, f.other.line) for f in found if f.other}
    assert {("race", line) for line in lines(f"fault {kernel}")} <= ends
    assert {f.kind for f in found} <= {"race", "uninitialised read"}


# Variables that nobody has set


def test_variables_without_a_value(device: Device) -> None:
    library = toolchain.compile_kernels(KERNELS / "fidelity.cu", {}, [], sanitize=True)
    names = device.process.load(library)
    for kernel, kind, mark in (
        ("sum_from_nothing", "perhaps uninitialised", "note"),
        ("index_of_nothing", "uninitialised variable", "fault"),
    ):
        (found,) = unset_variables(library, kernel, names)
        assert (found.kind, found.is_note) == (kind, mark == "note") and found.line in lines(f"{mark} {kernel}")
    assert re.fullmatch(
        r"emulator_kernels/fidelity.cu:\d+: uninitialised variable \(index is read before it has a value\) "
        r"\[kernel index_of_nothing, seen 1 time\]",
        str(found),
    )
    assert unset_variables(library, "aligned_enough", names) == []


@pytest.mark.parametrize("kernel", ["sum_from_nothing", "own_array_from_nothing"])
def test_what_nobody_has_set_is_no_zero(device: Device, kernel: str) -> None:
    x, y = device.array(np.zeros(64, dtype="f4")), device.empty(256)
    device.run("fidelity.cu", kernel, 1, 64, x, y, np.int32(64))
    assert (np.abs(device.read(y, (64,), "f4")) > 1e37).all()


# Cooperative groups


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cooperative_groups(device: Device, schedule: str) -> None:
    x = np.arange(64, dtype="f4")
    y = device.empty(256)
    assert not device.run("fidelity.cu", "groups", 2, 64, device.array(x), y, np.int32(64), schedule=schedule).findings
    assert device.read(y, (2, 4), "f4").tolist() == 2 * [[x.sum(), 23, 32 + 800 + 20000, 1 + 200]]
    y = device.empty(256)
    arguments = device.array(x), y, np.int32(64)
    assert not device.run("fidelity.cu", "tile_with_sync", 1, 64, *arguments, schedule=schedule).findings
    assert (device.read(y, (64,), "f4") == x[np.arange(64) ^ 1] + np.arange(64) // 16 * 16 + 3 + 3).all()
    (found,) = findings(device, "tile_without_sync", schedule=schedule)[:1]
    assert found.kind == "race" and {found.line, found.other.line if found.other else 0} & lines(
        "fault tile_without_sync"
    )


# Pointers


@pytest.mark.parametrize("kernel", ["past_own_array_by_pointer", "into_the_next_array", "write_past_own_array"])
def test_a_pointer_out_of_an_array(device: Device, kernel: str) -> None:
    (found, *_) = findings(device, kernel)
    assert found.kind == "out of bounds" and {found.line} == lines(f"fault {kernel}")
    assert findings(device, "whole_of_a_table") == []


# What check says


@pytest.fixture(scope="module")
def own_tanh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Callable[[Array], Array]]:
    """A kernel of tanh, as a person would write one: right, off, or without an end."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.cu").write_text("""
#include "gpu_common.cuh"
extern "C" __global__ void __launch_bounds__(64) own_tanh(const Storage* x, Storage* y, int n, int way) {
    __shared__ int any;
    any = 1;
    __syncthreads();
    for (int i = blockIdx.x * 64 + threadIdx.x; i < n; i += way == 2 && i > 3 ? 0 : gridDim.x * 64) {
        store(y + i, way == any ? __tanhf(load(x + i)) : tanhf(load(x + i)));
    }
}
""")
    kernel = CudaFile(str(folder / "own.py"), "own.cu").kernel("own_tanh", block=64)

    def made(way: int) -> Callable[[Array], Array]:
        def tanh(x: Array) -> Array:
            x = contiguous(x)
            y = x.device.empty(x.shape, x.dtype)
            kernel(x, y, x.size, way, grid=blocks_for(x.size, 64, x.device))
            return y

        return tanh

    return made


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (0, ""),
        (1, "tanh on emulator in float32 fails follows_formula"),
        (2, r"tanh: kernel own_tanh did not finish in .* goes round in own\d*/own\.cu:[78].*, threads 5-63 wait for"),
    ],
    ids=["right", "approximate", "endless"],
)
def test_check_tells_what_the_emulator_sees(
    own_tanh: Any, way: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    emulator: Any = backends.get("emulator")
    monkeypatch.setattr(emulator.emulator.process, "timeout", 0.5)
    with emulator_options([emulator], None, True, False, None), emulator.using({OPS["tanh"]: own_tanh(way)}):
        result = run_check("follows_formula", OPS["tanh"], emulator, "float32")
    assert result.ok == (not said) and re.search(said, result.message)
    note = "note: .*own.cu:5: same value written in shared memory: write of 4 bytes by thread"
    assert way == 2 or re.search(note, capsys.readouterr().err)
