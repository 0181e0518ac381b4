"""The arithmetics that an evaluation may be held to."""

from __future__ import annotations

from typing import NamedTuple


class Precision(NamedTuple):
    """The arithmetic under test: each primitive rounds with `roundoff`; numbers below `tiny` may be flushed to zero."""

    roundoff: float
    tiny: float
    largest: float


PRECISIONS = {
    "float64": Precision(2.0**-53, 2.0**-1022, (2 - 2.0**-52) * 2.0**1023),
    "float32": Precision(2.0**-24, 2.0**-126, (2 - 2.0**-23) * 2.0**127),
    "float16": Precision(2.0**-11, 2.0**-14, (2 - 2.0**-10) * 2.0**15),
    "bfloat16": Precision(2.0**-8, 2.0**-126, (2 - 2.0**-7) * 2.0**127),
    # of what an op makes in whole numbers
    "uint8": Precision(2.0**-8, 1.0, 2.0**8 - 1),
    "int32": Precision(2.0**-31, 1.0, 2.0**31 - 1),
}


PRODUCTS = {"float32": 0.0, "tf32": 2.0**-11}  # what an operand of a product loses first, by the mode of products
