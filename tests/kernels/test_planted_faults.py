"""Faults planted in the project's own kernels, one at a time: the emulator names each, and lets unbroken kernels be.

A fault is text of a kernel's source that is replaced. The line that must be named is told by a fragment of the source,
so that kernels may be edited freely; where an edit removes what a fault replaces, the fault is to be planted elsewhere.
"""

from __future__ import annotations

import pytest

from minibert.kernels import OPS
from minibert.lab.conform.check import run_check
from tests.planted import BLOCK_SUM, KERNELS, Fault, emulator, findings, lines_named, planted, source

LAST_BARRIER_OF_MAX = "    __syncthreads();\n    float top = scratch[0];"
READ_PACK = "pack.bits = *reinterpret_cast<const uint4*>(p);"

FAULTS = (
    # ---------------------------------------------------------------------------------------------- out of bounds
    Fault(
        "all elements one place further", "view/gpu.cu", "concatenate",
        "source = 0, target = 0;", "source = 0, target = 1;",
        "out of bounds", at="to[target] = from[source];",
    ),
    Fault(
        "one element past what packs leave over", "gpu/gpu_packs.cuh", "relu",
        "i < count; i += threads) store(y + i, f(load(x + i)));",
        "i <= count; i += threads) store(y + i, f(load(x + i)));",
        "out of bounds",
    ),
    Fault(
        "one label past the last", "cross_entropy/gpu.cu", "cross_entropy",
        "row < rows && labels[row] != ignored", "row <= rows && labels[row] != ignored",
        "out of bounds",
    ),
    Fault(
        "one row past the end of a table", "embedding/gpu.cu", "embedding",
        "row_of(token_type, token_type_ids[row], columns)", "row_of(token_type, token_type_ids[row] + 1, columns)",
        "out of bounds", at="store(out + j, load(first + j) + load(second + j) + load(third + j));",
    ),
    Fault(
        "rows after the last one are read", "softmax/gpu.cu", "softmax",
        "first + r < rows ? columns : 0;  // of a row after the last one: nothing", "columns;",
        "out of bounds", at="i < left ? p[i] : from_float<Storage>(fill);", where="gpu/gpu_rows.cuh",
    ),
    Fault(
        "a pack past the end of a row is written", "gpu/gpu_rows.cuh", "softmax",
        "if (left > 0) store_pack(p, values);", "store_pack(p, values);",
        "out of bounds",
    ),
    Fault(
        "rows that are no multiple of a pack are read in packs", "gpu/gpu_common.cuh", "softmax",
        "return columns % PACK == 0 && all % 16 == 0;", "return all % 16 == 0;",
        "out of bounds", at=READ_PACK, where="gpu/gpu_packs.cuh",
    ),
    Fault(
        "packs after the last one are written", "dropout/gpu.cu", "dropout",
        "if (i >= packs) break;", "",
        "out of bounds", at="write_pack(y + i * PACK, pack[p]);",
    ),
    Fault(
        "rows that the sequence lacks are read", "attention/gpu_tile.cuh", "attention",
        "if (row < count && column < size) load_pack(from, values);", "if (column < size) load_pack(from, values);",
        "out of bounds",
    ),
    Fault(
        "a null pointer is read", "layer_norm/gpu.cu", "layer_norm",
        "if (residual == nullptr) return;", "",
        "out of bounds", at="load_part(residual + first, left, aligned, 0.0f, added);",
    ),
    Fault(
        "static shared memory for one warp too few", "adamw/gpu.cu", "square_norm",
        "scratch[NORM_THREADS / WARP];", "scratch[NORM_THREADS / WARP - 1];",
        "out of bounds", at="total += value * value;\n        }\n        total = block_sum(total, scratch);",
    ),
    Fault(
        "too little dynamic shared memory", "attention/gpu.py", "attention_grad",
        "+ ROWS * (columns + 4) + 2 * columns)", "+ ROWS * (columns + 4))",
        "out of bounds", at="load_number(to, call.lse", where="attention/gpu_flash.cuh",
    ),
    Fault(
        "memory is given back before its kernel has run", "adamw/gpu.py", "square_norm",
        "square_norm_chunks(x, partial, x.size",
        "from minibert.kernels.gpu.launch import Raw\n"
        "    square_norm_chunks(x, Raw(device.empty((chunks,), np.float32).address), x.size",
        "use of freed memory", at="partial[chunk] = total;", where="adamw/gpu.cu",
    ),
    # ---------------------------------------------------------------------------------------------- uninitialised
    Fault(
        "both tiles are copied to one place", "attention/gpu_flash.cuh", "attention_grad",
        "place = next / COLUMNS % STAGES;", "place = 0;",
        "uninitialised read", at="load_matrices(y, b + n * 8 * PITCH + d);", where="attention/gpu_fragment.cuh",
        dtype="float16",
    ),
    Fault(
        "only the first warp writes its sum", "gpu/gpu_common.cuh", "square_norm",
        BLOCK_SUM, BLOCK_SUM.replace("threadIdx.x % WARP", "threadIdx.x"),
        "uninitialised read", at="total += scratch[warp];",
    ),
    Fault(
        "the loss of an ignored row is not written", "cross_entropy/gpu.cu", "cross_entropy",
        "if (threadIdx.x == 0) losses[row] = 0;", "",
        "uninitialised read", at="total += losses[row];",
    ),
    Fault(
        "sums of no rows yet are read", "layer_norm/gpu.cu", "layer_norm_grad",
        "int known = row > first ? left : 0;", "int known = left;",
        "uninitialised read", at="values[i] = i < left ? p[i] : 0.0f;",
    ),
    # -------------------------------------------------------------------------------------------------- alignment
    Fault(
        "packs from the row's first element on", "cross_entropy/gpu.cu", "cross_entropy",
        "const int singles = (16 - offset) % 16 / static_cast<int>(sizeof(Storage));", "const int singles = 0;",
        "misaligned access", at=READ_PACK, where="gpu/gpu_common.cuh",
    ),
    Fault(
        "packs in rows that begin between them", "elementwise/gpu.cu", "add",
        "return aligned && (rows == 1 || inner % PACK == 0) ?", "return aligned ?",
        "misaligned access", at="if (step != 0) return read_pack(row + j);",
    ),
    Fault(
        "rows of a tile begin between packs", "attention/gpu_fragment.cuh", "attention",
        "constexpr int PITCH = HEAD_SIZE + 8;", "constexpr int PITCH = HEAD_SIZE + 4;",
        "misaligned access", at="copy_async<16>(tile + row * PITCH + column,", dtype="float16",
    ),
    # ------------------------------------------------------------------------------------- races within a block
    Fault(
        "warps add to one number", "gpu/gpu_common.cuh", "square_norm",
        BLOCK_SUM,
        "    if (threadIdx.x == 0) scratch[0] = 0;\n"
        "    __syncthreads();\n"
        "    if (threadIdx.x % WARP == 0) scratch[0] += x;\n"
        "    float total = 0;\n",
        "race", at="scratch[0] += x;",
    ),
    Fault(
        "threads count in memory", "cross_entropy/gpu.cu", "cross_entropy",
        "count += __syncthreads_count(row < rows && labels[row] != ignored);",
        "if (row < rows && labels[row] != ignored) *kept += 1;",
        "race",
    ),
    Fault(
        "every thread writes the loss", "cross_entropy/gpu.cu", "cross_entropy",
        "if (threadIdx.x == 0) *loss =", "*loss =",
        "same value written",
    ),
    Fault(
        "one buffer instead of two", "layer_norm/gpu.cu", "layer_norm_grad",
        "turn = 1 - turn;", "",
        "race", at="shared[turn][warp][j] = total[j];",
    ),
    Fault(
        "warps write to one row of shared memory", "layer_norm/gpu.cu", "layer_norm_grad",
        "shared[warp][lane] = total;", "shared[0][lane] = total;",
        "race",
    ),
    Fault(
        "all lanes that share a column write it", "embedding/gpu.cu", "scatter_rows",
        "if (share == 0 && column < columns) store(", "if (column < columns) store(",
        "same value written",
    ),
    Fault(
        "single columns are written as packs", "embedding/gpu.cu", "scatter_rows",
        "if (i < width) out[i] = total[i];", "out[i] = total[i];",
        "race",
    ),
    Fault(
        "what packs have done is done again", "adamw/gpu.cu", "adamw",
        "for (long long at = packs * PACK + thread; at", "for (long long at = thread; at",
        "race", at="float p = param[at], m = exp_avg[at], v = exp_avg_sq[at];",
    ),
    Fault(
        "the next tile comes before the last is read", "attention/gpu_flash.cuh", "attention",
        "__syncthreads();  // before the next tile, or the next item's rows, take the place of these", "",
        "race", at="Scores<KEYS> scores;\n        dot_rows(tiles.rows, tiles.columns, columns, scores);",
    ),
    # ------------------------------------------------------------------------------------- races between blocks
    Fault(
        "two blocks write one partial sum", "adamw/gpu.cu", "square_norm",
        "partial[chunk] = total;", "partial[chunk / 2] = total;",
        "race",
    ),
    Fault(
        "all parts of a column go to its first", "reduction/gpu.cu", "reduce_sum",
        "y[part * columns + left + own] =", "y[left + own] =",
        "race",
    ),
    Fault(
        "each block does all rows", "embedding/gpu.cu", "gather_rows",
        "return blockIdx.x * WARPS + threadIdx.x / WARP;", "return threadIdx.x / WARP;",
        "same value written", at="store(out + j, from == skip ? 0.0f : load(in + j));",
    ),
    # --------------------------------------------------------------------------------------- warps and barriers
    Fault(
        "a mask of half a warp", "gpu/gpu_common.cuh", "softmax",
        "x += __shfl_xor_sync(ALL_LANES, x, offset)", "x += __shfl_xor_sync(0xffffu, x, offset)",
        "wrong warp mask",
    ),
    Fault(
        "lanes that were not named wait too", "attention/gpu_tile.cuh", "attention_grad",
        "    __syncwarp();  // what the others read is there", "    __syncwarp(0x0000ffffu);",
        "wrong warp mask",
    ),
    Fault(
        "a lane is read that takes no part", "gpu/gpu_common.cuh", "softmax",
        "x += __shfl_xor_sync(ALL_LANES, x, offset)",
        "if (threadIdx.x % WARP < 16) x += __shfl_xor_sync(0xffffu, x, offset)",
        "shuffle from an inactive lane",
    ),
    Fault(
        "lanes have gone before the shuffle", "attention/gpu.cu", "attention_grad",
        "        sum = row_sum(sum);", "        if (row < rows) sum = row_sum(sum);",
        "wrong warp mask",
    ),
    Fault(
        "a shuffle in a branch that some lanes take", "embedding/gpu.cu", "scatter_rows",
        "total += __shfl_xor_sync(ALL_LANES, total, COLUMNS);",
        "if (column < columns) total += __shfl_xor_sync(ALL_LANES, total, COLUMNS);",
        "divergent warp collective",
    ),
    Fault(
        "a barrier in each branch", "gpu/gpu_common.cuh", "softmax",
        LAST_BARRIER_OF_MAX,
        "    if (threadIdx.x < WARP) __syncthreads();\n    else __syncthreads();\n    float top = scratch[0];",
        "divergent barrier", at="else __syncthreads();",
    ),
    Fault(
        "threads return before a barrier", "reduction/gpu.cu", "reduce_sum",
        "y[part * columns + left + own] = from_float<Y>(total);\n        }",
        "y[part * columns + left + own] = from_float<Y>(total);\n        } else return;",
        "exited before barrier", at="__syncthreads();  // the tile before has been read",
    ),
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_the_emulator_names_the_line(fault: Fault) -> None:
    where, line = fault.line()
    told: list[str] = []
    with fault.planted() as copy:
        folder = KERNELS if fault.file.endswith(".py") else copy.folder  # where it is compiled
        for found in findings([OPS[fault.op]], fault.dtype):
            if any(f.kind == fault.found and (str(folder / where), line) in lines_named(f) for f in found):
                return
            told += map(str, found)
    pytest.fail(f"expected {fault.found} at {where}:{line}; found\n" + "\n".join(dict.fromkeys(told)))


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
def test_nothing_is_found_in_unbroken_kernels(dtype: str) -> None:
    """Every sample of every op that has a kernel, in three schedules, which must not change a bit either."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    assert emulator().emulator.settings.sanitize
    ops = [op for op in OPS.values() if emulator().by(op) == "kernel"]
    results = [run_check("order_of_work", op, emulator(), dtype) for op in ops]
    assert not [result.message for result in results if not result.ok]
    assert len(ops) > 25 and all(result.inputs for result in results)


def test_a_copy_without_a_fault_is_the_kernel() -> None:
    with planted("gpu/gpu_common.cuh", source("gpu/gpu_common.cuh")):
        result = run_check("follows_formula", OPS["softmax"], emulator(), "float32")
    assert result.ok, result.message
