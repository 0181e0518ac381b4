"""AdamW, the square norm and sums on a GPU, right and with one mistake each: update.cu, and how it is launched."""

from collections.abc import Callable
from math import prod
from typing import Any

from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for, contiguous

cuda = CudaFile(__file__, "update.cu")
right_parts = cuda.kernel("right_parts", block=256)
right_total = cuda.kernel("right_total", block=256)
counter_not_reset_kernel = cuda.kernel("counter_not_reset", block=256)
parts_in_no_order = cuda.kernel("parts_added_in_no_order", block=256)

CHUNK = 65536  # elements that one block updates
PART = 2048  # elements of one partial sum
MOST_PARTS = 32


def adamw_by(
    name: str, blocks: Callable[[int, Array], int], *, steps_before: int = 0, decoupled: bool = True
) -> Callable[..., tuple[Array, Array, Array]]:
    """AdamW by the kernel of that name; `steps_before` is how far the step lags in the bias correction."""
    kernel = cuda.kernel(name, block=256)

    def adamw(
        param: Array, grad: Array, exp_avg: Array, exp_avg_sq: Array, grad_scale: Array, *, lr: float, step: int,
        beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        t = max(1, step - steps_before)
        decay = 1 - (lr if decoupled else 1.0) * weight_decay
        numbers = lr / (1 - beta1**t), (1 - beta2**t) ** -0.5, decay, beta1, 1 - beta1, beta2, 1 - beta2, eps
        given = (param, exp_avg, exp_avg_sq)
        p, m, v = map(contiguous, given)
        grid = blocks(param.size, param)
        kernel(p, contiguous(grad), m, v, contiguous(grad_scale), param.size, *numbers, grid=grid)
        for array, written in zip(given, (p, m, v), strict=True):
            if written is not array:  # a view with gaps: a copy was updated
                array[...] = written
        return param, exp_avg, exp_avg_sq

    return adamw


def _as_many_as_needed(count: int, x: Array) -> int:
    return blocks_for(count, 256, x.device)


def _chunks(count: int, x: Array) -> int:
    return -(-count // CHUNK)


right_adamw = adamw_by("right", _as_many_as_needed)
last_chunk_lost = adamw_by("chunk_for_each_block", lambda count, x: max(1, count // CHUNK))
moment_of_first_chunk = adamw_by("moment_of_first_chunk", _chunks)
step_too_few = adamw_by("right", _as_many_as_needed, steps_before=1)
decay_without_rate = adamw_by("right", _as_many_as_needed, decoupled=False)
eps_within_the_root = adamw_by("eps_within_the_root", _as_many_as_needed)


def norm_by(name: str) -> Callable[[Array], Array]:
    """The square norm by partial sums of that kernel."""
    kernel = cuda.kernel(name, block=256)

    def square_norm(x: Array) -> Array:
        x, device = contiguous(x), x.device
        chunks = -(-x.size // PART)
        parts, total = device.empty((chunks,), "float32"), device.empty((), "float32")
        kernel(x, parts, x.size, grid=blocks_for(chunks, 1, device))
        right_total(parts, total, chunks, grid=1)
        return total

    return square_norm


right_square_norm = norm_by("right_parts")
rest_lost = norm_by("rest_lost")
parts_that_overlap = norm_by("parts_that_overlap")


def parts_added_in_no_order(x: Array) -> Array:
    total = x.device.zeros((), "float32")
    parts_in_no_order(contiguous(x), total, x.size, grid=blocks_for(x.size, PART, x.device))
    return total


def counter_not_reset(x: Array) -> Array:
    total, parts = x.device.empty((), "float32"), x.device.empty((MOST_PARTS,), "float32")
    grid = min(MOST_PARTS, blocks_for(x.size, PART, x.device))
    counter_not_reset_kernel(contiguous(x), parts, total, x.size, grid=grid)
    return total


def sums_by(name: str) -> Callable[..., Array]:
    """reduce_sum by the kernel of that name: axes that are summed go to the front."""
    kernel = cuda.kernel(name, block=256)

    def reduce_sum(x: Array, *, axis: Any = None) -> Array:
        axes = range(x.ndim) if axis is None else [a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)]
        kept = [a for a in range(x.ndim) if a not in axes]
        shape = tuple(x.shape[a] for a in kept)
        y = x.device.empty(shape, x.dtype)
        rows = prod(x.shape[a] for a in axes)
        moved = contiguous(x.transpose((*axes, *kept)))
        kernel(moved, y, rows, y.size, grid=blocks_for(y.size, 256, x.device))
        return y

    return reduce_sum


right_reduce_sum = sums_by("right_columns")
rows_of_one_tile = sums_by("rows_of_one_tile")
