"""Functions on whole vector registers, for kernels whose loops Numba would not compile to them by itself.

Written in LLVM's vector types, for float32 and float64. Arrays are one-dimensional here; offsets, strides and sizes
count elements, and nothing is checked.
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

READ, SECOND_LEVEL, DATA = 0, 2, 1  # as llvm.prefetch has them: no write, a temporal locality of 2 of 3, no code
I32, INDEX = ir.IntType(32), ir.IntType(types.intp.bitwidth)


class Emitter:
    """Writes instructions on vectors of the elements of an intrinsic's arrays, for which `values` has pointers."""

    def __init__(self, context: Any, builder: ir.IRBuilder, kinds: Any, args: Any) -> None:
        self.builder, self.values = builder, list(args)
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
        first = self.builder.insert_element(nothing, self.builder.load(pointer), I32(0))
        return self.shuffle(first, nothing, [0] * self.lanes)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, in one instruction where the processor has it."""
        module, name = self.builder.module, f"llvm.fmuladd.v{self.lanes}{self.vector.element.intrinsic_name}"
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        return self.builder.call(module.globals.get(name) or ir.Function(module, kind, name), [a, b, c])


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
