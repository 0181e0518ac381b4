"""The emulator on its own: each mistake that a kernel can make is found, with its line, and right kernels are let be.

The kernels are in tests/emulator_kernels; comments there mark the lines that must be named.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.backends.emulator import toolchain
from minibert.backends.emulator.findings import Finding, TrafficLine
from minibert.backends.emulator.process import EmulatorCrash
from minibert.errors import pip_install
from tests.emulator_device import KERNELS, SCHEDULES, Device, marked, needs_compiler

pytestmark = needs_compiler
traps_division = pytest.mark.skipif(platform.machine() != "x86_64", reason="division by zero passes silently here")


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    made = Device()
    yield made
    made.process.close()


# Faults: (kernel, kind, space, access, grid, block)
FAULTS = [
    ("read_without_barrier", "race", "shared", "read", 1, 64),
    ("tile_overwritten_too_early", "race", "shared", "write", 1, 64),
    ("two_writers", "race", "shared", "write", 1, 64),
    ("update_without_atomic", "race", "shared", "read", 1, 64),
    ("lanes_without_syncwarp", "race", "shared", "read", 1, 64),
    ("half_warp_synchronised", "race", "shared", "read", 1, 64),
    ("blocks_write_one_place", "race", "global", "write", 2, 64),
    ("block_reads_anothers", "race", "global", "read", 2, 64),
    ("block_overwrites_what_another_read", "race", "global", "write", 2, 64),
    ("plain_read_of_atomic", "race", "shared", "read", 1, 64),
    ("blocks_update_variable", "race", "global", "read", 2, 64),
    ("one_past_the_end", "out of bounds", "global", "read", 2, 64),
    ("write_past_the_end", "out of bounds", "global", "write", 2, 64),
    ("before_the_beginning", "out of bounds", "global", "read", 1, 64),
    ("far_away", "out of bounds", "global", "read", 1, 64),
    ("null_pointer", "out of bounds", "", "read", 1, 64),
    ("past_dynamic_shared", "out of bounds", "shared", "write", 1, 64),
    ("past_static_shared", "out of bounds", "shared", "read", 1, 64),
    ("past_own_array", "out of bounds", "", "", 1, 64),
    ("misaligned_vector", "misaligned access", "global", "read", 1, 64),
    ("unwritten_array", "uninitialised read", "global", "read", 1, 64),
    ("unwritten_shared", "uninitialised read", "shared", "read", 1, 64),
    ("copy_read_before_it_arrives", "uninitialised read", "shared", "read", 1, 64),
    ("barrier_in_two_branches", "divergent barrier", "", "", 1, 64),
    ("barrier_after_return", "exited before barrier", "", "", 1, 64),
    ("collective_and_barrier", "deadlock", "", "", 1, 64),
    ("mask_without_caller", "wrong warp mask", "", "", 1, 64),
    ("mask_names_absent_lanes", "wrong warp mask", "", "", 1, 48),
    ("mask_names_exited_lanes", "wrong warp mask", "", "", 1, 64),
    ("shuffle_from_inactive", "shuffle from an inactive lane", "", "", 1, 64),
    ("shuffle_of_odd_width", "wrong shuffle width", "", "", 1, 64),
    ("lanes_meet_elsewhere", "divergent warp collective", "", "", 1, 64),
    ("gives_up", "trap", "", "", 1, 64),
    ("asserts", "assertion failed", "", "", 1, 64),
]


def provoke(device: Device, kernel: str, grid: int, block: int, **options: Any) -> list[Finding]:
    x, y = device.array(np.arange(128, dtype="f4")), device.empty(512)
    return device.run("faults.cu", kernel, grid, block, x, y, np.int32(128), shared=256, **options).findings


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("kernel", "kind", "space", "access", "grid", "block"), FAULTS, ids=[f[0] for f in FAULTS])
def test_a_fault_is_found_at_its_line(
    device: Device, kernel: str, kind: str, space: str, access: str, grid: int, block: int, schedule: str
) -> None:
    findings = provoke(device, kernel, grid, block, schedule=schedule, seed=3)
    lines = {marked("faults.cu", f"fault {kernel}")}
    if f"other {kernel}" in (KERNELS / "faults.cu").read_text():
        lines.add(marked("faults.cu", f"other {kernel}"))
    assert findings, "nothing was found"
    for finding in findings:
        assert Path(finding.file).name == "faults.cu"
        assert (finding.kernel, finding.line in lines) == (kernel, True), str(finding)
        assert finding.block is not None and finding.thread is not None and finding.count >= 1
        if finding.other is not None:
            assert finding.other.line in lines
    of_kind = [f for f in findings if f.kind == kind]
    assert of_kind, [str(f) for f in findings]
    assert {f.space for f in of_kind} == {space}
    ends = {(f.line, f.access) for f in of_kind} | {(f.other.line, f.other.access) for f in of_kind if f.other}
    assert (marked("faults.cu", f"fault {kernel}"), access) in ends  # which comes second depends on the schedule


def test_a_race_names_both_accesses(device: Device) -> None:
    finding = provoke(device, "read_without_barrier", 1, 64)[1]  # after the same race seen from the write
    fault, other = (marked("faults.cu", f"{mark} read_without_barrier") for mark in ("fault", "other"))
    assert str(finding) == (
        f"emulator_kernels/faults.cu:{fault}: race in shared memory: read of 4 bytes by thread (32,0,0) of block "
        f"(0,0,0) after an unordered write by thread (31,0,0) at emulator_kernels/faults.cu:{other} "
        "[kernel read_without_barrier, seen 32 times]"
    )


def test_a_race_between_blocks_names_both_blocks(device: Device) -> None:
    finding = provoke(device, "block_reads_anothers", 2, 64)[0]
    assert finding.block == (1, 0, 0) and finding.other is not None and finding.other.block == (0, 0, 0)
    assert "of block (0,0,0) at" in str(finding)


def test_a_fault_in_an_inlined_function_names_its_callers(device: Device) -> None:
    x, y = device.array(np.ones(64, "f4")), device.empty(256)
    finding = device.run("right.cu", "calls_neighbour", 1, 64, x, y).findings[-1]
    assert (Path(finding.file).name, finding.line) == ("scale.cuh", marked("scale.cuh", "fault neighbour"))
    assert [(Path(c.file).name, c.line) for c in finding.callers] == [
        ("right.cu", marked("right.cu", "call neighbour"))
    ]
    assert f", called at emulator_kernels/right.cu:{finding.callers[0].line} [kernel" in str(finding)


def test_bounds_say_how_far(device: Device) -> None:
    assert "ends 4 bytes past the end of an array of 512 bytes" in str(provoke(device, "one_past_the_end", 2, 64)[0])
    assert "4 bytes before the beginning of an array of 512" in str(provoke(device, "before_the_beginning", 1, 64)[0])
    assert "null pointer" in str(provoke(device, "null_pointer", 1, 64)[0])
    assert "byte 256 of 256 bytes of dynamic shared" in str(provoke(device, "past_dynamic_shared", 1, 64)[0])


def test_freed_memory(device: Device) -> None:
    x, y = device.array(np.ones(64, "f4")), device.empty(256)
    device.process.region(x, 256, "freed")
    (finding,) = device.run("faults.cu", "read_without_barrier", 1, 64, x, y, np.int32(64)).findings
    assert finding.kind == "use of freed memory" and "256 bytes that have been freed" in str(finding)
    again = device.process
    again.region(x, 256, "unwritten")
    assert np.isnan(device.read(x, (64,), "f4")).all()


def test_a_fault_does_not_spoil_what_follows(device: Device) -> None:
    """A launch that was given up, or was stuck, leaves the process as fit as before."""
    for kernel in ("far_away", "collective_and_barrier", "gives_up"):
        assert provoke(device, kernel, 1, 64)
        y = device.empty(256)
        assert not device.run("crashes.cu", "ones", 1, 64, y, np.int32(0)).findings
        assert (device.read(y, (64,), "f4") == 1).all()


# Right kernels


def each_schedule(device: Device, kernel: str, grid: int, block: int, *arguments: Any, **options: Any) -> None:
    """Run a kernel of right.cu watched, in every order: nothing may be found."""
    for schedule in SCHEDULES:
        report = device.run("right.cu", kernel, grid, block, *arguments, schedule=schedule, seed=1, **options)
        assert [str(f) for f in report.findings] == []


def test_neighbours_in_a_word_do_not_race(device: Device) -> None:
    y = device.empty(2 * 101)
    each_schedule(device, "neighbours_16_bit", 1, 64, y, np.int32(101))
    assert (device.read(y, (101,), "u2") == (np.arange(101, dtype="f4").view("u4") >> 16)).all()
    y = device.empty(101)
    each_schedule(device, "neighbours_8_bit", 1, 64, y, np.int32(101))
    assert (device.read(y, (101,), "u1") == np.arange(101)).all()


def test_static_shared_memory_in_a_template(device: Device) -> None:
    x, k = np.arange(64, dtype="f4"), np.arange(64, dtype="i4")
    y, l = device.empty(256), device.empty(256)
    each_schedule(device, "template_shared", 1, 64, device.array(x), y, device.array(k), l)
    assert (device.read(y, (64,), "f4") == x[::-1]).all() and (device.read(l, (64,), "i4") == k[::-1]).all()


def test_warps_keep_their_own_order(device: Device) -> None:
    x = np.arange(64, dtype="f4")
    y = device.empty(256)
    each_schedule(device, "warp_in_order", 1, 64, device.array(x), y)
    assert (device.read(y, (2, 32), "f4") == x.reshape(2, 32).cumsum(1)).all()
    each_schedule(device, "half_warps_in_order", 1, 32, device.array(x), y)
    assert (device.read(y, (32,), "f4") == x[np.arange(32) ^ 5] + np.repeat([2, 3], 16)).all()


def test_dynamic_shared_memory(device: Device) -> None:
    x = np.arange(4 * 96, dtype="f4")
    y = device.empty(x.nbytes)
    each_schedule(device, "dynamic_tile", 4, 96, device.array(x), y, shared=4 * 96)
    assert (device.read(y, (4, 96), "f4") == 2 * x.reshape(4, 96)[:, ::-1]).all()


def test_asynchronous_copies(device: Device) -> None:
    x = np.arange(256, dtype="f4")
    y = device.empty(x.nbytes)
    each_schedule(device, "copies", 1, 32, device.array(x), y)
    expected = x.reshape(2, 32, 4)[:, ::-1].copy()
    expected[1, :, 3] = 0  # the last four bytes were asked to be zeros
    assert (device.read(y, (2, 32, 4), "f4") == expected).all()


def test_collectives(device: Device) -> None:
    x = np.random.default_rng(0).integers(-9, 9, 32).astype("i4")
    y = device.empty(32 * 64)
    each_schedule(device, "collectives", 1, 32, device.array(x), y)
    got, lane = device.read(y, (32, 16), "i4"), np.arange(32)
    assert (got[:, 0] == x[lane // 8 * 8 + 3]).all()
    assert (got[:, 1] == x[np.where(lane % 16 < 2, lane, lane - 2)]).all()
    assert (got[:, 2] == x[np.where(lane + 5 < 32, lane + 5, lane)]).all()
    assert (got[:, 3] == x[lane ^ 16]).all()
    ballot = np.uint32(sum(int(v > 0) << i for i, v in enumerate(x)))
    assert (got[:, 4].view("u4") == ballot).all()
    assert (got[:, 5] == 1).all() and (got[:, 6] == 0).all()
    assert (got[:, 7] == x.sum()).all() and (got[:, 8] == x.max()).all() and (got[:, 9] == x.min()).all()
    remainder = np.fmod(x, 4)
    matches = [sum(int(remainder[j] == remainder[i]) << j for j in range(32)) for i in range(32)]
    assert got[:, 10].view("u4").tolist() == matches
    assert (got[:, 11] == (x > 0).sum()).all() and (got[:, 12] == 1).all() and (got[:, 13] == 0).all()
    assert (got[:, 14] == x.cumsum()).all() and (got[:, 15] == lane).all()


def test_atomics_of_many_blocks_do_not_race(device: Device) -> None:
    sums, total = device.array(np.zeros(3, "i4")), device.array(np.zeros(1, "f4"))
    ring, seen = device.array(np.zeros(1, "u4")), device.array(np.zeros(5, "u4"))
    each_schedule(device, "atomics", 5, 33, sums, total, ring, seen)
    assert device.read(sums, (3,), "i4").tolist() == [3 * 165, 2 * 3 * 165, 164]
    assert device.read(total, (1,), "f4")[0] == 0.5 * 3 * 165
    assert device.read(ring, (1,), "u4")[0] == 3 * 165 % 10
    assert (device.read(seen, (5,), "u4") == 7).all()


def test_arguments_of_every_kind(device: Device) -> None:
    offset, y = device.array(np.arange(8, dtype="f4")), device.empty(256)
    library = toolchain.compile_kernels(KERNELS / "right.cu", {}, [], sanitize=True)
    described = device.process.load(library)["arguments"]
    assert [a.kind for a in described] == ["pointer", "struct", "u1", "i8", "u1", "f8"]
    assert (described[0].element, described[0].const, described[1].bytes) == ("f4", False, 16)
    assert device.process.load(library)["product"][0][1:] == (8, "f2", True)
    assert device.process.load(library)["neighbours_16_bit"][0].element == "b2"
    step = np.frombuffer(struct.pack("<fiQ", 2.0, 8, offset), "u1")
    each_schedule(device, "arguments", 1, 32, y, step, np.bool_(True), 1 << 10, np.uint8(3), np.float64(0.5))
    expected = -(2 * (np.arange(8) % 4 + 1) + np.arange(8)) + 1024 + 3 + 0.5
    assert (device.read(y, (8,), "f4") == expected).all()


def test_wmma(device: Device) -> None:
    a, b = np.random.default_rng(1).integers(-4, 5, (2, 16, 16)).astype("f2")
    c = device.empty(1024)
    each_schedule(device, "product", 1, 32, device.array(a), device.array(b), c)
    assert (device.read(c, (16, 16), "f4") == a.astype("f4") @ b.astype("f4").T + 1).all()


def test_rounding_to_16_bits(device: Device) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason=f"bfloat16 for NumPy: {pip_install('ml_dtypes')}")
    bits = np.random.default_rng(2).integers(0, 1 << 32, 20_000, dtype="u8").astype("u4")
    halves = np.arange(1 << 16, dtype="u2").view("f2").astype("f4")
    between = (halves[1:31743] + halves[:31742]) / 2  # ties
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 65519.99, 65520, 2**-24, 2**-25, 2**-25 * 1.001], "f4")
    x = np.concatenate([bits.view("f4"), halves, between, special])
    half, bfloat, back = device.empty(2 * x.size), device.empty(2 * x.size), device.empty(8 * x.size)
    blocks = -(-x.size // 256)
    options = {"sanitize": False}
    device.run("right.cu", "roundings", blocks, 256, device.array(x), half, bfloat, back, np.int32(x.size), **options)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype("f2"), x.astype(ml_dtypes.bfloat16)
    got_back = device.read(back, (x.size, 2), "f4")
    for i, (address, wanted) in enumerate(zip((half, bfloat), expected, strict=True)):
        got = device.read(address, x.shape, wanted.dtype)
        np.testing.assert_array_equal(got.astype("f4"), wanted.astype("f4"))
        assert (got.view("u2") == wanted.view("u2"))[~np.isnan(x)].all()
        np.testing.assert_array_equal(got_back[:, i], wanted.astype("f4"))


def test_the_same_bits_watched_or_not(device: Device) -> None:
    x = device.array(np.random.default_rng(3).standard_normal(64).astype("f4"))
    results = []
    for sanitize in (True, False):
        y = device.empty(256)
        device.run("right.cu", "warp_in_order", 1, 64, x, y, sanitize=sanitize)
        results.append(device.read(y, (64,), "u4"))
    assert (results[0] == results[1]).all()


# Traffic


@pytest.mark.parametrize(
    ("kernel", "space", "expected"),
    [
        ("contiguous", "global", (1, 128, 4, 4, 1)),
        ("strided", "global", (1, 128, 32, 4, 1)),
        ("shifted", "global", (1, 128, 5, 4, 1)),
        ("broadcast", "global", (1, 4, 1, 1, 1)),
        ("vectors", "global", (1, 512, 16, 16, 1)),
        ("columns", "shared", (32, 4096, 0, 0, 32)),
        ("padded_columns", "shared", (32, 4096, 0, 0, 1)),
        ("shared_vectors", "shared", (1, 512, 0, 0, 1)),
    ],
)
def test_traffic(device: Device, kernel: str, space: str, expected: tuple[int, ...]) -> None:
    x, y = device.array(np.ones(256, "f4")), device.empty(128)
    report = device.run("traffic.cu", kernel, 1, 32, x, y, sanitize=False, traffic=True)
    line = marked("traffic.cu", f"pattern {kernel}")
    access = "write" if kernel == "shared_vectors" else "read"
    (found,) = (t for t in report.traffic if (t.line, t.space, t.access) == (line, space, access))
    assert (found.requests, found.bytes, found.sectors, found.ideal_sectors, found.bank_conflict_ways) == expected
    doubled = found.plus(found)
    assert (doubled.sectors, doubled.bank_conflict_ways) == (2 * found.sectors, found.bank_conflict_ways)


def test_traffic_says_what_it_is() -> None:
    line = TrafficLine("kernels/softmax/gpu.cu", 3, "global", "read", 2, 256, 64, 8)
    assert str(line) == "softmax/gpu.cu:3: global read, 2 requests, 256 bytes in 64 sectors (ideal 8)"


# A process that dies


@pytest.mark.parametrize(
    ("kernel", "detail"),
    [
        ("writes_to_null", "at address 0x0"),
        pytest.param("divides_by_zero", "integer division by zero", marks=traps_division),
    ],
)
def test_a_crash_is_survived(kernel: str, detail: str) -> None:
    device = Device()
    kept, y = device.array(np.arange(4, dtype="f4")), device.empty(256)
    with pytest.raises(EmulatorCrash, match=detail) as caught:
        device.run("crashes.cu", kernel, 1, 64, y, np.int32(0), sanitize=False)
    (finding,) = caught.value.findings
    assert (finding.kind, finding.kernel, finding.thread) == ("crash", kernel, (0, 0, 0))
    assert finding.line == marked("crashes.cu", f"crash {kernel}")
    assert not device.run("crashes.cu", "ones", 1, 64, y, np.int32(0)).findings  # arrays are still allocated
    assert (device.read(y, (64,), "f4") == 1).all() and device.read(kept, (4,), "f4").tolist() == [0, 1, 2, 3]
    device.process.close()


def test_what_was_found_before_a_crash_is_told() -> None:
    device = Device()
    with pytest.raises(EmulatorCrash) as caught:
        device.run("crashes.cu", "reads_and_recurses", 1, 64, device.empty(256), np.int32(0))
    assert [f.kind for f in caught.value.findings] == ["uninitialised read", "crash"]
    device.process.close()


def test_an_endless_kernel_is_stopped() -> None:
    device = Device()
    y = device.array(np.zeros(64, "f4"))
    other = device.array(np.zeros(64, "f4"))
    device.run("crashes.cu", "ones", 1, 64, other, np.int32(0), sanitize=False)  # the process and the library are there
    patient, device.process.timeout = device.process.timeout, 0.5
    with pytest.raises(EmulatorCrash, match=r"never_ends did not finish in 0\.5 s of computing .* goes round"):
        device.run("crashes.cu", "never_ends", 1, 1, y, np.int32(0), sanitize=False)
    device.process.timeout = patient
    assert not device.run("crashes.cu", "ones", 1, 64, y, np.int32(0)).findings
    device.process.close()
