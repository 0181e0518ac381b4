"""Layer norm and its gradient on a GPU, right and with one mistake each: the kernels of norm.cu, and their launches."""

from collections.abc import Callable

from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for, contiguous

cuda = CudaFile(__file__, "norm.cu")
right_dx = cuda.kernel("right_dx", block=64)
dx_without_deviation = cuda.kernel("dx_without_deviation", block=64)
right_parts = cuda.kernel("right_parts", block=64)
parts_of_64_lanes = cuda.kernel("parts_of_64_lanes", block=64)
right_total = cuda.kernel("right_total", block=64)
added_by_all_blocks = cuda.kernel("added_by_all_blocks", block=64)

CHUNK_ROWS = 64  # whose gradients of weight and bias one block adds up
ONE_BLOCK_ROWS = 512  # the rows that one block takes where others are forgotten
MANY_ROWS = 4096  # beyond which there is a path of its own


def forward(name: str, blocks: Callable[[int], int] | None = None) -> Callable[..., tuple[Array, ...]]:
    """A layer norm by the kernel of that name."""
    kernel = cuda.kernel(name, block=64)

    def layer_norm(x: Array, weight: Array, bias: Array, *, eps: float = 1e-12) -> tuple[Array, ...]:
        rows, columns = x.shape
        y, mean = x.device.empty(x.shape, x.dtype), x.device.empty((rows,), "float32")
        rstd = x.device.empty((rows,), "float32")
        grid = blocks(rows) if blocks else blocks_for(rows, 1, x.device)
        arrays = (contiguous(x), contiguous(weight), contiguous(bias))
        kernel(*arrays, y, mean, rstd, rows, columns, float(eps), grid=grid)
        return y, mean, rstd

    return layer_norm


right_layer_norm = forward("right")
difference_of_squares = forward("difference_of_squares")
eps_outside_the_root = forward("eps_outside_the_root")
root_by_its_bits = forward("root_by_its_bits")
first_512_rows = forward("a_row_for_each_block", lambda rows: min(rows, ONE_BLOCK_ROWS))
mean_overwritten = forward("mean_overwritten")


def _dx(kernel: Callable[..., None], g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> Array:
    dx, (rows, columns) = x.device.empty(x.shape, x.dtype), x.shape
    arrays = map(contiguous, (g, x, weight, mean, rstd))
    kernel(*arrays, dx, rows, columns, grid=blocks_for(rows, 1, x.device))
    return dx


def _sums(
    kernel: Callable[..., None], g: Array, x: Array, weight: Array, mean: Array, rstd: Array,
    *, chunk_rows: int = CHUNK_ROWS, summed: int | None = None, width: int | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """dweight and dbias: partial sums of chunks of rows by `kernel`, of which the first `summed` are added up."""
    device, (rows, columns) = x.device, x.shape
    chunks = -(-rows // chunk_rows)
    parts = device.empty((chunks, 2, columns if width is None else width), "float32")
    arrays = map(contiguous, (g, x, mean, rstd))
    kernel(*arrays, parts, rows, columns, chunk_rows, grid=blocks_for(chunks, 1, device))
    dweight, dbias = (device.empty((columns,), weight.dtype) for _ in range(2))
    grid = blocks_for(columns, right_total.block, device)
    right_total(parts, dweight, dbias, chunks if summed is None else min(summed, chunks), columns, grid=grid)
    return dweight, dbias


def right_layer_norm_grad(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, ...]:
    return _dx(right_dx, g, x, weight, mean, rstd), *_sums(right_parts, g, x, weight, mean, rstd)


def gradient_without_deviation(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, ...]:
    return _dx(dx_without_deviation, g, x, weight, mean, rstd), *_sums(right_parts, g, x, weight, mean, rstd)


def weight_of_one_block(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, ...]:
    """The parts of blocks after the first are made, and never added."""
    sums = _sums(right_parts, g, x, weight, mean, rstd, chunk_rows=ONE_BLOCK_ROWS, summed=1)
    return _dx(right_dx, g, x, weight, mean, rstd), *sums


def weight_of_64_lanes(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, ...]:
    return _dx(right_dx, g, x, weight, mean, rstd), *_sums(parts_of_64_lanes, g, x, weight, mean, rstd)


def parts_too_narrow(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, ...]:
    """The path for many rows sizes its scratch by one axis of the columns, as if those were two."""
    width = max(1, x.shape[1] // 2) if len(x) > MANY_ROWS else None
    sums = _sums(right_parts, g, x, weight, mean, rstd, chunk_rows=max(CHUNK_ROWS, len(x) // 8), width=width)
    return _dx(right_dx, g, x, weight, mean, rstd), *sums


def _added(g: Array, x: Array, weight: Array, mean: Array, rstd: Array, atomic: int) -> tuple[Array, ...]:
    rows, columns = x.shape
    sums = [x.device.zeros((columns,), "float32") for _ in range(2)]
    arrays = map(contiguous, (g, x, mean, rstd))
    grid = blocks_for(rows, CHUNK_ROWS // 4, x.device)
    added_by_all_blocks(*arrays, *sums, rows, columns, CHUNK_ROWS // 4, atomic, grid=grid)
    return _dx(right_dx, g, x, weight, mean, rstd), *sums


def weight_by_plain_additions(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, ...]:
    return _added(g, x, weight, mean, rstd, atomic=0)


def weight_by_atomic_additions(g: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, ...]:
    return _added(g, x, weight, mean, rstd, atomic=1)
