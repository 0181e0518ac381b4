"""Functions on whole vector registers, for kernels whose loops Numba would not compile to them by itself.

Written in LLVM's vector types, for float32 and float64. Arrays are one-dimensional here; offsets, strides and sizes
count elements, and nothing is checked.

In products a word of 32 bits holds elements that follow one another along K, and multiplying two words is the sum of
their products: an int32 four bytes, unsigned on the left, signed on the right, whose sums are int32; an uint32 a pair
of bfloat16, whose sums are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

TRIPLE, _, FEATURES = cpu_target.target_context.codegen().magic_tuple()  # FEATURES: "+avx2,+fma,-avx512f,..."
VECTOR_BYTES = 64 if "+avx512f" in FEATURES else 32 if "+avx" in FEATURES else 16

BYTES, PAIRS = "int32", "uint32"  # dtypes of words
READ, SECOND_LEVEL, DATA = 0, 2, 1  # as llvm.prefetch has them: no write, a temporal locality of 2 of 3, no code
I32, INDEX = ir.IntType(32), ir.IntType(types.intp.bitwidth)


class Emitter:
    """Writes instructions on vectors of the elements of an intrinsic's arrays, for which `values` has pointers."""

    def __init__(self, context: Any, builder: ir.IRBuilder, kinds: Any, args: Any) -> None:
        self.builder, self.values = builder, list(args)
        self.pairs = any(isinstance(kind, types.Array) and str(kind.dtype) == PAIRS for kind in kinds)
        for n, kind in enumerate(kinds):
            if isinstance(kind, types.Array):
                self.values[n] = context.make_array(kind)(context, builder, args[n]).data
                self.item_bytes, item = kind.dtype.bitwidth // 8, context.get_value_type(kind.dtype)
        self.lanes = VECTOR_BYTES // self.item_bytes
        self.vector = ir.VectorType(item, self.lanes)

    def at(self, pointer: Any, offset: Any) -> Any:
        return self.builder.gep(pointer, [INDEX(offset) if isinstance(offset, int) else offset])

    def times(self, value: Any, factor: int) -> Any:
        return self.builder.mul(value, INDEX(factor))

    def load(self, pointer: Any) -> Any:
        loaded = self.builder.load(self.builder.bitcast(pointer, self.vector.as_pointer()))
        loaded.align = self.item_bytes
        return loaded

    def store(self, value: Any, pointer: Any) -> None:
        self.builder.store(value, self.builder.bitcast(pointer, self.vector.as_pointer())).align = self.item_bytes

    def prefetch(self, pointer: Any) -> None:
        """Have the line that lies there brought into the second-level cache; where nothing lies it is no fault."""
        module, name, byte = self.builder.module, "llvm.prefetch", ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = module.globals.get(name) or ir.Function(module, kind, name)
        self.builder.call(function, [self.builder.bitcast(pointer, byte), I32(READ), I32(SECOND_LEVEL), I32(DATA)])

    def shuffle(self, a: Any, b: Any, order: list[int]) -> Any:
        return self.builder.shuffle_vector(a, b, ir.VectorType(I32, self.lanes)(order))

    def broadcast(self, pointer: Any) -> Any:
        nothing = self.vector(ir.Undefined)
        value = self.builder.bitcast(self.builder.load(pointer), self.vector.element)
        first = self.builder.insert_element(nothing, value, I32(0))
        return self.shuffle(first, nothing, [0] * self.lanes)

    def zero(self) -> Any:
        return self.vector([0] * self.lanes if self.holds_words() else [0.0] * self.lanes)

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.add(a, b) if self.holds_words() else self.builder.fadd(a, b)

    def holds_words(self) -> bool:
        """Whether the elements are int32."""
        return bool(self.vector.element == I32)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, in one instruction where the processor has it."""
        if self.holds_words():
            return add_products_of_bytes(self.builder, self.lanes, c, a, b)
        if self.pairs:
            return add_products_of_pairs(self.builder, self.lanes, c, a, b)
        module, name = self.builder.module, f"llvm.fmuladd.v{self.lanes}{self.vector.element.intrinsic_name}"
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        return self.builder.call(module.globals.get(name) or ir.Function(module, kind, name), [a, b, c])


def add_products_of_bytes(builder: ir.IRBuilder, lanes: int, total: Any, a: Any, b: Any) -> Any:
    """total + the sum of the four products of the bytes in each word, those of `a` unsigned, of `b` signed: exact.

    vpdpbusd does it; else vpmaddwd adds two products of 16 bits (vpmaddubsw saturates); else LLVM writes what there is.
    An intrinsic that the processor lacks ends the process, so its features are asked first.
    """
    word = ir.VectorType(I32, lanes)

    def call(name: str, kind: Any, *arguments: Any) -> Any:
        signature = ir.FunctionType(kind, [a.type for a in arguments])
        function = builder.module.globals.get(name) or ir.Function(builder.module, signature, name)
        return builder.call(function, arguments)

    def shifted(value: Any, by: int, how: str) -> Any:
        return getattr(builder, how)(value, value.type([by] * (lanes if value.type == word else 2 * lanes)))

    if has_byte_products(lanes):
        return call(f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", word, total, a, b)
    pairs = PAIR_PRODUCTS.get(lanes)
    if pairs is None or not has(pairs[0]):
        for byte in range(4):
            left = builder.and_(shifted(a, 8 * byte, "lshr"), word([255] * lanes))
            right = shifted(shifted(b, 24 - 8 * byte, "shl"), 24, "ashr")
            total = builder.add(total, builder.mul(left, right))
        return total
    halves = ir.VectorType(ir.IntType(16), 2 * lanes)
    a, b = builder.bitcast(a, halves), builder.bitcast(b, halves)
    low = call(pairs[1], word, shifted(shifted(a, 8, "shl"), 8, "lshr"), shifted(shifted(b, 8, "shl"), 8, "ashr"))
    high = call(pairs[1], word, shifted(a, 8, "lshr"), shifted(b, 8, "ashr"))
    return builder.add(builder.add(total, low), high)


def add_products_of_pairs(builder: ir.IRBuilder, lanes: int, total: Any, a: Any, b: Any) -> Any:
    """fma(a0, b0, fma(a1, b1, total)) of the pairs in each word: the upper one first, as vdpbf16ps has it.

    That instruction also takes subnormal numbers for 0.
    """
    words, floats = ir.VectorType(I32, lanes), total.type
    a, b = builder.bitcast(a, words), builder.bitcast(b, words)

    def call(name: str, *arguments: Any) -> Any:
        kind = ir.FunctionType(floats, [argument.type for argument in arguments])
        return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), arguments)

    if has_pair_products(lanes):
        return call(f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}", total, a, b)
    upper = [builder.bitcast(builder.and_(x, words([0xFFFF0000] * lanes)), floats) for x in (a, b)]
    lower = [builder.bitcast(builder.shl(x, words([16] * lanes)), floats) for x in (a, b)]
    fused = f"llvm.fma.v{lanes}f32"
    return call(fused, *lower, call(fused, *upper, total))


# By lanes: what the processor must have, and the instruction that adds pairs of products of int16.
PAIR_PRODUCTS = {
    4: ("sse2", "llvm.x86.sse2.pmadd.wd"),
    8: ("avx2", "llvm.x86.avx2.pmadd.wd"),
    16: ("avx512bw", "llvm.x86.avx512.pmaddw.d.512"),
}


def has(feature: str) -> bool:
    return f"+{feature}" in FEATURES.split(",")


def has_byte_products(lanes: int) -> bool:
    """Whether vpdpbusd takes so many words."""
    return (has("avx512vnni") and (lanes == 16 or has("avx512vl"))) or (has("avxvnni") and lanes < 16)


def has_pair_products(lanes: int) -> bool:
    """Whether vdpbf16ps takes so many words."""
    return has("avx512bf16") and (lanes == 16 or has("avx512vl"))


def signature_of(*kinds: Any) -> Any:
    return types.void(*(kind if isinstance(kind, (types.Array, types.Boolean)) else types.intp for kind in kinds))


@intrinsic
def copy_vector(typing_context: Any, x: Any, x_start: Any, y: Any, y_start: Any) -> Any:
    """The elements of one vector, from x to y."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        emit = Emitter(context, builder, signature.args, args)
        x, x_start, y, y_start = emit.values
        emit.store(emit.load(emit.at(x, x_start)), emit.at(y, y_start))
        return context.get_dummy_value()

    return signature_of(x, x_start, y, y_start), generate


@intrinsic
def transpose_square(typing_context: Any, x: Any, x_start: Any, x_row: Any, y: Any, y_start: Any, y_row: Any) -> Any:
    """Y = X', both (lanes, lanes), of rows `x_row` and `y_row` apart."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        emit = Emitter(context, builder, signature.args, args)
        x, x_start, x_row, y, y_start, y_row = emit.values
        x, y, n = emit.at(x, x_start), emit.at(y, y_start), emit.lanes
        rows = [emit.load(emit.at(x, emit.times(x_row, i))) for i in range(n)]
        size = 1
        while size < n:  # blocks of this size change places across the diagonal, within blocks of twice the size
            first = [n + lane - size if lane & size else lane for lane in range(n)]
            second = [n + lane if lane & size else lane + size for lane in range(n)]
            for i in range(n):
                if not i & size:
                    a, b = rows[i], rows[i + size]
                    rows[i], rows[i + size] = emit.shuffle(a, b, first), emit.shuffle(a, b, second)
            size *= 2
        for i, row in enumerate(rows):
            emit.store(row, emit.at(y, emit.times(y_row, i)))
        return context.get_dummy_value()

    return signature_of(x, x_start, x_row, y, y_start, y_row), generate


def _row_reduction(identity: float, combine: Callable[[ir.IRBuilder, Any, Any], Any]) -> Any:
    """x[start : start + count] combined, vector by vector and then the lanes; all of the last vector is read.

    LLVM's own sum or maximum of a loop takes 64 float32 at once, and what is left over one by one.
    """

    @intrinsic
    def reduce_row(typing_context: Any, x: Any, start: Any, count: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            emit = Emitter(context, builder, signature.args, args)
            x, start, count = emit.values
            lanes, indices = emit.lanes, ir.VectorType(INDEX, emit.lanes)
            nothing, zeros = emit.vector([identity] * lanes), ir.VectorType(ir.IntType(32), lanes)([0] * lanes)

            def spread(value: Any) -> Any:
                first = builder.insert_element(indices(ir.Undefined), value, ir.IntType(32)(0))
                return builder.shuffle_vector(first, indices(ir.Undefined), zeros)

            before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            left = builder.sub(spread(count), indices(list(range(lanes))))
            builder.branch(loop)
            builder.position_at_end(loop)
            j, sofar = builder.phi(INDEX), builder.phi(emit.vector)
            inside = builder.icmp_signed("<", spread(j), left)
            value = builder.select(inside, emit.load(emit.at(x, builder.add(start, j))), nothing)
            found, following = combine(builder, value, sofar), builder.add(j, INDEX(lanes))
            for phi, at_first, then in ((j, INDEX(0), following), (sofar, nothing, found)):
                phi.add_incoming(at_first, before)
                phi.add_incoming(then, loop)
            builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
            builder.position_at_end(after)
            while lanes > 1:
                lanes //= 2
                turned = emit.shuffle(found, found, [(lane + lanes) % emit.lanes for lane in range(emit.lanes)])
                found = combine(builder, found, turned)
            return builder.extract_element(found, ir.IntType(32)(0))

        return x.dtype(x, types.intp, types.intp), generate

    return reduce_row


row_sum = _row_reduction(0.0, lambda builder, a, b: builder.fadd(a, b))
# A NaN is passed over: whoever subtracts the maximum meets it all the same.
row_max = _row_reduction(-math.inf, lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
