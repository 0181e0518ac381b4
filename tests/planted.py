"""Kernels of this project with a mistake planted in one file, and what the emulator says to them.

The kernels' sources are copied to a folder of their own, where one of them is changed; for the length of a `with` block
whatever the change reaches is compiled from there. The repository stays as it is.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

import minibert.kernels
from minibert.backends.base import BackendUnavailable
from minibert.backends.emulator import driver, toolchain
from minibert.backends.emulator.driver import SCHEDULES, EmulatorDriver, KernelFault
from minibert.backends.emulator.findings import Finding
from minibert.backends.emulator.process import EmulatorCrash
from minibert.kernels import OPS, Op
from minibert.lab.conform.judge import stored_as

if TYPE_CHECKING:
    from minibert.backends.emulator.backend import EmulatorBackend

KERNELS = Path(str(minibert.kernels.__file__)).parent

# For files that tests write: kernels that are compiled already, since compiling takes most of such a test's time.
KERNELS_AT_HAND: list[Callable[..., Any]] = []

# What several faults replace.
BLOCK_SUM = """\
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float total = 0;
"""


@cache
def emulator() -> EmulatorBackend:
    """An emulator of its own: a kernel that ends its process takes no other test's arrays with it. Else skips."""
    try:
        from minibert.backends.emulator.backend import EmulatorBackend  # which makes a driver: not without g++

        toolchain.emulator_executable()
        return EmulatorBackend(EmulatorDriver())
    except BackendUnavailable as error:
        pytest.skip(str(error))


def source(file: str) -> str:
    """The text of a file of the kernels, such as "softmax/gpu.cu"."""
    return (KERNELS / file).read_text(encoding="utf-8")


def replaced(text: str, old: str, new: str) -> str:
    """`text` with the one place where it says `old` changed."""
    assert text.count(old) == 1, f"the source says {text.count(old)} times, not once: {old}"
    return text.replace(old, new)


def line_of(text: str, fragment: str) -> int:
    """The line on which the one `fragment` of a text ends."""
    assert text.count(fragment) == 1, f"the source says {text.count(fragment)} times, not once: {fragment}"
    return text[: text.index(fragment) + len(fragment)].count("\n") + 1


class Planted(NamedTuple):
    """A copy of the kernels of which one file says something else."""

    folder: Path
    file: str

    def kernel(self, op: Op) -> Callable[..., Any]:
        """The kernel of an op by the changed gpu.py. Raises what loading it raises."""
        spec = importlib.util.spec_from_file_location("planted_gpu", self.folder / self.file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found: Callable[..., Any] = getattr(module, op.name)
        return found


class Fault(NamedTuple):
    """A mistake in one file of the kernels, and the op whose samples show it."""

    what: str
    file: str
    op: str
    old: str  # what the source says, in one place
    new: str
    found: str  # the kind of the finding; a part of the error's text; the check that fails
    at: str = ""  # ends on the line that must be named; `new`, where empty
    where: str = ""  # the file of that line; `file`, where empty
    dtype: str = "float32"

    def __str__(self) -> str:
        return self.what.replace(" ", "-")

    def text(self) -> str:
        """What the file says with the fault."""
        return replaced(source(self.file), self.old, self.new)

    def line(self) -> tuple[str, int]:
        """The file and the line that must be named."""
        where = self.where or self.file
        return where, line_of(self.text() if where == self.file else source(where), self.at or self.new)

    @contextmanager
    def planted(self) -> Iterator[Planted]:
        """The fault in the kernels, and the op run by the changed gpu.py where that is the file."""
        with planted(self.file, self.text()) as copy:
            if not self.file.endswith(".py"):
                yield copy
                return
            with emulator().using({OPS[self.op]: copy.kernel(OPS[self.op])}):
                yield copy


@contextmanager
def planted(file: str, text: str) -> Iterator[Planted]:
    """Let `file` of the kernels say `text` for the length of a `with` block, to the emulator and nobody else."""
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        folder = Path(scratch).resolve() / "kernels"
        for path in (path for suffix in ("*.cu", "*.cuh") for path in KERNELS.rglob(suffix)):
            copy = folder / path.relative_to(KERNELS)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
        (folder / file).write_text(text, encoding="utf-8")
        patch.setattr(driver, "compile_kernels", _compiler(folder, file))
        yield Planted(folder, file)


def _compiler(folder: Path, changed: str) -> Callable[..., Path]:
    """compile_kernels for a copy: what the change cannot reach comes from the kernels as they are, which are cached."""
    built = folder.parent / "built"
    built.mkdir()

    def compile_kernels(path: Path, defines: Mapping[str, str], include: Sequence[Path], *, sanitize: bool) -> Path:
        path = Path(path)
        if not path.is_relative_to(KERNELS) and not path.is_relative_to(folder):
            return toolchain.compile_kernels(path, defines, include, sanitize=sanitize)
        file = path.relative_to(KERNELS if path.is_relative_to(KERNELS) else folder)
        if changed.endswith(".py") or (changed.endswith(".cu") and str(file) != changed):
            return toolchain.compile_kernels(KERNELS / file, defines, include, sanitize=sanitize)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(toolchain, "cache_folder", lambda: built)
            return toolchain.compile_kernels(folder / file, defines, [folder, folder / "gpu"], sanitize=sanitize)

    return compile_kernels


def samples(op: Op, dtype: str) -> list[tuple[list[np.ndarray], dict[str, Any]]]:
    """The samples of an op, as arrays of a dtype hold them."""
    made = []
    for arrays, params in op.samples(np.random.default_rng(0)):
        kinds = stored_as(op, arrays, dtype)
        made.append(([np.asarray(a, kind) for a, kind in zip(arrays, kinds, strict=True)], dict(params)))
    return made


def run(op: Op, arrays: Sequence[np.ndarray], params: Mapping[str, Any]) -> None:
    """Run an op to its end. Raises KernelFault or EmulatorCrash where a kernel does what it must not."""
    backend = emulator()
    backend.run(op, *(backend.asarray(a.copy()) for a in arrays), **params)
    backend.synchronize()


def findings(ops: Sequence[Op], dtype: str, schedules: Sequence[str] = SCHEDULES) -> Iterator[list[Finding]]:
    """What is found in each run that something is found in, over the samples of these ops in these schedules.

    Notes, of what is no mistake and may point to one, are told too.
    """
    driver = emulator().emulator
    driver.notes.clear()
    inputs = [(op, arrays, params) for op in ops for arrays, params in samples(op, dtype)]
    for op, arrays, params in sorted(inputs, key=lambda one: sum(a.size for a in one[1])):
        for schedule in schedules:
            try:
                with driver.set(schedule=schedule):
                    run(op, arrays, params)
            except (KernelFault, EmulatorCrash) as error:
                yield error.findings
            if driver.notes:
                yield list(driver.notes.values())
                driver.notes.clear()


def lines_named(finding: Finding) -> set[tuple[str, int]]:
    """Every line that a finding names: of both accesses, and where inlined functions were called."""
    named = {(finding.file, finding.line), *((caller.file, caller.line) for caller in finding.callers)}
    if finding.other is not None:
        named.add((finding.other.file, finding.other.line))
    return named
