"""gumbel: y = x - log(-log v), v uniform on (0, 1): where y is largest in a row is a draw from softmax(x) of that row.

Gumbel, "Statistical theory of extreme values" (1954); Maddison, Tarlow, Minka, "A* sampling" (2014), section 2. The
draw is by the words of `stream`: element i has v = (2 (word i >> 9) + 1) / 2^24, which is exact in float32, so that
backends choose alike but where two elements are as near as their rounding. Shapes: x (M, V), y likewise, in float32
where x is in 16 bits: with fewer digits many elements would tie.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minibert.kernels.op import Array, BertSize, Op, Sample
from minibert.kernels.philox import Stream, random_words

SPACING = 2.0**-24  # of v: an odd number of these


def _gumbel(xp: Any, x: Array, *, stream: Stream) -> Array:
    words = random_words(stream, int(np.prod(x.shape)), xp).reshape(x.shape)
    v = xp.as_floats((words >> xp.uint32(9)) * xp.uint32(2) + xp.uint32(1), x) * SPACING
    y = x - xp.log(-xp.log(v))
    return y


def _bench(rng: np.random.Generator, size: BertSize) -> Sample:
    return Sample((rng.standard_normal((size.predicted, size.vocabulary)),), {"stream": Stream(1, 6, 1, 0)})


# There is no gradient through a draw.
gumbel = Op(
    "gumbel",
    _gumbel,
    draw=lambda draw, rows, columns: Sample((draw.floats(rows, columns),), {"stream": draw.stream()}),
    bench=_bench,
    wide_outputs=(0,),
)
