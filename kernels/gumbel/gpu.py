"""gumbel on CUDA: one pass over the elements, four to a thread, each with the random word of its own place."""

from __future__ import annotations

import numpy as np

from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for, contiguous, cuda_stream
from minibert.kernels.philox import Stream

BLOCK = 256
EACH = 4  # elements of a thread in one turn of its loop

cuda = CudaFile(__file__)
gumbel_each = cuda.kernel("gumbel", block=BLOCK)


def gumbel(x: Array, *, stream: Stream) -> Array:
    x = contiguous(x)
    y = x.device.empty(x.shape, np.float32)
    gumbel_each(x, y, x.size, cuda_stream(stream), grid=blocks_for(x.size, BLOCK * EACH, x.device))
    return y
