"""What is asked of the process in which a kernel is tried on guarded arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minibert.kernels import Op
from minibert.kernels.drawing import Drawing, Drawn
from minibert.lab.conform.case import rounded

REPEATS = 1000  # calls on the same input
Given = tuple[tuple[np.ndarray, ...], dict[str, Any]]  # arrays, and parameters


class Job(NamedTuple):
    """An op's kernel, by names that another process understands, and what to call it on."""

    op: str
    backend: str
    kernel: str  # FILE.py:FUNCTION or package.module:FUNCTION
    dtype: str
    threads: int
    inputs: Sequence[Given | Drawn]
    repeated: int  # the number of the input that is called again and again
    repeat_seconds: float
    only: tuple[str, int] | None = None  # one way and input of a call, to look at it again


def given(op: Op, one: Given | Drawn, dtype: str) -> Given:
    """The arrays and parameters of an input of a job."""
    if not isinstance(one, Drawn):
        return one
    assert op.draw is not None
    return rounded(op, op.draw(Drawing(one), **one.sizes), dtype)
