"""Where in a kernel's source an index lies beyond its array: Numba's bounds check, which knows no line, made to say.

For a process of which nothing is kept: what is compiled there notes its first such index at an address of that process
(`NUMBA_BOUNDSCHECK=1`, and compiled code is looked for and kept elsewhere).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, lowering

I64 = ir.IntType(64)
NUMBA = str(numba.__path__[0])
REFUSED, PLACE, INDEX, SIZE, AXIS = range(5)  # words


class RefusedIndex(NamedTuple):
    """An index that lies beyond an axis of an array."""

    file: str
    line: int
    element: int
    size: int
    axis: int


_words = np.zeros(AXIS + 1, np.int64)
_places: list[tuple[str, int]] = []  # where an array is indexed, in the order in which that was compiled
_here = ("", 0)


def note_bounds() -> None:
    """From here on, what Numba compiles notes the first index that its bounds check refuses, in any thread."""
    lower_instruction, check = lowering.Lower.lower_inst, cgutils.do_boundscheck

    def lower_here(self: Any, instruction: Any) -> Any:
        global _here
        if not instruction.loc.filename.startswith(NUMBA):
            _here = instruction.loc.filename, instruction.loc.line
        return lower_instruction(self, instruction)

    def check_here(context: Any, builder: Any, index: Any, size: Any, axis: Any = None) -> None:
        outside = builder.or_(
            builder.icmp_signed(">=", index, size), builder.icmp_signed("<", index, index.type(0))
        )  # fmt: skip
        with cgutils.if_unlikely(builder, outside):
            first = builder.icmp_signed("==", builder.atomic_rmw("add", _word(REFUSED), I64(1), "seq_cst"), I64(0))
            with builder.if_then(first):
                for word, value in ((PLACE, I64(len(_places))), (INDEX, index), (SIZE, size), (AXIS, axis or 0)):
                    value = I64(value) if isinstance(value, int) else value
                    builder.store(builder.sext(value, I64) if value.type.width < 64 else value, _word(word))
        _places.append(_here)
        check(context, builder, index, size, axis)

    lowering.Lower.lower_inst, cgutils.do_boundscheck = lower_here, check_here


def _word(number: int) -> Any:
    return I64(_words.ctypes.data + 8 * number).inttoptr(I64.as_pointer())


def refused_index() -> RefusedIndex | None:
    """The first index that was refused."""
    if not _words[REFUSED]:
        return None
    return RefusedIndex(*_places[_words[PLACE]], *map(int, _words[[INDEX, SIZE, AXIS]]))
