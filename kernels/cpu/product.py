"""Products of matrices in float32 and float64, by a kernel of our own, spread over the threads of `cpu_threads`.

`gemm` is the product on one core, called by any kernel that multiplies. It packs B into micropanels of NR columns, some
rows and columns at a time, so few that they stay in the second-level cache, and reads A where it lies, MR rows at a
time (packed only where the terms of a row lie far apart). `cpu_microkernel` names the papers. Words of several
elements, with C in another dtype, are multiplied in tiles where the processor has them; terms are words then, and lie
one after the other in a row of A.

Each element of C is a sum in an order that the number of its terms alone decides: neither the number of threads nor
the other rows and columns change a bit of it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from minibert.kernels.cpu.jit import inline, jit
from minibert.kernels.cpu.microkernel import MR, VECTORS, microkernel_1, microkernel_2, microkernel_3
from minibert.kernels.cpu.threads import blocks, num_threads, rows_worth_a_thread, run_rows
from minibert.kernels.cpu.tiles import (
    TILE_ROWS,
    by_tiles,
    multiply_tiles_1,
    multiply_tiles_2,
    multiply_tiles_3,
    release_tiles,
    set_tiles,
)
from minibert.kernels.cpu.vectors import VECTOR_BYTES, copy_vector, transpose_square
from minibert.kernels.op import Array

DEPTH = 384  # rows of B that are packed at once: as many elements of MR rows of A stay in the first-level cache
PANELS = 4  # micropanels that are packed at once
FAR = 1024  # elements between a row's neighbours, from where on each of them lies in another page
WIDE = 128  # rows of A that are packed at once, where it is FAR: elements that lie one after the other
UNIT = 16  # a multiple of MR and of every vector's lanes
PACKED = -1  # in place of B's stride from row to row: it lies in micropanels already
COST = 0.005  # nanoseconds that one core takes for a multiplication and addition
PARTS_PER_THREAD = 2  # at most: the more, the more often A is read
PART = 20_000  # nanoseconds of work that are not cut further
ROWS_TO_PACK_B = 20  # packing a column of B takes as long as multiplying it by so many rows of A
ROWS_TO_READ_B = 4  # and reading it where it is packed
COLUMNS_TO_PACK_A = 8  # packing a row of A takes as long as multiplying it by so many columns of B
COLUMNS_TO_READ_A = 4  # and reading it for a part
LATE = 0.05  # of a part: what one thread is late, on the whole, since threads do not begin together


# --- one core --------------------------------------------------------------------------------------------------------

ceil_div = inline(blocks)


@inline
def lanes_of(x: Array) -> int:
    return VECTOR_BYTES // x.itemsize


@jit
def aligned(count: int, like: Array) -> Array:
    """`count` elements that nobody has written, aligned to vectors: tiles whose rows lie across two lines are slow."""
    lanes = lanes_of(like)
    buffer = np.empty(count + lanes, like.dtype)
    return buffer[-(buffer.ctypes.data // like.itemsize) % lanes :]


@jit
def scratch_for(x: Array) -> Array:
    """What `gemm` packs a B like x into: micropanels, WIDE rows of A, sums at an edge of C; aligned to vectors."""
    nr = VECTORS * lanes_of(x)
    return aligned(PANELS * DEPTH * nr + WIDE * DEPTH + max(MR, TILE_ROWS) * nr, x)


@jit
def gemm(
    a: Array, a_start: int, a_row: int, a_k: int, b: Array, b_start: int, b_k: int, b_column: int,
    c: Array, c_start: int, c_row: int, m: int, n: int, depth: int, add: bool, scratch: Array,
) -> None:  # fmt: skip
    """C = A B, or C += A B where `add`: A (m, depth), B (depth, n), C (m, n) lie in vectors from `start` on.

    Element (i, k) of A is at a_start + i a_row + k a_k, and so on; one stride of A and one of B is 1, C's second too.
    Where b_k is PACKED, `pack_panels` has made `b` of all of B, and b_start is a whole number of micropanels.
    C shares no memory with A and B.
    """
    for i in range(m if depth == 0 and not add else 0):
        for j in range(n):
            c[c_start + i * c_row + j] = 0
    group = PANELS * VECTORS * lanes_of(c)
    strip = PANELS * DEPTH * VECTORS * lanes_of(c)
    edges = scratch[strip + WIDE * DEPTH :].view(c.dtype)
    height = TILE_ROWS if by_tiles(b) else MR
    step = UNIT * max(1, ceil_div(ceil_div(depth, max(1, ceil_div(depth, DEPTH))), UNIT))
    for j in range(0, n, group):
        columns = min(group, n - j)
        for k in range(0, depth, step):
            terms, more = min(step, depth - k), add or k > 0
            if b_k != PACKED:
                pack_panels(b, b_start + k * b_k + j * b_column, b_k, b_column, terms, columns, scratch)
            set_tiles(b, min(height, m), terms)
            for i in range(0, m, height):
                rows, place = min(height, m - i), c_start + i * c_row + j
                left = a_start + i * a_row + k * a_k
                if rows < height and i > 0:
                    set_tiles(b, rows, terms)
                if b_k == PACKED:
                    first = b_start + j * depth
                    strip_by_panels(
                        a, left, a_row, a_k, rows, terms, columns, b, first, k, depth, edges, c, place, c_row, more
                    )
                    continue
                if a_k < FAR:
                    strip_by_panels(
                        a, left, a_row, a_k, rows, terms, columns, scratch, 0, 0, terms, edges, c, place, c_row, more
                    )
                    continue
                if i % WIDE == 0:
                    pack_columns(a, left, a_k, terms, min(WIDE, m - i), WIDE, scratch, strip)
                strip_by_panels(
                    scratch, strip + i % WIDE, a_row, WIDE, rows, terms, columns, scratch, 0, 0, terms, edges,
                    c, place, c_row, more,
                )  # fmt: skip
    release_tiles(b)


@jit
def strip_by_panels(
    a: Array, a_start: int, a_row: int, a_k: int, rows: int, terms: int, columns: int,
    b: Array, b_start: int, k: int, depth: int, edges: Array, c: Array, c_start: int, c_row: int, add: bool,
) -> None:  # fmt: skip
    """Up to MR rows of A times rows k .. k + terms of micropanels, which have `depth` rows and begin at b_start."""
    lanes = lanes_of(c)
    nr = VECTORS * lanes
    for j in range(0, columns, nr):
        wide = min(nr, columns - j)
        vectors = ceil_div(wide, lanes)
        panel = b_start + j * depth + k * vectors * lanes
        if (rows == MR or by_tiles(b)) and wide == vectors * lanes:
            tile(vectors, a, a_start, a_row, a_k, rows, b, panel, terms, c, c_start + j, c_row, add)
            continue
        tile(vectors, a, a_start, a_row, a_k, rows, b, panel, terms, edges, 0, nr, False)
        for i in range(rows):
            sums, out = edges[i * nr :], c[c_start + i * c_row + j :]
            for column in range(wide):
                out[column] = out[column] + sums[column] if add else sums[column]


@inline
def tile(
    vectors: int, a: Array, a_start: int, a_row: int, a_k: int, rows: int, b: Array, b_start: int, depth: int,
    c: Array, c_start: int, c_row: int, add: bool,
) -> None:  # fmt: skip
    if by_tiles(b):
        if vectors == 3:
            multiply_tiles_3(a, a_start, a_row, b, b_start, depth, c, c_start, c_row, add)
        elif vectors == 2:
            multiply_tiles_2(a, a_start, a_row, b, b_start, depth, c, c_start, c_row, add)
        else:
            multiply_tiles_1(a, a_start, a_row, b, b_start, depth, c, c_start, c_row, add)
    elif vectors == 3:
        microkernel_3(a, a_start, a_row, a_k, rows, b, b_start, depth, c, c_start, c_row, add)
    elif vectors == 2:
        microkernel_2(a, a_start, a_row, a_k, rows, b, b_start, depth, c, c_start, c_row, add)
    else:
        microkernel_1(a, a_start, a_row, a_k, rows, b, b_start, depth, c, c_start, c_row, add)


@jit
def gemm_by_panels(
    a: Array, a_start: int, a_row: int, a_k: int, panels: Array, c: Array, c_row: int, m: int, n: int, depth: int,
    add: bool,
) -> None:  # fmt: skip
    """C = A B, or C += A B, on B as `pack_panels` packs it; C has room for whole tiles: MR rows, whole vectors."""
    lanes = lanes_of(c)
    nr = VECTORS * lanes
    height = TILE_ROWS if by_tiles(panels) else MR
    set_tiles(panels, min(height, m), depth)
    for i in range(0, m, height):
        rows, left = min(height, m - i), a_start + i * a_row
        if rows < height and i > 0:
            set_tiles(panels, rows, depth)
        for j in range(0, n, nr):
            vectors = ceil_div(min(nr, n - j), lanes)
            tile(vectors, a, left, a_row, a_k, rows, panels, j * depth, depth, c, i * c_row + j, c_row, add)
    release_tiles(panels)


@jit
def pack_panels(b: Array, start: int, b_k: int, b_column: int, depth: int, columns: int, out: Array) -> None:
    """(depth, columns) of B as micropanels, one after the other, each row after row, filled up to whole vectors."""
    lanes = lanes_of(out)
    nr = VECTORS * lanes
    for j in range(0, columns, nr):
        wide = min(nr, columns - j)
        filled, panel = ceil_div(wide, lanes) * lanes, j * depth
        if b_column == 1:
            pack_columns(b, start + j, b_k, depth, wide, filled, out, panel)
            continue
        transpose(b, start + j * b_column, b_column, wide, depth, out, panel, filled)
        for k in range(depth if wide < filled else 0):
            for column in range(wide, filled):
                out[panel + k * filled + column] = 0


@jit
def pack_columns(x: Array, start: int, x_row: int, rows: int, columns: int, filled: int, y: Array, place: int) -> None:
    """y (rows, filled) = x (rows, columns), and zeros beside it."""
    lanes = lanes_of(y)
    whole = columns // lanes * lanes
    for i in range(rows):
        from_row, to_row = start + i * x_row, place + i * filled
        for j in range(0, whole, lanes):
            copy_vector(x, from_row + j, y, to_row + j)
        for j in range(whole, columns):
            y[to_row + j] = x[from_row + j]
        for j in range(columns, filled):
            y[to_row + j] = 0


@jit
def transpose(x: Array, start: int, x_row: int, rows: int, columns: int, y: Array, place: int, y_row: int) -> None:
    """y (columns, rows) = x (rows, columns) transposed."""
    lanes = lanes_of(y)
    square_rows, square_columns = rows // lanes * lanes, columns // lanes * lanes
    for i in range(0, square_rows, lanes):
        for j in range(0, square_columns, lanes):
            transpose_square(x, start + i * x_row + j, x_row, y, place + j * y_row + i, y_row)
    for i in range(rows):
        for j in range(square_columns if i < square_rows else 0, columns):
            y[place + j * y_row + i] = x[start + i * x_row + j]


# --- all threads -----------------------------------------------------------------------------------------------------


@jit
def product_parts(
    a: Array, a_row: int, a_k: int, b: Array, b_k: int, b_column: int, c: Array, c_row: int, m: int, n: int, depth: int,
    add: bool, cuts: tuple[int, int], start: int, stop: int,
) -> None:  # fmt: skip
    scratch = scratch_for(b)
    for part in range(start, stop):
        i, rows, j, columns = part_of(c, m, n, cuts, part)
        gemm(
            a, i * a_row, a_row, a_k, b, j * b_column, b_k, b_column,
            c, i * c_row + j, c_row, rows, columns, depth, add, scratch,
        )  # fmt: skip


@jit
def part_of(c: Array, m: int, n: int, cuts: tuple[int, int], part: int) -> tuple[int, int, int, int]:
    """First row, rows, first column and columns of a part of C (m, n), cut along strips and micropanels."""
    down, across = cuts
    nr = VECTORS * lanes_of(c)
    row, column = divmod(part, across)
    strips, panels = ceil_div(m, MR), ceil_div(n, nr)
    i, i_end = MR * (strips * row // down), min(m, MR * (strips * (row + 1) // down))
    j, j_end = nr * (panels * column // across), min(n, nr * (panels * (column + 1) // across))
    return i, i_end - i, j, j_end - j


@cache
def cuts_of(
    m: int, n: int, depth: int, nr: int, threads: int, far: bool = False, packed: bool = False
) -> tuple[int, int]:
    """Into how many parts to cut the rows and the columns of C (m, n), so that the threads end soonest.

    A is packed too where it is `far`; B is `packed` before.
    """
    strips, panels = blocks(m, MR), blocks(n, nr)
    most = min(PARTS_PER_THREAD * threads, max(threads, round(m * n * depth * COST / PART)))

    def cost(cuts: tuple[int, int]) -> float:
        down, across = cuts
        rows, columns = MR * blocks(strips, down), min(n, nr * blocks(panels, across))
        packing = columns * (ROWS_TO_READ_B if packed else ROWS_TO_PACK_B)
        packing += COLUMNS_TO_PACK_A * rows * blocks(columns, PANELS * nr) if far else 0
        return (blocks(down * across, threads) + LATE) * (rows * (columns + COLUMNS_TO_READ_A) + packing)

    cuts = (
        (down, across) for down in range(1, 1 + min(most, strips)) for across in range(1, 1 + min(most // down, panels))
    )
    return min(cuts, key=cost)


class Operand(NamedTuple):
    """A matrix as `gemm` takes it."""

    flat: Array
    row: int  # elements from one row to the next
    column: int  # and from one column to the next; one of the two is 1


def operand(x: Array) -> Operand:
    """`x` (2 dimensions) where it lies if one of its axes is contiguous, else a copy of it."""
    (rows, columns), item = x.shape, x.itemsize
    if x.flags.c_contiguous:
        return Operand(x.reshape(-1), columns, 1)
    if x.flags.f_contiguous:
        return Operand(x.T.reshape(-1), 1, rows)
    down, across = x.strides
    if across == item and down % item == 0 and down > 0:
        extent = (rows - 1) * (down // item) + columns
    elif down == item and across % item == 0 and across > 0:
        extent = (columns - 1) * (across // item) + rows
    else:
        return operand(np.ascontiguousarray(x))
    flat = np.lib.stride_tricks.as_strided(x, (extent,), (item,), writeable=x.flags.writeable)
    return Operand(flat, down // item, across // item)


def _rows_are_contiguous(x: Array) -> bool:
    return x.flags.c_contiguous or (x.strides[1] == x.itemsize and x.strides[0] >= x.shape[1] * x.itemsize)


def run_parts(
    kernel: Any, m: int, n: int, depth: int, dtype: np.dtype[Any], *args: Any, far: bool = False, packed: bool = False
) -> None:
    """Call `kernel(*args, cuts, start, stop)` for all parts of a product (m, depth) by (depth, n)."""
    down, across = cuts_of(m, n, depth, VECTORS * (VECTOR_BYTES // dtype.itemsize), num_threads(), far, packed)
    grain = rows_worth_a_thread(m * n * depth // (down * across), COST)
    run_rows(kernel, down * across, *args, (down, across), grain=grain)


def product(a: Array, b: Array, out: Array | None = None, *, add: bool = False) -> Array:
    """a (M, K) @ b (K, N) -> (M, N), row after row, written straight into `out` where that is given, or added to it.

    `a` and `b` may be transposed or strided views. `out` may be a view of a larger array, but its rows are contiguous,
    and it shares no memory with `a` and `b`.
    Raises ValueError where the shapes, or the shape, dtype or layout of `out`, do not fit.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"expected (M, K) and (K, N), got {a.shape} and {b.shape}")
    (m, depth), n, dtype = a.shape, b.shape[1], np.result_type(a, b)
    if out is None:
        out, add = np.empty((m, n), dtype), False
    elif out.shape != (m, n) or out.dtype != dtype or (out.size and not _rows_are_contiguous(out)):
        raise ValueError(
            f"out: expected {m, n} {dtype} of contiguous rows, got {out.shape} {out.dtype} of strides {out.strides}"
        )
    if out.size:
        left, right, c = operand(a.astype(dtype, copy=False)), operand(b.astype(dtype, copy=False)), operand(out)
        run_parts(
            product_parts, m, n, depth, dtype, *left, *right, c.flat, c.row, m, n, depth, add, far=left.column >= FAR
        )
    return out
