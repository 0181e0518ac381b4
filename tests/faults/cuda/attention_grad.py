"""The gradient of attention on a GPU, right and with one mistake each: attention_grad.cu, and how it is launched."""

from collections.abc import Callable

import numpy as np

from minibert.kernels.attention import mask_width
from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for, contiguous, cuda_stream, int32, on_host
from minibert.kernels.philox import NO_STREAM, Stream, threshold

cuda = CudaFile(__file__, "attention_grad.cu")
BYTES_OF_A_ROW = 8  # of shared memory


def gradient_by(name: str) -> Callable[..., Array]:
    """The gradient of attention by the kernel of that name."""
    kernel = cuda.kernel(name, block=64)

    def attention_grad(
        g: Array, qkv: Array, y: Array, lse: Array, cu_seqlens: Array,
        *, num_heads: int, rate: float = 0.0, stream: Stream = NO_STREAM,
    ) -> Array:  # fmt: skip
        dqkv = qkv.device.zeros(qkv.shape, qkv.dtype)
        ends, rows = on_host(cu_seqlens).astype(np.int64), len(qkv)
        size = qkv.shape[1] // 3 // num_heads
        arrays = (*map(contiguous, (g, qkv, y, lse)), int32(cu_seqlens), dqkv)
        numbers = rows, num_heads, size, mask_width(ends), size**-0.5
        dropout = threshold(rate), 1 / (1 - rate), cuda_stream(stream)
        room = BYTES_OF_A_ROW * max(1, int(np.diff(ends).max(initial=0)))
        kernel(*arrays, *numbers, *dropout, grid=blocks_for(rows * num_heads, 1, qkv.device), shared=room)
        return dqkv

    return attention_grad


right_attention_grad = gradient_by("right")
without_delta = gradient_by("without_delta")
without_scale = gradient_by("without_scale")
mask_of_the_key = gradient_by("mask_of_the_key")
added_by_queries = gradient_by("added_by_queries")
