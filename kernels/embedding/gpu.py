"""embedding and gather_rows: a warp for each row; scatter_rows: sorted on the host, where the indices are known."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np

from minibert.kernels.gpu_launch import Array, CudaFile, blocks_for, contiguous, int32, on_host

cuda = CudaFile(__file__)
embedding_warp = cuda.kernel("embedding_warp", block=128)
gather_warp = cuda.kernel("gather_warp", block=128)
scatter_runs = cuda.kernel("scatter_runs", block=128)
scatter_pieces = cuda.kernel("scatter_pieces", block=128)
scatter_long = cuda.kernel("scatter_long", block=128)

WARPS = 4  # in each block of the kernels above
LONGEST = 64  # rows that one warp adds up
LONG_TILE = 8  # columns that one warp of scatter_long adds up
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
    """Which rows are added up where: int32, in sizes that depend on the numbers of rows alone, not on the indices."""

    order: np.ndarray  # (rows,) by where they go, and among those as they came; rows that are skipped left out
    offsets: np.ndarray  # (num_rows + 1,) where in `order` the run of each row of y begins
    bounds: np.ndarray  # (pieces, 2) where in `order` each piece of a long run begins and ends; the rest is empty
    runs: np.ndarray  # (runs, 3) of each long run: its row of y, its first piece, the piece after its last; likewise


def scatter_plan(ids: np.ndarray, num_rows: int, skip: int | None) -> ScatterPlan:
    """Runs of more than `LONGEST` rows are cut into pieces of as many, from the run's first row on."""
    count = len(ids)
    kept = np.arange(count) if skip is None else np.flatnonzero(ids != skip)
    narrow = ids[kept].astype(np.min_scalar_type(num_rows))  # 16-bit numbers are sorted by radix
    order = _filled(kept[np.argsort(narrow, kind="stable")], (count,))
    lengths = np.bincount(ids[kept], minlength=num_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])

    long = np.flatnonzero(lengths > LONGEST)
    pieces = -(-lengths[long] // LONGEST)
    ends = np.cumsum(pieces)
    number = np.arange(pieces.sum()) - np.repeat(ends - pieces, pieces)  # of each piece in its run
    first = np.repeat(offsets[long], pieces) + number * LONGEST
    last = np.minimum(first + LONGEST, np.repeat(offsets[long + 1], pieces))
    return ScatterPlan(
        order,
        offsets.astype(np.int32),
        _filled(np.stack([first, last], 1), (2 * count // (LONGEST + 1), 2)),  # at worst, runs of LONGEST + 1 rows
        _filled(np.stack([long, ends - pieces, ends], 1), (count // (LONGEST + 1), 3)),
    )


def _filled(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros(shape, np.int32)
    out[: len(values)] = values
    return out


def scatter_rows(x: Array, index: Array, *, num_rows: int, skip: int | None = None) -> Array:
    count, columns, device = len(index), prod(x.shape[1:]), x.device
    x = contiguous(x, (count, *x.shape[1:]), "the rows to scatter")
    ids = on_host(index)
    _demand_rows(ids, num_rows, "index")
    plan = scatter_plan(ids, num_rows, skip)
    order, offsets, bounds, runs = _upload(plan, device)
    y = device.empty((num_rows, *x.shape[1:]), x.dtype)
    tiles = -(-columns // (32 * PACK_BYTES // x.itemsize))
    runs_grid = (blocks_for(num_rows, WARPS, device), tiles)
    scatter_runs(x, order, offsets, y, num_rows, columns, LONGEST, grid=runs_grid)
    if len(plan.runs):
        pieces = len(plan.bounds)
        partial = device.empty((pieces, columns), np.float32)
        pieces_grid = (blocks_for(pieces, WARPS, device), tiles)
        scatter_pieces(x, order, bounds, partial, pieces, columns, grid=pieces_grid)
        long_grid = (blocks_for(columns, WARPS * LONG_TILE, device), len(plan.runs))
        scatter_long(partial, runs, y, len(plan.runs), columns, grid=long_grid)
    return y


def _upload(plan: ScatterPlan, device: Any) -> list[Array]:
    """Each part on the device, all by one copy."""
    together = device.asarray(np.concatenate([part.reshape(-1) for part in plan]))
    ends = np.cumsum([part.size for part in plan]).tolist()
    return [together[end - part.size : end] for part, end in zip(plan, ends, strict=True)]
