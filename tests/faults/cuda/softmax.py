"""Softmax on a GPU, right and with one mistake each: the kernels of softmax.cu, and how they are launched."""

from collections.abc import Callable

from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for, contiguous

cuda = CudaFile(__file__, "softmax.cu")
right_kernel = cuda.kernel("right", block=64)
MOST_BLOCKS = 1024


def by_rows(name: str, block: int = 64, blocks: Callable[[int, Array], int] | None = None) -> Callable[[Array], Array]:
    """A softmax by the kernel of that name, on as many blocks as a grid-stride loop needs unless told."""
    kernel = cuda.kernel(name, block=block)

    def softmax(x: Array) -> Array:
        x = contiguous(x)
        y = x.device.empty(x.shape, x.dtype)
        rows = x.size // max(1, x.shape[-1])
        kernel(x, y, rows, x.shape[-1], grid=blocks(rows, x) if blocks else blocks_for(rows, 1, x.device))
        return y

    return softmax


right_softmax = by_rows("right")

maximum_starts_at_zero = by_rows("maximum_starts_at_zero")
online_from_smallest_positive = by_rows("online_from_smallest_positive")
maximum_of_bits = by_rows("maximum_of_bits")
no_shift = by_rows("no_shift")
clamped = by_rows("clamped")

no_more_blocks_than_1024 = by_rows("a_row_for_each_block", block=32, blocks=lambda rows, x: min(rows, MOST_BLOCKS))
a_thread_for_each_column = by_rows("a_thread_for_each_column", block=1024)
longest_row_that_fits = by_rows("longest_row_that_fits")
offsets_of_16_bits = by_rows("offsets_of_16_bits", block=32)
rest_of_packs_forgotten = by_rows("rest_of_packs_forgotten")

scratch_used_twice = by_rows("scratch_used_twice")
last_warp_not_synchronised = by_rows("last_warp_not_synchronised")
barrier_in_a_branch = by_rows("barrier_in_a_branch")
leaves_before_a_barrier = by_rows("leaves_before_a_barrier", blocks=lambda rows, x: rows)
shuffles_without_some_lanes = by_rows("shuffles_without_some_lanes", block=32)
half_a_warp = by_rows("half_a_warp", block=16)
shuffles_of_width_16 = by_rows("shuffles_of_width_16", block=32)
