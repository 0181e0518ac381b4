"""Losses of heads on a backend that stores 16 bits."""

from __future__ import annotations

import numpy as np
import pytest

from minibert import backends
from minibert.model.losses import sequence_loss
from minibert.model.tensor import Tensor
from tests.emulator_device import needs_compiler


@needs_compiler
@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_targets_keep_their_digits_beside_predictions_in_16_bits(kind: str) -> None:
    emulator, numpy = backends.get("emulator"), backends.get("numpy")
    predictions, targets = np.array([[1.0, 0.5], [-2.0, 0.25]]), np.array([[0.7003, 0.1], [1.0, 0.3]])
    on_device = Tensor(emulator.asarray(predictions, dtype="float16"), emulator, requires_grad=True)
    loss = sequence_loss(on_device, targets, kind)
    loss.backward()
    expected = sequence_loss(Tensor(predictions, numpy, requires_grad=True), targets, kind)
    np.testing.assert_allclose(loss.item(), expected.item(), rtol=1e-6)
    assert on_device.grad.dtype == np.float16
