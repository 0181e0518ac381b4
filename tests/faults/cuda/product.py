"""A linear layer and its gradient on a GPU, right and with one mistake each: product.cu, and how it is launched."""

from collections.abc import Callable

from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for, contiguous

cuda = CudaFile(__file__, "product.cu")
right_kernel = cuda.kernel("right", block=256)
TILE = 16


def linear_by(name: str) -> Callable[[Array, Array, Array], Array]:
    """y = x w' + b by the kernel of that name: a block for each tile of y."""
    kernel = cuda.kernel(name, block=256)

    def linear(x: Array, weight: Array, bias: Array) -> Array:
        columns, inner = weight.shape
        y = x.device.empty((*x.shape[:-1], columns), x.dtype)
        rows = y.size // max(1, columns)
        grid = -(-rows // TILE), -(-columns // TILE)
        kernel(*map(contiguous, (x, weight, bias)), y, rows, columns, inner, grid=grid)
        return y

    return linear


right_linear = linear_by("right")
whole_tiles = linear_by("whole_tiles")
tiles_beyond_the_edge = linear_by("tiles_beyond_the_edge")
tiles_overwritten = linear_by("tiles_overwritten")
sums_in_half = linear_by("sums_in_half")


def gradient_by(name: str, *, added: bool = False) -> Callable[[Array, Array], tuple[Array, Array]]:
    kernel = cuda.kernel(name, block=256)

    def linear_grad(g: Array, x: Array) -> tuple[Array, Array]:
        device, (rows, columns), inner = x.device, g.shape, x.shape[1]
        dweight = device.empty((columns, inner), x.dtype)
        dbias = (device.zeros if added else device.empty)((columns,), x.dtype)
        grid = blocks_for(max(dweight.size, columns), 256, device)
        kernel(contiguous(g), contiguous(x), dweight, dbias, rows, columns, inner, grid=grid)
        return dweight, dbias

    return linear_grad


right_linear_grad = gradient_by("right_gradient")
bias_by_all_threads = gradient_by("bias_by_all_threads", added=True)
rows_of_one_pass = gradient_by("rows_of_one_pass")
