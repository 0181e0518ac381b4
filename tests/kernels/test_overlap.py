"""The same bits wherever arrays lie in memory.

LLVM compiles a loop that reads one array and stores into another twice: on vectors, and one by one for arrays so close
together that they may overlap. Where an array lies changes from call to call, so both must round alike. A process that
never takes the vectors of such loops is compared with one that takes them when it can.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
from numba import njit

from minibert import backends
from minibert.kernels import OPS
from minibert.kernels.cpu.jit import KERNEL_FLAGS, OPTIONS
from minibert.kernels.op import outputs

ONE_BY_ONE = "-vectorize-memory-check-threshold=0"  # no loop is worth a test for overlap
CHILD = """
import sys
import llvmlite.binding as llvm
llvm.set_option("minibert", sys.argv[1])
from tests.kernels import test_overlap
getattr(test_overlap, sys.argv[2])(sys.argv[3])
"""


def save_outputs(file: str | Path) -> None:
    """Of every kernel of the numba backend on the samples of its op, in float32."""
    backend, found = backends.get("numba"), {}
    for op in OPS.values():
        if backend.kernel(op) is None:
            continue
        for number, (arrays, params) in enumerate(op.samples(np.random.default_rng(0))):
            given = [x.astype(np.float32) if x.dtype.kind == "f" else x.copy() for x in map(np.asarray, arrays)]
            results = [*outputs(backend.run(op, *given, **params)), *(given[i] for i in op.writes)]
            for place, result in enumerate(results):
                if result is not None:
                    found[f"{op.name} sample {number} output {place}"] = result
    np.savez(file, **found)


def save_either(file: str | Path) -> None:
    """What a loop gives in which one version alone multiplies and adds at once."""

    @njit(fastmath=KERNEL_FLAGS, **OPTIONS)
    def add_kept(x, words, residual, y, scale):  # type: ignore[no-untyped-def]
        for j in range(x.size):
            y[j] = (x[j] * scale if words[j] >= 1 << 30 else np.float32(0)) + residual[j]

    rng = np.random.default_rng(0)
    x, residual = rng.standard_normal((2, 3000), np.float32)
    y = np.empty_like(x)
    add_kept(x, rng.integers(0, 1 << 32, 3000, np.uint32), residual, y, np.float32(1 / 0.9))
    np.savez(file, y=y)


def differences(root: Path, folder: Path, what: str) -> tuple[list[str], int]:
    """Names of arrays that differ in a bit between the two processes, and of how many."""
    environment = {**os.environ, "PYTHONPATH": str(root), "MINIBERT_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", CHILD, ONE_BY_ONE, what, str(folder / "one_by_one.npz")]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    globals()[what](folder / "here.npz")
    said, _ = child.communicate()
    assert child.returncode == 0, said
    with np.load(folder / "here.npz") as here, np.load(folder / "one_by_one.npz") as there:
        assert here.files == there.files
        return [n for n in here.files if here[n].tobytes() != there[n].tobytes()], len(here.files)


def test_every_kernel_rounds_alike_whether_arrays_lie_close_together_or_not(root: Path, tmp_path: Path) -> None:
    different, count = differences(root, tmp_path, "save_outputs")
    assert count > 300
    assert different == []


def test_a_loop_that_rounds_in_two_ways_is_noticed(root: Path, tmp_path: Path) -> None:
    if not llvm.get_host_cpu_features().get("fma"):
        pytest.skip("this processor has no fused multiply-add")
    assert differences(root, tmp_path, "save_either") == (["y"], 1)
