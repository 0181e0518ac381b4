"""The innermost part of a matrix product, in the vector registers of one core.

This is the microkernel of Goto and van de Geijn ("Anatomy of High-Performance Matrix Multiplication", 2008) and of BLIS
(Van Zee and van de Geijn, 2015): MR rows of A times a micropanel of B, with all sums in registers. A loop in Python
gives no hold on what stays in a register, so these functions are written in LLVM's vector types, for float32 and
float64.

Arrays are one-dimensional here; offsets, strides and sizes count elements, and nothing is checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

FEATURES = cpu_target.target_context.codegen().magic_tuple()[2]  # that Numba compiles for: "+avx2,+fma,-avx512f,..."
VECTOR_BYTES = 64 if "+avx512f" in FEATURES else 32 if "+avx" in FEATURES else 16
VECTORS = 3  # that a micropanel is wide, at most
MR = 8 if "+avx512f" in FEATURES or "+neon" in FEATURES else 4  # 32 registers, or 16: MR * VECTORS sums, B, one of A

I32, INDEX = ir.IntType(32), ir.IntType(types.intp.bitwidth)


class _Emitter:
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


def _signature(*kinds: Any) -> Any:
    return types.void(*(kind if isinstance(kind, (types.Array, types.Boolean)) else types.intp for kind in kinds))


def _microkernel(vectors: int) -> Any:
    @intrinsic
    def microkernel(
        typing_context: Any, a: Any, a_start: Any, a_row: Any, a_k: Any, rows: Any, b: Any, b_start: Any, depth: Any,
        c: Any, c_start: Any, c_row: Any, add: Any,
    ) -> Any:  # fmt: skip
        """C = A B, or C += A B.

        A (rows, depth) has strides a_row and a_k, and from 1 to MR rows; B (depth, vectors * lanes) is contiguous; of
        C (MR, vectors * lanes), whose rows are c_row apart, those from `rows` on are of no use.
        """

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            _write_microkernel(_Emitter(context, builder, signature.args, args), vectors)
            return context.get_dummy_value()

        return _signature(a, a_start, a_row, a_k, rows, b, b_start, depth, c, c_start, c_row, add), generate

    return microkernel


microkernel_1, microkernel_2, microkernel_3 = (_microkernel(vectors) for vectors in (1, 2, 3))


def _write_microkernel(emit: _Emitter, vectors: int) -> None:
    builder = emit.builder
    a, a_start, a_row, a_k, rows, b, b_start, depth, c, c_start, c_row, add = emit.values
    a, b, c = emit.at(a, a_start), emit.at(b, b_start), emit.at(c, c_start)
    last = builder.sub(rows, INDEX(1))
    a_rows = []
    for i in range(MR):  # a row that A lacks is its last one again
        row = INDEX(i)
        a_rows.append(emit.at(a, builder.mul(a_row, builder.select(builder.icmp_signed("<", row, last), row, last))))

    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    k, a_column = builder.phi(INDEX), builder.phi(INDEX)
    sums = [builder.phi(emit.vector) for _ in range(MR * vectors)]
    b_row = emit.at(b, emit.times(k, vectors * emit.lanes))
    b_vectors = [emit.load(emit.at(b_row, v * emit.lanes)) for v in range(vectors)]
    totals = []
    for i in range(MR):
        value = emit.broadcast(emit.at(a_rows[i], a_column))
        totals += [emit.multiply_add(value, b_vectors[v], sums[i * vectors + v]) for v in range(vectors)]
    following = builder.add(k, INDEX(1))
    for phi, after_it in ((k, following), (a_column, builder.add(a_column, a_k))):
        phi.add_incoming(INDEX(0), before)
        phi.add_incoming(after_it, loop)
    for phi, total in zip(sums, totals, strict=True):
        phi.add_incoming(emit.vector([0.0] * emit.lanes), before)
        phi.add_incoming(total, loop)
    builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
    builder.position_at_end(after)

    with builder.if_else(add) as branches:
        for branch, adds in zip(branches, (True, False), strict=True):
            with branch:
                for i in range(MR):
                    c_row_i = emit.at(c, emit.times(c_row, i))
                    for v in range(vectors):
                        place, total = emit.at(c_row_i, v * emit.lanes), totals[i * vectors + v]
                        emit.store(builder.fadd(emit.load(place), total) if adds else total, place)


@intrinsic
def copy_vector(typing_context: Any, x: Any, x_start: Any, y: Any, y_start: Any) -> Any:
    """The elements of one vector, from x to y."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        emit = _Emitter(context, builder, signature.args, args)
        x, x_start, y, y_start = emit.values
        emit.store(emit.load(emit.at(x, x_start)), emit.at(y, y_start))
        return context.get_dummy_value()

    return _signature(x, x_start, y, y_start), generate


@intrinsic
def transpose_square(typing_context: Any, x: Any, x_start: Any, x_row: Any, y: Any, y_start: Any, y_row: Any) -> Any:
    """Y = X', both (lanes, lanes), of rows `x_row` and `y_row` apart."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        emit = _Emitter(context, builder, signature.args, args)
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

    return _signature(x, x_start, x_row, y, y_start, y_row), generate
