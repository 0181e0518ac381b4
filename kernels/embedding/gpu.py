"""embedding, gather_rows: a warp for each row; scatter_rows, add_rows: sorted on the host, where indices are known."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np

from minibert.kernels.gpu.launch import Array, CudaFile, blocks_for, contiguous, int32

cuda = CudaFile(__file__)
embedding_warp = cuda.kernel("embedding_warp", block=128)
gather_warp = cuda.kernel("gather_warp", block=128)
scatter_runs = cuda.kernel("scatter_runs", block=128)
scatter_pieces = cuda.kernel("scatter_pieces", block=128)
scatter_long = cuda.kernel("scatter_long", block=128)

WARPS = 4  # in each block of the kernels above
LONGEST = 64  # rows that one warp adds up
LONG_TILE = 8  # columns that one warp of scatter_long adds up
LANES = 32  # of a warp
RUNS_AT_ONCE = 64  # long runs along the grid of scatter_long: few lists hold more, and most of each is empty
PACK_BYTES = 16  # that one lane takes of a row at a time
SKIP_NONE = -1


def embedding(
    word: Array, position: Array, token_type: Array, input_ids: Array, position_ids: Array, token_type_ids: Array,
    *, padding_idx: int | None = None,
) -> Array:  # fmt: skip
    columns = word.shape[1]
    if not input_ids.shape == position_ids.shape == token_type_ids.shape:
        shapes = f"{input_ids.shape}, {position_ids.shape}, {token_type_ids.shape}"
        raise ValueError(f"expected word, position and type ids of one shape, got {shapes}")
    y = word.device.empty((*input_ids.shape, columns), word.dtype)
    embedding_warp(
        contiguous(word),
        contiguous(position, (len(position), columns), "position"),
        contiguous(token_type, (len(token_type), columns), "token_type"),
        _rows_of(input_ids, len(word), "input_ids"),
        _rows_of(position_ids, len(position), "position_ids"),
        _rows_of(token_type_ids, len(token_type), "token_type_ids"),
        y,
        input_ids.size,
        columns,
        grid=blocks_for(input_ids.size, WARPS, word.device),
    )
    return y


def gather_rows(x: Array, index: Array, *, skip: int | None = None) -> Array:
    columns = prod(x.shape[1:])
    y = x.device.empty((*index.shape, *x.shape[1:]), x.dtype)
    rows = _rows_of(index, len(x), "index")
    grid = blocks_for(index.size, WARPS, x.device)
    gather_warp(contiguous(x), rows, y, index.size, columns, SKIP_NONE if skip is None else skip, grid=grid)
    return y


def _rows_of(ids: Array, rows: int, name: str) -> Array:
    """`ids` as int32. Raises ValueError unless, as far as the host knows, each is a row of a table of `rows` rows."""
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected whole numbers, got {ids.dtype}")
    if ids.host is not None:
        _demand_rows(ids.host, rows, name)
    return int32(ids)


def _demand_rows(ids: np.ndarray, rows: int, name: str) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < rows:
        raise ValueError(f"{name}: expected numbers from 0 to {rows - 1}, got {ids.min()} to {ids.max()}")


# ------------------------------------------------------------------------------------------------------------- scatter


class ScatterPlan(NamedTuple):
    """Which rows are added up where. All of it int32, in sizes that do not depend on the indices (`plan_shapes`)."""

    order: Array  # the rows by where they go, and among those as they came; then what rows are skipped leave free
    offsets: Array  # where in `order` the run of each row of y begins, and where the last ends
    bounds: Array  # where in `order` each piece of a long run begins and ends; then empty ones
    runs: Array  # of each long run: its row of y, its first piece, the piece after its last; then empty ones


def plan_shapes(count: int, num_rows: int) -> list[tuple[int, ...]]:
    """Of each part, for `count` indices: long runs make the most pieces where each has LONGEST + 1 rows."""
    runs = count // (LONGEST + 1)
    return [(count,), (num_rows + 1,), (2 * count // (LONGEST + 1), 2), (runs, 3)]


def scatter_plan(ids: np.ndarray, num_rows: int, skip: int | None) -> ScatterPlan:
    """Runs of more than `LONGEST` rows are cut into pieces of as many, from the run's first row on."""
    _demand_rows(ids, num_rows, "index")
    kept = np.arange(len(ids)) if skip is None else np.flatnonzero(ids != skip)
    narrow = ids[kept].astype(np.min_scalar_type(num_rows))  # 16-bit numbers are sorted by radix
    order = kept[np.argsort(narrow, kind="stable")]
    lengths = np.bincount(ids[kept], minlength=num_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])

    long = np.flatnonzero(lengths > LONGEST)
    pieces = -(-lengths[long] // LONGEST)
    ends = np.cumsum(pieces)
    number = np.arange(pieces.sum()) - np.repeat(ends - pieces, pieces)  # of each piece in its run
    first = np.repeat(offsets[long], pieces) + number * LONGEST
    last = np.minimum(first + LONGEST, np.repeat(offsets[long + 1], pieces))
    parts = (order, offsets, np.stack([first, last], 1), np.stack([long, ends - pieces, ends], 1))
    shapes = plan_shapes(len(ids), num_rows)
    return ScatterPlan(*(_filled(part, shape) for part, shape in zip(parts, shapes, strict=True)))


def _filled(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros(shape, np.int32)
    out[: len(values)] = values
    return out


def scatter_rows(x: Array, index: Array, *, num_rows: int, skip: int | None = None) -> Array:
    y = x.device.empty((num_rows, *x.shape[1:]), x.dtype)
    _scatter(x, index, y, skip, add=False)
    return y


def add_rows(total: Array, x: Array, index: Array, *, skip: int | None = None) -> Array:
    y = contiguous(total, (len(total), *x.shape[1:]), "the rows to add to")
    _scatter(x, index, y, skip, add=True)
    if y is not total:  # a strided view: a copy was updated
        total[...] = y
    return total


def _scatter(x: Array, index: Array, y: Array, skip: int | None, add: bool) -> None:
    """The sums of x's rows into y, or with `add` onto what it holds."""
    num_rows, count, columns, device = len(y), index.size, prod(x.shape[1:]), x.device
    x = contiguous(x, (count, *x.shape[1:]), "the rows to scatter")
    plan = _plan_on_device(index, num_rows, skip)
    tiles = -(-columns // (LANES * PACK_BYTES // x.itemsize))
    grid: tuple[int, ...] = (blocks_for(num_rows, WARPS, device), tiles)
    scatter_runs(x, plan.order, plan.offsets, y, num_rows, columns, LONGEST, int(add), grid=grid)
    pieces, runs = len(plan.bounds), len(plan.runs)
    if runs:
        partial = device.empty((pieces, columns), np.float32)
        grid = (blocks_for(pieces, WARPS, device), tiles)
        scatter_pieces(x, plan.order, plan.bounds, partial, pieces, columns, grid=grid)
        grid = (blocks_for(columns, WARPS * LONG_TILE, device), min(runs, RUNS_AT_ONCE))
        scatter_long(partial, plan.runs, y, runs, columns, int(add), grid=grid)


def _plan_on_device(index: Array, num_rows: int, skip: int | None) -> ScatterPlan:
    """Made by the host, which knows the indices, and uploaded by one copy; in a captured graph anew for each replay."""

    def compute(ids: np.ndarray) -> np.ndarray:
        return np.concatenate([part.reshape(-1) for part in scatter_plan(ids.reshape(-1), num_rows, skip)])

    together = index.device.derived(compute, index)
    shapes = plan_shapes(index.size, num_rows)
    ends = np.cumsum([prod(shape) for shape in shapes]).tolist()
    parts = (together[end - prod(shape) : end].reshape(shape) for end, shape in zip(ends, shapes, strict=True))
    return ScatterPlan(*parts)
