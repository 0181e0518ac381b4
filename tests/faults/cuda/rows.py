"""Gather and scatter, dropout, GELU and relu on a GPU, right and with one mistake each: rows.cu, and its launches."""

from collections.abc import Callable
from math import prod

from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for, contiguous, cuda_stream, int32
from minibert.kernels.philox import Stream, threshold

cuda = CudaFile(__file__, "rows.cu")
rows_add_themselves = cuda.kernel("rows_add_themselves", block=128)
MOST_BLOCKS = 512
MOST_POSITIONS = 512
NONE = -1  # the row to be skipped, where there is none


def gather_by(name: str, *, along_y: bool = False) -> Callable[..., Array]:
    kernel = cuda.kernel(name, block=32)

    def gather_rows(x: Array, index: Array, *, skip: int | None = None) -> Array:
        y = x.device.empty((*index.shape, *x.shape[1:]), x.dtype)
        rows, columns = index.size, prod(x.shape[1:])
        grid = (1, rows) if along_y else blocks_for(rows, 1, x.device)
        kernel(contiguous(x), int32(index), y, rows, columns, NONE if skip is None else skip, grid=grid)
        return y

    return gather_rows


right_gather_rows = gather_by("right_gather")
ids_of_16_bits = gather_by("ids_of_16_bits")
rows_along_y = gather_by("rows_along_y", along_y=True)


def embedding_by(most_positions: int | None = None) -> Callable[..., Array]:
    kernel = cuda.kernel("right_embedding", block=128)

    def embedding(
        word: Array, position: Array, token_type: Array, input_ids: Array, position_ids: Array, token_type_ids: Array,
        *, padding_idx: int | None = None,
    ) -> Array:  # fmt: skip
        columns = word.shape[1]
        y = word.device.empty((*input_ids.shape, columns), word.dtype)
        tables = map(contiguous, (word, position, token_type))
        ids = map(int32, (input_ids, position_ids, token_type_ids))
        rows, most = input_ids.size, most_positions or len(position)
        kernel(*tables, *ids, y, rows, columns, most, grid=blocks_for(rows, 1, word.device))
        return y

    return embedding


right_embedding = embedding_by()
positions_to_512 = embedding_by(MOST_POSITIONS)


def scatter_by(name: str) -> Callable[..., Array]:
    kernel = cuda.kernel(name, block=128)

    def scatter_rows(x: Array, index: Array, *, num_rows: int, skip: int | None = None) -> Array:
        y = x.device.empty((num_rows, *x.shape[1:]), x.dtype)
        numbers = index.size, prod(x.shape[1:]), y.size, NONE if skip is None else skip
        kernel(contiguous(x), int32(index), y, *numbers, grid=blocks_for(y.size, 128, x.device))
        return y

    return scatter_rows


right_scatter_rows = scatter_by("right_scatter")
scatter_to_padding = scatter_by("scatter_to_padding")
batch_of_ids_overwritten = scatter_by("batch_of_ids_overwritten")


def _add(x: Array, index: Array, num_rows: int, skip: int | None, atomic: int) -> Array:
    y = x.device.zeros((num_rows, *x.shape[1:]), x.dtype)
    numbers = index.size, prod(x.shape[1:]), NONE if skip is None else skip, atomic
    rows_add_themselves(contiguous(x), int32(index), y, *numbers, grid=blocks_for(index.size, 1, x.device))
    return y


def scatter_by_atomic_additions(x: Array, index: Array, *, num_rows: int, skip: int | None = None) -> Array:
    return _add(x, index, num_rows, skip, atomic=1)


def scatter_by_plain_additions(x: Array, index: Array, *, num_rows: int, skip: int | None = None) -> Array:
    return _add(x, index, num_rows, skip, atomic=0)


def dropout_by(name: str, *, scaled: bool = True) -> Callable[..., Array]:
    kernel = cuda.kernel(name, block=128)

    def dropout(x: Array, *, rate: float, stream: Stream) -> Array:
        if rate == 0:
            return x
        y = x.device.empty(x.shape, x.dtype)
        numbers = x.size, threshold(rate), 1 / (1 - rate) if scaled else 1.0, cuda_stream(stream)
        kernel(contiguous(x), y, *numbers, grid=blocks_for(x.size, 128, x.device))
        return y

    return dropout


right_dropout = dropout_by("right_dropout")
words_of_the_rest = dropout_by("words_of_the_rest")
words_of_16_bits = dropout_by("words_of_16_bits")
kept_not_scaled = dropout_by("right_dropout", scaled=False)


def gelu_by(name: str) -> Callable[..., Array]:
    kernel = cuda.kernel(name, block=128)

    def gelu(x: Array, *, approximate: str = "none") -> Array:
        y = x.device.empty(x.shape, x.dtype)
        kernel(contiguous(x), y, x.size, int(approximate == "tanh"), grid=blocks_for(x.size, 128, x.device))
        return y

    return gelu


right_gelu = gelu_by("right_gelu")
tanh_by_exponentials = gelu_by("tanh_by_exponentials")
quick_gelu = gelu_by("quick_gelu")


def relu_by(name: str, *, most: int | None = None) -> Callable[[Array], Array]:
    kernel = cuda.kernel(name, block=128)

    def relu(x: Array) -> Array:
        y = x.device.empty(x.shape, x.dtype)
        grid = min(most, -(-x.size // 128)) if most else blocks_for(x.size, 128, x.device)
        kernel(contiguous(x), y, x.size, grid=grid)
        return y

    return relu


right_relu = relu_by("right_relu")
relu_by_fmaxf = relu_by("relu_by_fmaxf")
no_more_blocks_than_512 = relu_by("element_for_each_thread", most=MOST_BLOCKS)
rest_not_written = relu_by("rest_not_written")
one_too_many = relu_by("one_too_many")
