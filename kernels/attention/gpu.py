"""Attention on a GPU: the launches of gpu.cu (float32) and gpu_tensor_core.cu (16 bits), and what their tiles take."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minibert.kernels.attention import mask_width
from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for, contiguous, cuda_stream, int32, on_host
from minibert.kernels.philox import NO_STREAM, Stream, first_block, threshold

HEAD_SIZES = (32, 64, 128)  # that the kernels are compiled for; a head is padded to the next
ROWS = 64  # of a tile, as in gpu_tile.cuh and gpu_fragment.cuh
QUERIES = 32  # of a tile of gpu_tensor_core.cu where rows are keys
MOST_BLOCKS = 2**31 - 1
ROWS_OF_DELTA = 16  # in a block of flash_grad_delta

cuda = CudaFile(__file__)
variants = [{"HEAD_SIZE": size} for size in HEAD_SIZES]
flash_forward = cuda.kernel("flash_forward", block=128, variants=variants, storage=["float32"])
flash_grad_delta = cuda.kernel("flash_grad_delta", block=128)
flash_grad_query = cuda.kernel("flash_grad_query", block=128, variants=variants, storage=["float32"])
flash_grad_key_value = cuda.kernel("flash_grad_key_value", block=128, variants=variants, storage=["float32"])

NARROW = ["float16", "bfloat16"]
tensor_cores = CudaFile(__file__, "gpu_tensor_core.cu")
flash_forward_16 = tensor_cores.kernel("flash_forward_16", block=128, variants=variants, storage=NARROW)
flash_grad_query_16 = tensor_cores.kernel("flash_grad_query_16", block=128, variants=variants, storage=NARROW)
flash_grad_key_value_16 = tensor_cores.kernel("flash_grad_key_value_16", block=128, variants=variants, storage=NARROW)


class Plan(NamedTuple):
    """How one call is cut into blocks, and what all of its kernels are told."""

    rows: int
    heads: int
    size: int  # of a head
    padded: int  # the size it is padded to
    cu_seqlens: Array  # int32, on the device
    grid: int
    arguments: tuple[Any, ...]  # the last of every kernel


def attention(
    qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM
) -> tuple[Array, Array]:
    """y (N, C) as qkv (N, 3C) is stored and log sum exp (N, heads) float32; cu_seqlens (sequences + 1,).

    Raises ValueError where qkv does not split into heads of at most 128 elements, or cu_seqlens does not rise from 0
    to N.
    """
    qkv = contiguous(qkv)
    plan = _plan(qkv, cu_seqlens, num_heads, rate, stream)
    y = qkv.device.empty((plan.rows, plan.heads * plan.size), qkv.dtype)
    lse = qkv.device.empty((plan.rows, plan.heads), np.float32)
    kernel, shared = flash_forward, _shared(plan.padded, tiles_of_rows=1)
    if qkv.itemsize == 2:
        kernel, shared = flash_forward_16, _shared_16(plan.padded, tiles_of_rows=1, columns=_keys(plan.padded))
    kernel(qkv, plan.cu_seqlens, y, lse, *plan.arguments, grid=plan.grid, shared=shared, HEAD_SIZE=plan.padded)
    return y, lse


def attention_grad(
    g: Array, qkv: Array, y: Array, lse: Array, cu_seqlens: Array,
    *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM,
) -> Array:  # fmt: skip
    """The gradient of qkv (N, 3C) from that of y (N, C) and what attention returned; raises what attention does."""
    qkv = contiguous(qkv)
    plan = _plan(qkv, cu_seqlens, num_heads, rate, stream)
    wide = plan.rows, plan.heads * plan.size
    g, y = contiguous(g, wide, "g"), contiguous(y, wide, "y")
    lse = contiguous(lse, (plan.rows, plan.heads), "log sum exp")
    delta = qkv.device.empty(lse.shape, np.float32)
    dqkv = qkv.device.empty(qkv.shape, qkv.dtype)
    flash_grad_delta(g, y, delta, lse.size, plan.size, grid=blocks_for(lse.size, ROWS_OF_DELTA, qkv.device))
    arrays = g, qkv, lse, delta, plan.cu_seqlens, dqkv
    for_query, for_key_value = flash_grad_query, flash_grad_key_value
    shared = shared_for_query = _shared(plan.padded, tiles_of_rows=2)
    if qkv.itemsize == 2:
        for_query, for_key_value = flash_grad_query_16, flash_grad_key_value_16
        shared_for_query = _shared_16(plan.padded, tiles_of_rows=2, columns=_keys(plan.padded))
        shared = _shared_16(plan.padded, tiles_of_rows=2, columns=QUERIES)
    for_query(*arrays, *plan.arguments, grid=plan.grid, shared=shared_for_query, HEAD_SIZE=plan.padded)
    for_key_value(*arrays, *plan.arguments, grid=plan.grid, shared=shared, HEAD_SIZE=plan.padded)
    return dqkv


def _plan(qkv: Array, cu_seqlens: Array, heads: int, rate: float, stream: Stream) -> Plan:
    rows, columns = qkv.shape
    if heads < 1 or columns == 0 or columns % (3 * heads):
        raise ValueError(f"qkv {qkv.shape} does not split into q, k and v of {heads} heads")
    size = columns // (3 * heads)
    if size > HEAD_SIZES[-1]:
        raise ValueError(f"the CUDA kernels take heads of at most {HEAD_SIZES[-1]} elements, got {size}")
    ends = on_host(cu_seqlens).astype(np.int64).reshape(-1)
    lengths = np.diff(ends)
    if ends.size == 0 or ends[0] != 0 or ends[-1] != rows or (lengths < 0).any():
        got = np.array2string(ends, threshold=10)
        raise ValueError(f"cu_seqlens must rise from 0 to the {rows} rows of qkv, got {got}")
    quads, drop = mask_width(ends, stream) // 4, threshold(rate)
    if drop and first_block(stream) + rows * heads * quads > 2**32:
        raise ValueError(f"a stream has 2**34 random words, but {rows} rows of {heads} heads draw {4 * quads} each")
    tiles = -(-int(lengths.max(initial=0)) // ROWS)
    return Plan(
        rows,
        heads,
        size,
        padded=next(padded for padded in HEAD_SIZES if size <= padded),
        cu_seqlens=int32(cu_seqlens),
        grid=min(lengths.size * heads * tiles, MOST_BLOCKS),
        arguments=(
            lengths.size, heads, size, tiles, size**-0.5, drop, 1 / (1 - rate), quads, cuda_stream(stream)
        ),
    )  # fmt: skip


def _keys(size: int) -> int:
    """Columns of a tile where rows are queries."""
    return 64 if size <= 64 else 32


def _shared(size: int, *, tiles_of_rows: int) -> int:
    """Bytes of shared memory in float32: two tiles of columns, one of scores, and two numbers of each column."""
    columns = _keys(size)
    return 4 * ((tiles_of_rows * ROWS + 2 * columns) * (size + 4) + ROWS * (columns + 4) + 2 * columns)


def _shared_16(size: int, *, tiles_of_rows: int, columns: int) -> int:
    """Bytes of shared memory in 16 bits: two tiles of columns, two numbers of each, and the same for the next."""
    return 2 * (tiles_of_rows * ROWS + 4 * columns) * (size + 8) + 4 * 4 * columns
