"""Faults planted in the project's own kernels that a launch is refused for, or that checks of numbers notice.

What a launch passes is held against the kernel's signature before it starts; what the emulator sees nothing wrong with
is left to minibert.lab.conform.check. Faults are written as in test_planted_faults.py.
"""

from __future__ import annotations

import traceback

import pytest

from minibert.backends.emulator.process import EmulatorCrash
from minibert.errors import UserError
from minibert.kernels import OPS
from minibert.lab.conform.check import run_check
from tests.planted import BLOCK_SUM, Fault, emulator, findings, planted, replaced, run, samples, source

REFUSED = (
    Fault(
        "arguments in the wrong order", "cross_entropy/gpu.py", "cross_entropy",
        "mean_loss(losses, kept, loss", "mean_loss(kept, losses, loss",
        "losses takes float32, got int32",
    ),
    Fault(
        "float64 for float32", "adamw/gpu.py", "square_norm",
        "partial = device.empty((chunks,), np.float32)", "partial = device.empty((chunks,), np.float64)",
        "partial takes float32, got float64", at="square_norm_chunks(x, partial,",
    ),
    Fault(
        "a number that int does not hold", "softmax/gpu.py", "softmax",
        "kernel(*arrays, rows, columns,", "kernel(*arrays, rows + 2**32, columns,",
        "is no int",
    ),
    Fault(
        "a quotient for an int", "softmax/gpu.py", "softmax",
        "rows = like.size // max(1, columns)", "rows = like.size / max(1, columns)",
        "rows takes int, got float", at="kernel(*arrays, rows, columns,",
    ),
    Fault(
        "one argument too few", "reduction/gpu.py", "reduce_sum",
        "row_sums(x, total, rows, columns,", "row_sums(x, total, rows,",
        r"takes 4 arguments \(x, y, rows, columns\), got 3",
    ),
    Fault(
        "a view with gaps", "adamw/gpu.py", "square_norm",
        "x, device = contiguous(x), x.device", "x, device = x[::2], x.device",
        "x must be contiguous", at="square_norm_chunks(x, partial,",
    ),
    Fault(
        "arrays of two storage types", "activation/gpu.py", "relu",
        "y = x.device.empty(x.shape, x.dtype)", 'y = x.device.empty(x.shape, "float32")',
        "y is float32, but the Storage before it float16", at="kernel(*arrays, y,", dtype="float16",
    ),
    Fault(
        "an array of the host", "cross_entropy/gpu.py", "cross_entropy",
        "count_kept(labels,", "count_kept(labels.host,",
        "labels is a pointer: expected a device array, got ndarray",
    ),
    Fault(
        "a tuple for a struct", "dropout/gpu.py", "dropout",
        "cuda_stream(stream), grid", "stream, grid",
        "stream takes Stream as bytes",
    ),
    Fault(
        "more threads than the kernel allows", "softmax/gpu.py", "softmax",
        'cuda.kernel("softmax_warp", block=256)', 'cuda.kernel("softmax_warp", block=512)',
        "a block of 512 threads, but it allows 256",
    ),
    Fault(
        "a kernel that the file lacks", "view/gpu.py", "transpose",
        'cuda.kernel(f"copy_{size}"', 'cuda.kernel(f"copy{size}"',
        "has no kernel 'copy1'",
    ),
    Fault(
        "a variant that was not declared", "attention/gpu.py", "attention",
        'for size in HEAD_SIZES]', 'for size in HEAD_SIZES[1:]]',
        "no variant {'HEAD_SIZE': 32}", at="kernel(qkv, plan.cu_seqlens, y, lse,",
    ),
)  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED, ids=str)
def test_a_launch_is_refused(fault: Fault) -> None:
    where, line = fault.line()
    with pytest.raises((TypeError, ValueError), match=fault.found) as raised, fault.planted():
        for arrays, params in samples(OPS[fault.op], fault.dtype):
            run(OPS[fault.op], arrays, params)
    lines = [frame.lineno for frame in traceback.extract_tb(raised.tb) if frame.filename.endswith(f"/kernels/{where}")]
    assert lines[-1] == line, f"expected line {line} of {where}, got {lines}"


def test_more_shared_memory_than_a_block_has_is_refused() -> None:
    launch = "kernel(qkv, plan.cu_seqlens, y, lse, *plan.arguments, grid=plan.grid, shared="
    text = replaced(source("attention/gpu.py"), f"{launch}shared,", f"{launch}1 << 18,")
    with planted("attention/gpu.py", text) as copy, emulator().using({OPS["attention"]: copy.kernel(OPS["attention"])}):
        arrays, params = samples(OPS["attention"], "float32")[0]
        with pytest.raises(UserError, match="262144 bytes of shared memory: a block has at most"):
            run(OPS["attention"], arrays, params)


def test_a_kernel_without_an_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    text = replaced(source("embedding/gpu.cu"), "return gridDim.x * WARPS;", "return 0;")
    arrays, params = samples(OPS["gather_rows"], "float32")[0]
    process = emulator().emulator.process
    process.close()  # what it waits for is settled when it starts
    monkeypatch.setattr(process, "timeout", 1.0)
    said = r"gather_rows: kernel gather_warp did not finish in 1 s .* goes round in (embedding|gpu)/gpu\S+:\d+"
    with planted("embedding/gpu.cu", text), pytest.raises(EmulatorCrash, match=said):
        run(OPS["gather_rows"], arrays, params)
    monkeypatch.undo()
    run(OPS["gather_rows"], arrays, params)  # by the next process


WRONG = (
    Fault(
        "rows for columns", "softmax/gpu.py", "softmax",
        "kernel(*arrays, rows, columns,", "kernel(*arrays, columns, rows,",
        "follows_formula",
    ),
    Fault(
        "the result in place of the input", "softmax/gpu.py", "softmax",
        "y = x.device.empty(x.shape, x.dtype)", "y = x",
        "inputs_left_alone",
    ),
    Fault(
        "a constant of fewer digits", "activation/gpu_gelu.cuh", "gelu",
        "CUBIC = 0.044715f", "CUBIC = 0.0447f",
        "follows_formula",
    ),
    Fault(
        "kept elements that are not scaled", "dropout/gpu.cu", "dropout",
        "limit ? load(x + i) * scale : 0", "limit ? load(x + i) : 0",
        "follows_formula",
    ),
    Fault(
        "a mean over one column more", "layer_norm/gpu.cu", "layer_norm",
        "float row_mean = warp_sum(total) / columns;", "float row_mean = warp_sum(total) / (columns + 1);",
        "follows_formula",
    ),
    Fault(
        "values of the first tile for all keys", "attention/gpu_flash.cuh", "attention",
        "KEYS * PITCH, columns, tiles.scratch, sums);", "KEYS * PITCH, start > 0 ? 0 : columns, tiles.scratch, sums);",
        "follows_formula",
    ),
    Fault(
        "a sum in the order in which warps come", "gpu/gpu_common.cuh", "square_norm",
        BLOCK_SUM,
        "    if (threadIdx.x == 0) scratch[0] = 0;\n"
        "    __syncthreads();\n"
        "    if (threadIdx.x % WARP == 0) atomicAdd(scratch, x);\n"
        "    __syncthreads();\n"
        "    return scratch[0];\n"
        "    float total = 0;\n",
        "order_of_work",
    ),
)  # fmt: skip


@pytest.mark.parametrize("fault", WRONG, ids=str)
def test_a_check_notices(fault: Fault) -> None:
    with fault.planted():
        result = run_check(fault.found, OPS[fault.op], emulator(), fault.dtype)
    assert not result.ok, "no check noticed"
    assert "raised" not in result.message, f"the emulator saw something before the check did: {result.message}"


def test_atomics_are_no_race() -> None:
    """The fault above is one of order alone: it races with nothing and has the right sum."""
    fault = WRONG[-1]
    with fault.planted():
        assert run_check("follows_formula", OPS[fault.op], emulator(), fault.dtype).ok
        assert list(findings([OPS[fault.op]], fault.dtype)) == []
