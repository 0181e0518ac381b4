"""Tests of one's own, with the plugin's fixtures.

pytest -p minibert.conformance --backend shelf_backend.py:ShelfBackend -m "not conformance" own_tests.py
"""

from collections.abc import Callable

import numpy as np

from minibert import Tensor, apply
from minibert.backends import Backend
from minibert.kernels import OPS
from minibert.kernels.softmax import softmax


def test_softmax_on_rows_that_are_ours(backend: Backend, assert_within_bound: Callable[..., None]) -> None:
    x = np.float32([[1e4, 0, -1e4], [3, 3, 3]])
    got = backend.numpy(backend.run(softmax, backend.asarray(x)))
    assert_within_bound("softmax", [x], {}, got)


def test_the_gradient_of_an_op_on_our_shapes(gradcheck: Callable[..., None]) -> None:
    rng = np.random.default_rng(0)
    gradcheck(OPS["linear"], rng.standard_normal((2, 3)), rng.standard_normal((4, 3)), rng.standard_normal(4))


def test_the_gradient_of_a_function(gradcheck: Callable[..., None]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return apply(softmax, q @ k.transpose(1, 0) * 0.5) @ v

    rng = np.random.default_rng(1)
    gradcheck(attend, *(rng.standard_normal((3, 4)) for _ in range(3)))
