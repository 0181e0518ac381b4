"""Rows in 8 bits and their products on the emulator: the bits of the formulas in float32, as NumPy evaluates them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.backends.base import BackendUnavailable, dtype_of
from minibert.kernels import OPS
from minibert.kernels.array_module import numpy_module
from minibert.kernels.int8 import MOST_INPUTS, SMALLEST, quantize_weight

QUANTIZE, LINEAR = OPS["quantize_rows"], OPS["linear_int8"]
Make = Callable[[np.random.Generator, int, int], np.ndarray]


@pytest.fixture(scope="module")
def emulator() -> Any:
    try:
        return backends.get("emulator")
    except BackendUnavailable as missing:
        pytest.skip(str(missing))


def on(emulator: Any, op: Any, *arrays: np.ndarray) -> list[np.ndarray]:
    result = emulator.run(op, *map(emulator.asarray, arrays))
    return [emulator.numpy(r) for r in (result if isinstance(result, tuple) else (result,))]


def by_formula(op: Any, *arrays: np.ndarray) -> list[np.ndarray]:
    result = op.formula(numpy_module, *arrays)
    made = result if isinstance(result, tuple) else (result,)
    return [r.astype(op.whole_outputs.get(k, np.float32)) for k, r in enumerate(made)]


def normal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return rng.standard_normal((rows, columns))


def ties(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """From 0 to 255 in halves: the scale is 1, and every other number lies between two levels."""
    x = rng.integers(0, 511, (rows, columns)) / 2
    x[:, 0], x[:, -1] = 255, 0
    return x


def outlier(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    x = normal(rng, rows, columns)
    x[:, columns // 2] = rng.choice([-1e4, 1e4, 3e38], rows)
    return x


ROWS: dict[str, Make] = {
    "normal": normal,
    "all above 0": lambda *s: np.abs(normal(*s)) + 0.1,
    "all below 0": lambda *s: -np.abs(normal(*s)) - 0.1,
    "ties": ties,
    "ties about 0": lambda *s: ties(*s) - 127.5,
    "zeros": lambda rng, *shape: np.zeros(shape),
    "minus zeros": lambda rng, *shape: np.full(shape, -0.0),
    "constant": lambda rng, *shape: np.full(shape, -1.7),
    "outlier": outlier,
    "tiny": lambda *s: normal(*s) * 1e-38,
    "about the floor of the scale": lambda *s: normal(*s) * SMALLEST * 255,
    "huge": lambda *s: (normal(*s) * 1e38).clip(-3e38, 3e38),  # its range may be infinite
}
SHAPES = ((1, 1), (3, 7), (5, 64), (2, 130), (3, 1028))


@pytest.mark.parametrize("kind", ROWS)
def test_rows_in_8_bits_have_the_bits_of_the_formula(emulator: Any, kind: str) -> None:
    for shape in SHAPES:
        with np.errstate(over="ignore"):
            x = ROWS[kind](np.random.default_rng(0), *shape).astype(np.float32)
            expected = by_formula(QUANTIZE, x)
        for found, right in zip(on(emulator, QUANTIZE, x), expected, strict=True):
            assert found.dtype == right.dtype and found.shape == right.shape
            np.testing.assert_array_equal(found, right, err_msg=f"{shape}")
            assert found.tobytes() == right.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_stored_in_16_bits_are_quantised_in_float32(emulator: Any, dtype: str) -> None:
    for shape in SHAPES:
        x = emulator.numpy(emulator.asarray(normal(np.random.default_rng(1), *shape), dtype=dtype_of(dtype)))
        expected = by_formula(QUANTIZE, x.astype(np.float32))
        for found, right in zip(on(emulator, QUANTIZE, x), expected, strict=True):
            np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 6, 200])
def test_what_is_no_number_reaches_the_scale_of_its_row_alone(emulator: Any, wrong: float, column: int) -> None:
    x = normal(np.random.default_rng(0), 3, 201).astype(np.float32)
    x[1, column] = wrong
    q, scale, zero_point = on(emulator, QUANTIZE, x)
    with np.errstate(invalid="ignore"):
        _, expected, _ = QUANTIZE.formula(numpy_module, x)
    np.testing.assert_array_equal(scale, expected)
    assert not np.isfinite(scale[1]) and np.isfinite(scale[[0, 2]]).all()
    again = on(emulator, QUANTIZE, x[[0, 2]])
    np.testing.assert_array_equal(q[[0, 2]], again[0])
    np.testing.assert_array_equal(zero_point[[0, 2]], again[2])


def layer(rows: int, outs: int, inputs: int, factor: float = 1.0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(rows * outs + inputs)
    weight, weight_scale = quantize_weight(rng.standard_normal((outs, inputs)) * factor)
    q, scale, zero_point = by_formula(QUANTIZE, (rng.standard_normal((rows, inputs)) * factor).astype(np.float32))
    return q, scale, zero_point, weight, weight_scale, rng.standard_normal(outs).astype(np.float32) * np.float32(factor)


@pytest.mark.parametrize(
    ("rows", "outs", "inputs"),
    [(1, 1, 1), (3, 5, 7), (1, 4, 16), (64, 64, 64), (65, 63, 61),
     (5, 130, 80), (70, 8, 132), (2, 3, 1031), (9, 68, 192)],
)  # fmt: skip
def test_a_layer_in_whole_numbers_has_the_formulas_bits(emulator: Any, rows: int, outs: int, inputs: int) -> None:
    for factor in (1.0, 1e-20, 1e-38):
        arrays = layer(rows, outs, inputs, factor)
        (found,), (right,) = on(emulator, LINEAR, *arrays), by_formula(LINEAR, *arrays)
        np.testing.assert_array_equal(found, right)
        assert found.tobytes() == right.tobytes()


@pytest.mark.parametrize(("level", "zero_point"), [(255, 0), (0, 255)])
def test_the_largest_sums_fit(emulator: Any, level: int, zero_point: int) -> None:
    """All bytes at the end of their range, in rows as long as may be; nothing is rounded but the sum at its end."""
    q = np.full((1, MOST_INPUTS), level, np.uint8)
    weight = np.repeat(np.array([[127], [-127]], np.int8), MOST_INPUTS, axis=1)
    one, two = np.ones((1, 1), np.float32), np.ones(2, np.float32)
    (y,) = on(emulator, LINEAR, q, one, np.full((1, 1), zero_point, np.int32), weight, two, 0 * two)
    largest = np.float32((level - zero_point) * 127 * MOST_INPUTS)
    np.testing.assert_array_equal(y, [[largest, -largest]])


def test_what_does_not_fit_is_told(emulator: Any) -> None:
    q, scale, zero_point, weight, weight_scale, bias = layer(2, 3, 4)
    with pytest.raises(ValueError, match=r"expected weight of shape \(3, 4\), got \(3, 3\)"):
        on(emulator, LINEAR, q, scale, zero_point, weight[:, :3].copy(), weight_scale, bias)
    long = MOST_INPUTS + 1
    with pytest.raises(ValueError, match=f"at most {MOST_INPUTS} numbers.*got {long}"):
        on(emulator, LINEAR, np.zeros((1, long), np.uint8), scale[:1], zero_point[:1], np.zeros((3, long), np.int8),
           weight_scale, bias)  # fmt: skip
