"""The innermost part of a matrix product, in the vector registers of one core.

This is the microkernel of Goto and van de Geijn ("Anatomy of High-Performance Matrix Multiplication", 2008) and of BLIS
(Van Zee and van de Geijn, 2015): MR rows of A times a micropanel of B, with all sums in registers. A loop in Python
gives no hold on what stays in a register, so these functions are written in LLVM's vector types, for float32, float64
and words of four bytes.

Arrays are one-dimensional here; offsets, strides and sizes count elements, and nothing is checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from minibert.kernels.cpu.vectors import FEATURES, INDEX, TRIPLE, Emitter, signature_of

VECTORS = 3  # that a micropanel is wide, at most
AHEAD = 32  # rows of a micropanel: what is so far ahead is asked for, six kilobytes at most
# rows: 32 registers, or 16, hold MR * VECTORS sums, a row of B and an element of A
MR = 8 if "+avx512f" in FEATURES or TRIPLE.startswith(("aarch64", "arm64")) else 4


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
            _write_microkernel(Emitter(context, builder, signature.args, args), vectors)
            return context.get_dummy_value()

        return signature_of(a, a_start, a_row, a_k, rows, b, b_start, depth, c, c_start, c_row, add), generate

    return microkernel


microkernel_1, microkernel_2, microkernel_3 = (_microkernel(vectors) for vectors in (1, 2, 3))


def _write_microkernel(emit: Emitter, vectors: int) -> None:
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
    for v in range(vectors):  # what was packed long ago comes from memory, faster so than the processor foresees it
        emit.prefetch(emit.at(b_row, (v + AHEAD * vectors) * emit.lanes))
    totals = []
    for i in range(MR):
        value = emit.broadcast(emit.at(a_rows[i], a_column))
        totals += [emit.multiply_add(value, b_vectors[v], sums[i * vectors + v]) for v in range(vectors)]
    following = builder.add(k, INDEX(1))
    for phi, after_it in ((k, following), (a_column, builder.add(a_column, a_k))):
        phi.add_incoming(INDEX(0), before)
        phi.add_incoming(after_it, loop)
    for phi, total in zip(sums, totals, strict=True):
        phi.add_incoming(emit.zero(), before)
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
                        emit.store(emit.add(emit.load(place), total) if adds else total, place)
