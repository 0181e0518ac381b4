"""A demand to what is from outside: an op's kernel takes empty arrays wherever its formula does.

A batch that a filter has emptied must not end a run. The inputs are the op's own samples, in which all axes of one
length are cut to nothing; what NumPy does not evaluate without a warning (the maximum of no elements) is not asked.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from itertools import islice

import numpy as np

from minibert.kernels import Array, Op
from minibert.kernels.array_module import numpy_module
from minibert.lab.conform.case import Case, Input, Tally
from minibert.lab.conform.judge import expect, stored_as

SAMPLES = 4  # of each op that are cut: the first are small


def empty_inputs(case: Case, tally: Tally) -> None:
    """Where an axis is cut to length 0 and the formula still has an answer, shapes, dtypes and elements are right."""
    for one in empty_samples(case.op, case.dtype, case.seed, case.backend.product_mode):
        tally.judge(case, one, case.run(case.upload(one.arrays), one), ", cut to nothing")
        tally.inputs += 1


@lru_cache(maxsize=128)
def empty_samples(op: Op, dtype: str, seed: int, products: str) -> tuple[Input, ...]:
    """The samples of `op`, each with one length of axis cut to 0 in every array, that its formula takes."""
    found: dict[tuple[object, ...], Input] = {}
    for number, (arrays, params) in enumerate(islice(op.samples(np.random.default_rng(seed)), SAMPLES)):
        given = [np.asarray(a, kind) for a, kind in zip(arrays, stored_as(op, arrays, dtype), strict=True)]
        columns = {a.shape[-1] for a in given if a.ndim > 1}  # rows without a column are nothing that anybody has
        for length in sorted({n for a in given for n in a.shape if n > 1} - columns):
            cut = tuple(_without(a, length) for a in given)
            key = (*(a.shape for a in cut), str(params))
            if key not in found and _is_answered(op, cut, dict(params)):
                found[key] = Input(number, cut, dict(params), expect(op, cut, params, dtype, products))
    return tuple(found.values())


def _without(array: np.ndarray, length: int) -> np.ndarray:
    return array[tuple(slice(0) if n == length else slice(None) for n in array.shape)].copy()


def _is_answered(op: Op, arrays: tuple[Array, ...], params: dict[str, object]) -> bool:
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            op.formula(numpy_module, *arrays, **params)
        except Exception:  # shapes that no longer fit, ids of rows that are gone, a mean of nothing
            return False
    return True
