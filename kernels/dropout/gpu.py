"""dropout on CUDA: one pass over the elements, each with the random word of its own place in the stream."""

from __future__ import annotations

from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for, contiguous, cuda_stream
from minibert.kernels.philox import Stream, threshold

BLOCK = 256
BYTES = 32  # of x that a thread moves in one turn of its loop: PACKS packs of 16

cuda = CudaFile(__file__)
dropout_each = cuda.kernel("dropout", block=BLOCK)


def dropout(x: Array, *, rate: float, stream: Stream) -> Array:
    limit = threshold(rate)
    if rate == 0:
        return x
    x = contiguous(x)
    y = x.device.empty(x.shape, x.dtype)
    grid = blocks_for(x.size, BLOCK * BYTES // x.itemsize, x.device)
    dropout_each(x, y, x.size, limit, 1 / (1 - rate), cuda_stream(stream), grid=grid)
    return y
