"""The same bits wherever arrays lie in memory, and whatever this process compiled or loaded before.

LLVM compiles a loop that reads one array and stores into another twice: on vectors, and one by one for arrays so close
together that they may overlap. Where an array lies changes from call to call, so both must round alike. A process that
never takes the vectors of such loops is compared with one that takes them when it can.

That process compiles all kernels into an empty cache, and trains. Two others load what it compiled, one of them in
the opposite order: a function that several kernels call must not run in one kernel as it was compiled for another.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from llvmlite.binding import Linkage
from numba import njit
from safetensors.numpy import load_file

from minibert import backends
from minibert.cli import main
from minibert.data import SHIPPED_TEXT, SHIPPED_VOCABULARY
from minibert.kernels import OPS
from minibert.kernels.cpu import jit as cpu_jit
from minibert.kernels.cpu.jit import KERNEL_FLAGS, OPTIONS, jit, on_compile
from minibert.kernels.cross_entropy.cpu import cross_entropy_rows
from minibert.kernels.op import outputs

ONE_BY_ONE = "-vectorize-memory-check-threshold=0"  # no loop is worth a test for overlap
ONWARD, BACKWARD = 1, -1  # the order in which a process comes to what it compiles or loads
CHILD = """
import sys
import llvmlite.binding as llvm
if sys.argv[3]:
    llvm.set_option("minibert", sys.argv[3])
from tests.kernels import test_overlap
test_overlap.save_all(test_overlap.Path(sys.argv[1]), int(sys.argv[2]))
"""
Arrays = dict[str, np.ndarray]


# --- what is compared ------------------------------------------------------------------------------------------------


def kernel_outputs(order: int = ONWARD) -> Arrays:
    """Of every kernel of the numba backend on the samples of its op, in float32."""
    backend, found = backends.get("numba"), {}
    for op in list(OPS.values())[::order]:
        if backend.kernel(op) is None:
            continue
        for number, (arrays, params) in enumerate(op.samples(np.random.default_rng(0))):
            given = [x.astype(np.float32) if x.dtype.kind == "f" else x.copy() for x in map(np.asarray, arrays)]
            results = [*outputs(backend.run(op, *given, **params)), *(given[i] for i in op.writes)]
            for place, result in enumerate(results):
                if result is not None:
                    found[f"{op.name} sample {number} output {place}"] = result
    return found


def either_output() -> Arrays:
    """What a loop gives that sums and stores into another array: on vectors it adds in another order."""

    @njit(fastmath=KERNEL_FLAGS, **OPTIONS)
    def sum_squares(x, y):  # type: ignore[no-untyped-def]
        total = np.float32(0)
        for j in range(x.size):
            square = x[j] * x[j]
            y[j] = square
            total += square
        return total

    x = np.random.default_rng(0).standard_normal((20, 3000), np.float32)
    return {"totals": np.array([sum_squares(row, np.empty_like(row)) for row in x])}


def numbas_output() -> Arrays:
    """What a kernel that calls another gives, compiled and kept by Numba as it comes."""
    kernel = njit(fastmath=KERNEL_FLAGS, cache=True, **OPTIONS)(cross_entropy_rows.py_func)
    logits = np.random.default_rng(0).standard_normal((40, 1000), np.float32)
    losses, dlogits = np.empty(len(logits)), np.empty_like(logits)
    kernel(logits, np.arange(len(logits)), len(logits), losses, dlogits, 0, len(logits))
    return {"losses": losses, "dlogits": dlogits}


def trained_weights(folder: Path) -> Arrays:
    """Of two runs of 20 steps, without --deterministic and with it."""
    text, found = folder / "text.txt", {}
    text.write_text(SHIPPED_TEXT.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    sizes = ["--layers", 1, "--hidden", 64, "--max-seq-length", 32, "--tokens-per-batch", 128, "--steps", 20]
    for mode in ([], ["--deterministic"]):
        output = folder / "".join(["run", *mode])
        words = [text, "--output", output, "--tokenizer", SHIPPED_VOCABULARY, "--backend", "numba", *sizes, *mode]
        sys.argv = ["minibert", "pretrain", *map(str, words)]
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code in (0, None)
        found |= {f"{output.name} {name}": weight for name, weight in load_file(output / "model.safetensors").items()}
    return found


def save_all(folder: Path, order: int) -> None:
    """Into a new folder, with the names of the kernels that were compiled for it."""
    folder.mkdir()
    made = {
        "weights": lambda: trained_weights(folder),
        "kernels": lambda: kernel_outputs(order),
        "numbas": numbas_output,
        "either": either_output,
    }
    compiled: list[str] = []
    with on_compile(lambda compilation: compiled.append(compilation.name)):
        for name, make in list(made.items())[::order]:
            np.savez(folder / f"{name}.npz", **make())
    (folder / "compiled").write_text(" ".join(compiled))


# --- the processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what four processes gave: `here`, on whatever cache, `compiled`, and `loaded` and `loaded_backward`."""
    folder = tmp_path_factory.mktemp("processes")

    @contextmanager
    def process(name, order=ONWARD, option=""):  # type: ignore[no-untyped-def]
        environment = {**os.environ, "PYTHONPATH": str(root), "MINIBERT_CACHE_DIR": str(folder / "cache")}
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder / name), str(order), option],
            env={**environment, "NUMBA_CACHE_DIR": str(folder / "cache of Numba's")},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        yield
        said, _ = child.communicate(timeout=600)
        assert child.returncode == 0, said

    with process("compiled", option=ONE_BY_ONE):
        (folder / "here").mkdir()
        np.savez(folder / "here" / "kernels.npz", **kernel_outputs())
        np.savez(folder / "here" / "either.npz", **either_output())
    with process("loaded"), process("loaded_backward", BACKWARD):
        pass
    return folder


def differences(folder: Path, what: str, first: str, second: str) -> tuple[list[str], int]:
    """Names of arrays that differ in a bit between two processes, and of how many."""
    with np.load(folder / first / f"{what}.npz") as one, np.load(folder / second / f"{what}.npz") as other:
        assert set(one.files) == set(other.files)
        return [n for n in one.files if one[n].tobytes() != other[n].tobytes()], len(one.files)


# --- tests -----------------------------------------------------------------------------------------------------------


def test_every_kernel_rounds_alike_whether_arrays_lie_close_together_or_not(folder: Path) -> None:
    different, count = differences(folder, "kernels", "here", "compiled")
    assert count > 300
    assert different == []


def test_a_loop_that_rounds_in_two_ways_is_noticed(folder: Path) -> None:
    assert differences(folder, "either", "here", "compiled") == (["totals"], 1)


@pytest.mark.parametrize("process", ["loaded", "loaded_backward"])
@pytest.mark.parametrize(("what", "least"), [("kernels", 300), ("weights", 50)])
def test_a_process_that_loads_its_code_gives_the_bits_of_the_one_that_compiled_it(
    folder: Path, what: str, least: int, process: str
) -> None:
    assert len((folder / "compiled" / "compiled").read_text().split()) > 30
    assert (folder / process / "compiled").read_text() == ""
    different, count = differences(folder, what, "compiled", process)
    assert count >= least
    assert different == []


def test_a_kernel_that_runs_a_copy_compiled_for_another_is_noticed(folder: Path) -> None:
    different, _ = differences(folder, "numbas", "compiled", "loaded")
    if not different:
        pytest.skip("compiled for this processor, the copies of the function that two kernels call round alike")
    assert "dlogits" in different


def test_no_function_in_the_code_of_a_kernel_can_run_in_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_jit, "_cache", None)  # code that is loaded from disk shows nothing

    @jit
    def add_dot(x, y):  # type: ignore[no-untyped-def]
        for j in range(x.size):
            y[0] += x[j] * x[j]
        for j in range(x.size):
            y[j] += x[j] * y[0]

    @jit
    def call_twice(x, y, start, stop):  # type: ignore[no-untyped-def]
        for i in range(start, stop):
            add_dot(x[i], y[i])
            add_dot(y[i], y[i])

    def address(kernel):  # type: ignore[no-untyped-def]
        (compiled,) = kernel.overloads.values()
        return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)

    x, y = np.ones((2, 3, 100), np.float32)
    add_dot(x[0], y[0])
    before = address(add_dot)
    call_twice(x, y, 0, 3)
    assert address(add_dot) == before != address(call_twice)
    (compiled,) = call_twice.overloads.values()
    linkage = {function.name: function.linkage for function in compiled.library.get_defined_functions()}
    assert [kind for name, kind in linkage.items() if "add_dot" in name] == [Linkage.private]
    named = [name for name, kind in linkage.items() if kind is not Linkage.private]
    assert named and all("call_twice" in name for name in named)
