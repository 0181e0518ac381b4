"""Products of words in the processor's tile registers (Intel's Advanced Matrix Extensions).

A tile holds up to 16 rows of 64 bytes. One instruction multiplies 16 rows of A, 16 words long, with 16 rows of B, 16
columns wide, as micropanels have them: many times what one on vectors does in the same time. The operation is in
Intel's Software Developer's Manual, volume 2, under TDPBUSD and TDPBF16PS: for each 32 terms the products of even
and of odd terms are summed apart, fused and rounded to nearest even, and both sums then added to C; subnormal numbers
count as 0. Whole numbers are exact.

Arrays are one-dimensional here; offsets, strides and sizes count elements, and nothing is checked.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from minibert.kernels.cpu.vectors import (
    BYTES,
    INDEX,
    PAIR_PRODUCTS,
    PAIRS,
    VECTOR_BYTES,
    has,
    has_byte_products,
    has_pair_products,
    signature_of,
)

TILE_ROWS = 16
WORD = 4  # bytes
A, B, A_REST, B_REST = 3, 4, 5, 6  # tile registers; the first three hold sums
ARCH_PRCTL, REQUEST, TILE_DATA = 158, 0x1023, 18  # the system call; ARCH_REQ_XCOMP_PERM; XFEATURE_XTILEDATA
I8, BYTE = ir.IntType(8), ir.IntType(8).as_pointer()


def _permitted() -> bool:
    """Whether the system lets this process use tiles, which it must be asked for once."""
    if not has("amx-tile") or not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST, TILE_DATA) == 0)


PERMITTED = VECTOR_BYTES == 64 and _permitted()
# What multiplies, by the dtype that words have.
INSTRUCTIONS = {
    dtype: instruction
    for dtype, feature, instruction in ((BYTES, "amx-int8", "tdpbusd"), (PAIRS, "amx-bf16", "tdpbf16ps"))
    if PERMITTED and has(feature)
}


def byte_instructions() -> str:
    """What multiplies bytes here."""
    lanes = VECTOR_BYTES // WORD
    if BYTES in INSTRUCTIONS:
        return f"{INSTRUCTIONS[BYTES]} of tiles"
    if has_byte_products(lanes):
        return f"vpdpbusd of {8 * VECTOR_BYTES} bits"
    pairs = PAIR_PRODUCTS.get(lanes)
    return f"vpmaddwd of {8 * VECTOR_BYTES} bits" if pairs is not None and has(pairs[0]) else "products of int32"


def pair_instructions() -> str:
    """What multiplies bfloat16 here."""
    if PAIRS in INSTRUCTIONS:
        return f"{INSTRUCTIONS[PAIRS]} of tiles"
    bits = f"of {8 * VECTOR_BYTES} bits"
    return f"vdpbf16ps {bits}" if has_pair_products(VECTOR_BYTES // WORD) else f"fused float32 {bits}"


class _Tiles:
    """Writes instructions on tiles."""

    def __init__(self, context: Any, builder: ir.IRBuilder, kinds: Any, args: Any) -> None:
        self.builder, self.values = builder, list(args)
        for n, kind in enumerate(kinds):
            if isinstance(kind, types.Array):
                self.values[n] = context.make_array(kind)(context, builder, args[n]).data

    def call(self, name: str, *arguments: Any) -> None:
        kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
        function = self.builder.module.globals.get(f"llvm.x86.{name}")
        self.builder.call(function or ir.Function(self.builder.module, kind, f"llvm.x86.{name}"), arguments)

    def at(self, pointer: Any, offset: Any) -> Any:
        return self.builder.gep(pointer, [INDEX(offset) if isinstance(offset, int) else offset])

    def load(self, tile: int, pointer: Any, row: Any) -> None:
        self.call("tileloadd64", I8(tile), self.builder.bitcast(pointer, BYTE), self.builder.mul(row, INDEX(WORD)))

    def store(self, tile: int, pointer: Any, row: Any) -> None:
        self.call("tilestored64", I8(tile), self.builder.bitcast(pointer, BYTE), self.builder.mul(row, INDEX(WORD)))


@intrinsic
def by_tiles(typing_context: Any, words: Any) -> Any:
    """Whether an array of such words is multiplied here: known when a kernel is compiled."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return ir.IntType(1)(str(words.dtype) in INSTRUCTIONS)

    return types.boolean(words), generate


@intrinsic
def set_tiles(typing_context: Any, words: Any, rows: Any, depth: Any) -> Any:
    """Prepare for products of `rows` rows of A, from 1 to TILE_ROWS, and `depth` words; all tiles are cleared."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        if str(words.dtype) not in INSTRUCTIONS:
            return context.get_dummy_value()
        write, (_, rows, depth) = _Tiles(context, builder, signature.args, args), args
        with builder.goto_entry_block():
            place = builder.bitcast(builder.alloca(I8, 64), BYTE)
        line = ir.VectorType(I8, 64)
        builder.store(line([1] + [0] * 63), _as(builder, place, line)).align = 1
        rest = builder.and_(depth, INDEX(TILE_ROWS - 1))
        some = builder.select(builder.icmp_signed("==", rest, INDEX(0)), INDEX(TILE_ROWS), rest)
        whole = INDEX(TILE_ROWS)
        heights = {**dict.fromkeys((0, 1, 2, A, A_REST), rows), B: whole, B_REST: some}
        widths = {**dict.fromkeys(heights, whole), A_REST: some}
        for tile, height in heights.items():  # as the manual lays out palette 1: 16 bits of bytes, then 8 of rows
            columns = builder.trunc(builder.mul(widths[tile], INDEX(WORD)), ir.IntType(16))
            builder.store(columns, _as(builder, write.at(place, 16 + 2 * tile), ir.IntType(16))).align = 1
            builder.store(builder.trunc(height, I8), write.at(place, 48 + tile))
        write.call("ldtilecfg", place)
        return context.get_dummy_value()

    return signature_of(words, rows, depth), generate


def _as(builder: ir.IRBuilder, pointer: Any, kind: Any) -> Any:
    return builder.bitcast(pointer, kind.as_pointer())


@intrinsic
def release_tiles(typing_context: Any, words: Any) -> Any:
    """After the last product: the system then saves less when threads change places."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        if str(words.dtype) in INSTRUCTIONS:
            _Tiles(context, builder, (), ()).call("tilerelease")
        return context.get_dummy_value()

    return signature_of(words), generate


def _multiplying(vectors: int) -> Any:
    @intrinsic
    def multiply_tiles(
        typing_context: Any, a: Any, a_start: Any, a_row: Any, b: Any, b_start: Any, depth: Any, c: Any, c_start: Any,
        c_row: Any, add: Any,
    ) -> Any:  # fmt: skip
        """C = A B, or C += A B, once `set_tiles` has been told the rows and the depth.

        A (rows, depth) has rows of contiguous words; B (depth, vectors * 16) is contiguous; C has as many columns.
        """

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            if str(b.dtype) in INSTRUCTIONS:
                _write_product(_Tiles(context, builder, signature.args, args), vectors, INSTRUCTIONS[str(b.dtype)])
            return context.get_dummy_value()

        return signature_of(a, a_start, a_row, b, b_start, depth, c, c_start, c_row, add), generate

    return multiply_tiles


multiply_tiles_1, multiply_tiles_2, multiply_tiles_3 = (_multiplying(vectors) for vectors in (1, 2, 3))


def _write_product(write: _Tiles, vectors: int, instruction: str) -> None:
    builder = write.builder
    a, a_start, a_row, b, b_start, depth, c, c_start, c_row, add = write.values
    a, b, c = write.at(a, a_start), write.at(b, b_start), write.at(c, c_start)
    b_row = INDEX(vectors * TILE_ROWS)

    with builder.if_else(add) as (adding, not_adding):
        with adding:
            for v in range(vectors):
                write.load(v, write.at(c, v * TILE_ROWS), c_row)
        with not_adding:
            for v in range(vectors):
                write.call("tilezero", I8(v))

    def multiply(k: Any, left: int, right: int) -> None:
        write.load(left, write.at(a, k), a_row)
        b_here = write.at(b, builder.mul(k, b_row))
        for v in range(vectors):
            write.load(right, write.at(b_here, v * TILE_ROWS), b_row)
            write.call(instruction, I8(v), I8(left), I8(right))

    whole = builder.and_(depth, INDEX(-TILE_ROWS))
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.cbranch(builder.icmp_signed(">", whole, INDEX(0)), loop, after)
    builder.position_at_end(loop)
    k = builder.phi(INDEX)
    multiply(k, A, B)
    following = builder.add(k, INDEX(TILE_ROWS))
    k.add_incoming(INDEX(0), before)
    k.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, whole), loop, after)
    builder.position_at_end(after)
    with builder.if_then(builder.icmp_signed("<", whole, depth)):
        multiply(whole, A_REST, B_REST)
    for v in range(vectors):
        write.store(v, write.at(c, v * TILE_ROWS), c_row)
