"""Attention on a GPU, right and with one mistake each: the kernels of attention.cu, and how they are launched."""

from collections.abc import Callable

import numpy as np

from minibert.kernels.attention import mask_width
from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for, contiguous, cuda_stream, int32, on_host
from minibert.kernels.philox import NO_STREAM, Stream, threshold

cuda = CudaFile(__file__, "attention.cu")
LONGEST = 256  # keys whose scores a kernel holds that has too little room
TILE = 16  # keys that another kernel takes at a time


def attention_by(name: str, longest: int | None = None) -> Callable[..., tuple[Array, Array]]:
    """Attention by the kernel of that name, with room for the scores of the longest sequence, or for `longest`."""
    kernel = cuda.kernel(name, block=64)

    def attention(
        qkv: Array, cu_seqlens: Array, *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM
    ) -> tuple[Array, Array]:
        rows, columns = qkv.shape[0], qkv.shape[1] // 3
        y, lse = qkv.device.empty((rows, columns), qkv.dtype), qkv.device.empty((rows, num_heads), "float32")
        ends = on_host(cu_seqlens).astype(np.int64)
        size, room = columns // num_heads, 4 * (longest or int(np.diff(ends).max(initial=0)) + TILE)
        numbers = rows, len(ends) - 1, num_heads, size, mask_width(ends), size**-0.5
        dropout = threshold(rate), 1 / (1 - rate), cuda_stream(stream)
        grid = blocks_for(rows * num_heads, 1, qkv.device)
        kernel(contiguous(qkv), int32(cu_seqlens), y, lse, *numbers, *dropout, grid=grid, shared=room)
        return y, lse

    return attention


right_attention = attention_by("right")
neighbours_elements = attention_by("neighbours_elements")
whole_packs = attention_by("whole_packs")
first_256_keys = attention_by("first_256_keys", LONGEST)
maximum_from_zero = attention_by("maximum_from_zero")
whole_tiles = attention_by("whole_tiles")
first_sequence_there = attention_by("first_sequence_there")
ten_bits = attention_by("ten_bits")
no_barrier = attention_by("no_barrier")
