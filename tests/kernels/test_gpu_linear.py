"""Products with the sums of an operand beside them, on the emulator: at edges where there is nothing to add."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.backends.base import BackendUnavailable
from minibert.backends.cuda.driver import Product
from minibert.kernels import OPS
from minibert.kernels.cross_entropy import IGNORED


@pytest.fixture(scope="module")
def emulator() -> Any:
    try:
        return backends.get("emulator")
    except BackendUnavailable as missing:
        pytest.skip(str(missing))


def products(emulator: Any, monkeypatch: pytest.MonkeyPatch) -> list[Product]:
    """Of all that the driver is asked for, from here on."""
    asked: list[Product] = []
    multiply = emulator.driver.multiply
    monkeypatch.setattr(emulator.driver, "multiply", lambda product: (asked.append(product), multiply(product))[1])
    return asked


@pytest.mark.parametrize("rows, outs, inputs", [(0, 3, 4), (5, 3, 0), (0, 3, 0), (5, 0, 4), (5, 3, 4)])
def test_a_bias_gradient_of_no_rows_no_inputs_or_no_outputs(emulator: Any, rows: int, outs: int, inputs: int) -> None:
    rng = np.random.default_rng(0)
    g, x = (rng.standard_normal((rows, columns)).astype(np.float32) for columns in (outs, inputs))
    results = emulator.run(OPS["linear_grad"], emulator.asarray(g), emulator.asarray(x))
    for found, expected in zip(results, (g.T @ x, g.sum(axis=0)), strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(emulator.numpy(found), expected, rtol=1e-6, atol=1e-6)


def test_the_gradients_of_a_layer_take_two_products_and_copy_nothing(
    emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    shapes = ((2, 5, 7), (2, 5, 4), (7, 4), (7,))
    g, x, weight, bias = (emulator.asarray(rng.standard_normal(s).astype(np.float16)) for s in shapes)
    asked = products(emulator, monkeypatch)
    linear = OPS["linear"]
    assert linear.vjp is not None
    gradients = linear.vjp(emulator.run, g, (), x, weight, bias)
    assert [d.shape for d in gradients] == [(2, 5, 4), (7, 4), (7,)]
    assert [p.epilogue for p in asked] == [None, "bias_gradient"]
    assert asked[1].a == (g.address, 7, 0, True) and asked[1].b == (x.address, 4, 0, False)
    assert asked[1].bias == gradients[2].address


def test_the_decoders_bias_gradient_is_scaled_like_its_weights(emulator: Any) -> None:
    """The product takes x scaled by the gradient of the loss; the sum beside it must be scaled by itself."""
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(s).astype(np.float32) for s in ((4, 3), (9, 3), (9,)))
    labels = np.array([1, IGNORED, 8, 0])
    op = OPS["linear_cross_entropy"]
    arrays = [emulator.asarray(a) for a in (x, weight, bias, labels)]
    outs = emulator.run(op, *arrays)
    assert op.vjp is not None
    g = emulator.asarray(np.float32(3))
    _, dweight, dbias, _ = op.vjp(emulator.run, g, outs, *arrays)
    dlogits = emulator.numpy(outs[1])
    np.testing.assert_allclose(emulator.numpy(dbias), 3 * dlogits.sum(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(emulator.numpy(dweight), 3 * dlogits.T @ x, rtol=1e-5, atol=1e-6)


def test_a_bias_gradient_takes_two_matrices_and_no_bias(emulator: Any) -> None:
    a, b, bias = (emulator.zeros(shape, np.float32) for shape in ((2, 3, 4), (4, 5), (5,)))
    with pytest.raises(ValueError, match="'bias_gradient' takes two matrices"):
        emulator.gemm(a, b, epilogue="bias_gradient")
    with pytest.raises(ValueError, match="and no bias"):
        emulator.gemm(a.reshape((6, 4)), b, bias=bias, epilogue="bias_gradient")


def test_in_tf32_the_product_is_rounded_and_the_sum_is_not(emulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "product_mode", "tf32")
    g = emulator.asarray(np.array([[1 + 2**-20], [1]], np.float32))
    x = emulator.asarray(np.ones((2, 1), np.float32))
    dweight, dbias = (emulator.numpy(d) for d in emulator.run(OPS["linear_grad"], g, x))
    assert dweight[0, 0] == 2 and dbias[0] == np.float32(2 + 2**-20)
