"""How many fused multiply-adds this machine does in registers: what no matrix product, of whatever library, can exceed.

NumPy's products reach nine tenths of it, so that a figure above theirs need not be wrong; one above this is.
"""

from __future__ import annotations

import numpy as np

from bench.peaks import best_seconds
from minibert.kernels.cpu_threads import inline, jit, num_threads, run_rows

CHAINS, LINKS = 8, 16  # two units times a latency of four; and of such a length that a core's window holds all
VALUES = 1024  # of a thread: they stay in its first-level cache
PASSES = 2000


@inline
def four(p, x, c):  # type: ignore[no-untyped-def]
    p = p * x + c
    p = p * x + c
    p = p * x + c
    return p * x + c


@inline
def chain(p, x, c):  # type: ignore[no-untyped-def]
    return four(four(four(four(p, x, c), x, c), x, c), x, c)


@jit
def chains(values, out, factors, start, stop):  # type: ignore[no-untyped-def]
    c0, c1, c2, c3, c4, c5, c6, c7 = factors
    for row in range(start, stop):
        x, y = values[row], out[row]
        for _ in range(PASSES):
            for i in range(x.size):
                v = x[i]
                a = chain(y[i], v, c0) + chain(v, v, c1) + chain(c0, v, c2) + chain(c1, v, c3)
                b = chain(c2, v, c4) + chain(c3, v, c5) + chain(c4, v, c6) + chain(c5, v, c7)
                y[i] = a + b


def fma_gflops() -> float:
    """The rate of float32 on as many threads as are set, additions at the chains' ends left out."""
    threads = num_threads()
    values = np.full((threads, VALUES), 0.5, np.float32)
    out = np.zeros_like(values)
    factors = tuple(np.float32(0.1 * (i + 1)) for i in range(CHAINS))
    seconds = best_seconds(lambda: run_rows(chains, threads, values, out, factors, grain=1))
    return 2 * CHAINS * LINKS * VALUES * PASSES * threads / seconds * 1e-9
