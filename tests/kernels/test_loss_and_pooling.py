"""Losses against numbers, mean pooling, normalize: what they say of missing targets and wrong offsets, and torch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.kernels import OPS
from minibert.kernels.drawing import IGNORED
from minibert.model.tensor import Tensor, apply
from tests.emulator_device import needs_compiler

EMULATOR = pytest.param("emulator", marks=needs_compiler)
NUMPY = backends.get("numpy")
RNG = np.random.default_rng(0)
Z, T = RNG.standard_normal((5, 7)) * 4, RNG.uniform(0, 1, (5, 7))
LENGTHS = (3, 1, 5)
CU_SEQLENS = np.cumsum([0, *LENGTHS]).astype(np.int32)


@pytest.mark.parametrize("name", ["numpy", EMULATOR])
def test_what_is_ignored_counts_for_nothing(name: str) -> None:
    backend = backends.get(name)

    def run(z: np.ndarray, t: np.ndarray) -> list[np.ndarray]:
        given = (backend.asarray(np.float32(a)) for a in (z, t))
        return [backend.numpy(a) for a in backend.run(OPS["binary_cross_entropy"], *given)]

    rows = T.copy()
    rows[[0, 3]] = IGNORED
    loss, gradient, *_ = run(Z, rows)
    kept = [1, 2, 4]
    expected, expected_gradient, *_ = run(Z[kept], T[kept])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[kept], expected_gradient, rtol=1e-6)
    assert not gradient[[0, 3]].any()
    assert all(not a.any() for a in run(Z, np.full_like(T, IGNORED))), "the loss of none, and its gradients, are 0"


@pytest.mark.parametrize("name", ["numpy", EMULATOR])
def test_every_number_is_a_target_of_a_regression(name: str) -> None:
    backend = backends.get(name)
    given = (backend.asarray(np.full((2, 1), value, np.float32)) for value in (-99, IGNORED))
    loss, gradient = (backend.numpy(a) for a in backend.run(OPS["mse_loss"], *given))
    assert loss == 1 and (gradient == 1).all()


@pytest.mark.parametrize("name", ["numba", EMULATOR])
@pytest.mark.parametrize("ends", [[0, 4, 3, 9], [1, 9], [0, 10]])
def test_offsets_that_do_not_fit_are_refused(ends: list[int], name: str) -> None:
    backend = backends.get(name)
    given = backend.asarray(np.zeros((9, 2), np.float32)), backend.asarray(np.array(ends, np.int32))
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to at most 9 rows"):
        backend.run(OPS["mean_pool"], *given)


def torch_mean_pool(torch: Any, x: Any) -> Any:
    return torch.stack([part.mean(0) for part in x.split(LENGTHS)])


@pytest.mark.parity
@pytest.mark.parametrize(
    ("op", "arrays", "theirs"),
    [
        (
            "binary_cross_entropy",
            (Z, T),
            lambda torch, z, t: torch.nn.functional.binary_cross_entropy_with_logits(z, t),
        ),
        ("mse_loss", (Z, T), lambda torch, z, t: torch.nn.functional.mse_loss(z, t)),
        ("normalize", (Z,), lambda torch, z: torch.nn.functional.normalize(z)),
        ("normalize", (Z * 1e-14,), lambda torch, z: torch.nn.functional.normalize(z)),  # below eps
        ("mean_pool", (RNG.standard_normal((9, 4)), CU_SEQLENS), lambda torch, x, _: torch_mean_pool(torch, x)),
    ],
)
def test_values_and_gradients_are_those_of_torch(op: str, arrays: tuple[np.ndarray, ...], theirs: Any) -> None:
    import torch

    leaves = [Tensor(a.copy(), NUMPY, requires_grad=a.dtype.kind == "f") for a in arrays]
    out = apply(OPS[op], *leaves)
    w = np.random.default_rng(1).standard_normal(out.shape)
    out.backward(w)
    there = [torch.tensor(a, requires_grad=a.dtype.kind == "f") for a in arrays]
    expected = theirs(torch, *there)
    expected.backward(torch.tensor(w))
    np.testing.assert_allclose(out.numpy(), expected.detach().numpy(), rtol=1e-12)
    for leaf, t in zip(leaves, there, strict=True):
        if leaf.requires_grad:
            np.testing.assert_allclose(leaf.grad, t.grad.numpy(), rtol=1e-9, atol=1e-15)
