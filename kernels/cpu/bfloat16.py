"""bfloat16 on a CPU: the upper half of a float32. Numba does not know it, so its kernels see the bits, as uint16.

Products take words that hold two elements which follow one another along K.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from minibert.kernels.cpu.arrays import empty_on_lines, on_lines
from minibert.kernels.cpu.jit import jit
from minibert.kernels.cpu.product import Operand, transpose
from minibert.kernels.cpu.threads import blocks, rows_worth_a_thread, run_rows
from minibert.kernels.cpu.vectors import I32
from minibert.kernels.op import Array, is_bfloat16

BLOCK = 4096  # elements that are converted at once
COST = 0.1  # nanoseconds an element, for `rows_worth_a_thread`
TALL = 64  # rows that are transposed at once


def _rounded(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
    """In integers: that vectorises, and keeps subnormal numbers, which the processor's instruction does not."""
    bits = builder.bitcast(args[0], I32)
    half = builder.add(I32(0x7FFF), builder.and_(builder.lshr(bits, I32(16)), I32(1)))
    number = builder.fcmp_ordered("==", args[0], args[0])
    near = builder.select(number, builder.add(bits, half), builder.or_(bits, I32(0x400000)))
    return builder.trunc(builder.lshr(near, I32(16)), ir.IntType(16))


def _as_float32(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(args[0], I32), I32(16)), ir.FloatType())


def _as_it_is(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
    return args[0]


@intrinsic
def loaded(typing_context: Any, x: Any) -> Any:
    """An element as arithmetic takes it: a float as it is, the bits of a bfloat16 as a float32."""
    return (types.float32(x), _as_float32) if x == types.uint16 else (x(x), _as_it_is)


@intrinsic
def stored(typing_context: Any, value: Any, like: Any) -> Any:
    """A float as an array keeps it: where that is the bits of bfloat16, the nearest, ties to even; NaN stays one."""
    if like.dtype == types.uint16:
        return types.uint16(types.float32, like), _rounded
    return value(value, like), _as_it_is


def bits_of(x: Array) -> Array:
    """An array as a kernel with `loaded` and `stored` takes it: of bfloat16 the bits."""
    return x.view(np.uint16) if is_bfloat16(x) else x


@jit
def convert_blocks(x: Array, y: Array, start: int, stop: int) -> None:
    for block in range(start, stop):
        source, target = x[block * BLOCK : (block + 1) * BLOCK], y[block * BLOCK : (block + 1) * BLOCK]
        for j in range(source.size):
            target[j] = stored(loaded(source[j]), target)


def widened(x: Array) -> Array:
    """bfloat16 -> a new array of float32, of the same values."""
    return _converted(x, np.dtype(np.float32))


def narrowed(x: Array, dtype: np.dtype[Any]) -> Array:
    """float32 -> a new array of bfloat16, which is `dtype`, rounded."""
    return _converted(x, dtype)


def _converted(x: Array, dtype: np.dtype[Any]) -> Array:
    y, source = empty_on_lines(x.shape, dtype), bits_of(np.ascontiguousarray(x)).reshape(-1)
    grain = rows_worth_a_thread(BLOCK, COST)
    run_rows(convert_blocks, blocks(x.size, BLOCK), source, bits_of(y).reshape(-1), grain=grain)
    return y


# --- words of two ----------------------------------------------------------------------------------------------------


@jit
def interleave_rows(x: Array, x_row: int, columns: int, count: int, out: Array, start: int, stop: int) -> None:
    """Row k of `out`: the words of rows 2 k and 2 k + 1 of x, whose `count` rows are x_row apart; beyond them is 0."""
    for k in range(start, stop):
        lower, words = x[2 * k * x_row :], out[k]
        if 2 * k + 1 < count:
            upper = x[(2 * k + 1) * x_row :]
            for j in range(columns):
                words[j] = np.uint32(lower[j]) | np.uint32(np.uint32(upper[j]) << np.uint32(16))
        else:
            for j in range(columns):
                words[j] = np.uint32(lower[j])


@jit
def transpose_blocks(x: Array, x_row: int, columns: int, y: Array, y_row: int, start: int, stop: int) -> None:
    """y (columns, rows) = x (rows, columns) transposed, TALL columns of x at a time."""
    for block in range(start, stop):
        first = block * TALL
        transpose(x, first, x_row, y_row, min(TALL, columns - first), y, first * y_row, y_row)


def left_words(x: Array) -> Operand:
    """x (M, K) of bfloat16 as rows of words that lie one after the other."""
    if x.strides[1] == x.itemsize or x.shape[1] == 1:
        words = on_lines(_words_of_rows(x))
        return Operand(_flat(words), words.strides[0] // words.itemsize, 1)
    paired = _interleaved(x.T)
    words = empty_on_lines(paired.shape[::-1], np.uint32)
    depth, rows = paired.shape
    grain = rows_worth_a_thread(TALL * depth, COST)
    run_rows(
        transpose_blocks, blocks(rows, TALL), paired.reshape(-1), rows, rows, words.reshape(-1), depth, grain=grain
    )
    return Operand(words.reshape(-1), depth, 1)


def right_words(x: Array) -> Operand:
    """x (K, N) of bfloat16 as (K / 2, N) words, in the order in which x lies in memory."""
    if x.strides[0] == x.itemsize:
        words = _words_of_rows(x.T)
        return Operand(_flat(words), 1, words.strides[0] // words.itemsize)
    words = _interleaved(x)
    return Operand(words.reshape(-1), words.shape[1], 1)


def _words_of_rows(x: Array) -> Array:
    """Rows of K elements as rows of words, where they lie if they can be read so; a missing element is 0."""
    rows, count = x.shape
    row = x.strides[0]
    if count % 2 or row % 4 or row < 2 * count or x.ctypes.data % 4:
        whole = np.zeros((rows, count + count % 2), np.uint16)
        whole[:, :count] = x.view(np.uint16)
        return whole.view(np.uint32)
    return np.lib.stride_tricks.as_strided(x.view(np.uint16)[:, :2].view(np.uint32), (rows, count // 2), (row, 4))


def _flat(words: Array) -> Array:
    """All that lies between the first word and the last."""
    rows, columns = words.shape
    extent = (rows - 1) * (words.strides[0] // words.itemsize) + columns
    return np.lib.stride_tricks.as_strided(words, (extent,), (words.itemsize,))


def _interleaved(x: Array) -> Array:
    """x (K, N) of bfloat16 as (K / 2, N) words."""
    count, columns = x.shape
    bits = x.view(np.uint16) if x.strides[1] == x.itemsize and x.strides[0] > 0 else np.ascontiguousarray(x).view("u2")
    row = bits.strides[0] // bits.itemsize
    flat = np.lib.stride_tricks.as_strided(bits, ((count - 1) * row + columns,), (bits.itemsize,))
    words = np.empty((blocks(count, 2), columns), np.uint32)
    grain = rows_worth_a_thread(2 * columns, COST)
    run_rows(interleave_rows, len(words), flat, row, columns, count, words, grain=grain)
    return words
