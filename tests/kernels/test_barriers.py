"""Every barrier of the kernels is needed, and the emulator knows it: delete any one of them, and it finds something."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from minibert.kernels import OPS, Op
from minibert.lab.conform.check import run_check
from tests.planted import KERNELS, emulator, findings, planted, source

# Barriers, and the waits for copies that are made in the background.
BARRIER = re.compile(r"\b(?:__sync(?:threads|warp)\w*|wait_for_copies\s*<\w+>|__pipeline_wait_prior)\s*\(")
RETURNS_SOMETHING = re.compile(r"__syncthreads_\w+")  # of all threads' arguments

# Ops that between them reach every barrier of a header which all families include.
SHARED_HEADERS = {"gpu/gpu_common.cuh": ("softmax", "square_norm")}


class Barrier(NamedTuple):
    """A barrier, named so that lines may be added above it."""

    file: str
    number: int  # among those of its file
    start: int  # where it stands in the text
    open: int  # the parenthesis of its argument

    def __str__(self) -> str:
        return f"{self.file}-{self.number}"

    @property
    def waits_for_copies(self) -> bool:
        """Which kernels for 16 bits do."""
        return source(self.file).startswith("wait_for_copies", self.start)

    def deleted(self) -> str:
        """The source without it: no line moves. Of one that returns something, the thread's own argument is left."""
        text = source(self.file)
        if RETURNS_SOMETHING.match(text, self.start):
            return text[: self.start] + text[self.open :]
        return text[: self.start] + text[text.index(")", self.open) + 1 :]


def barriers_of(file: str) -> Iterator[Barrier]:
    code = re.sub(r"//[^\n]*", lambda comment: " " * len(comment[0]), source(file))
    if file == "gpu/gpu_ptx.cuh":
        return  # it defines what others call
    for number, found in enumerate(BARRIER.finditer(code), 1):
        yield Barrier(file, number, found.start(), found.end() - 1)


FILES = sorted(path.relative_to(KERNELS).as_posix() for suffix in ("*.cu", "*.cuh") for path in KERNELS.rglob(suffix))
BARRIERS = [barrier for file in FILES for barrier in barriers_of(file)]


def ops_that_reach(file: str) -> list[Op]:
    if file in SHARED_HEADERS:
        return [OPS[name] for name in SHARED_HEADERS[file]]
    family, slash, _ = file.partition("/")
    assert slash, f"which ops reach the barriers of {file}? Name them in SHARED_HEADERS"
    ops = [op for op in OPS.values() if op.family == f"minibert.kernels.{family}"]
    return [op for op in ops if emulator().by(op) == "kernel"]


@pytest.mark.parametrize("barrier", BARRIERS, ids=str)
def test_a_deleted_barrier_is_noticed(barrier: Barrier) -> None:
    ops = ops_that_reach(barrier.file)
    with planted(barrier.file, barrier.deleted()):
        for dtype in ("float16", "float32") if barrier.waits_for_copies else ("float32", "float16"):
            for found in findings(ops, dtype):
                assert any(finding.kind in ("race", "uninitialised read") for finding in found), found
                return
        for op in ops:  # one whose threads share nothing but its result
            if not run_check("follows_formula", op, emulator(), "float32").ok:
                return
    pytest.fail("nothing was noticed: is it needed at all, and do the samples reach it?")


def test_there_are_barriers() -> None:
    shared = {"gpu/gpu_common.cuh", "attention/gpu_flash.cuh", "attention/gpu_tile.cuh"}
    assert {barrier.file for barrier in BARRIERS} >= {*shared, "reduction/gpu.cu"}
    assert len(BARRIERS) > 12 and any(barrier.waits_for_copies for barrier in BARRIERS)
