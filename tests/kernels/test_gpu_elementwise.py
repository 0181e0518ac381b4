"""CUDA kernels of single elements and of sums, where the samples of their ops do not lead: on the emulator.

Operands that broadcast along axes in turn, a float32 number beside 16 bits, views that begin between two packs, arrays
that the grid goes round more than once, sums in three launches, and bits that do not depend on the grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.backends import Backend, BackendUnavailable
from minibert.backends.base import dtype_of
from minibert.kernels import OPS
from minibert.kernels.philox import Stream, keep_mask
from minibert.kernels.readings.bounded import PRECISIONS

STORED = ("float32", "float16", "bfloat16")
Shape = tuple[int, ...]


@pytest.fixture(scope="module")
def emulator() -> Backend:
    try:
        return backends.get("emulator")
    except BackendUnavailable as reason:
        pytest.skip(str(reason))


class Device:
    """Ops on the emulator, on and to NumPy arrays; what comes back is float64."""

    def __init__(self, backend: Backend, dtype: str) -> None:
        self.backend, self.dtype, self.rng = backend, dtype, np.random.default_rng(1)
        self.roundoff, self.tiny = PRECISIONS[dtype].roundoff, PRECISIONS[dtype].tiny

    def normal(self, shape: Shape) -> Any:
        return self.backend.asarray(self.rng.standard_normal(shape), dtype=dtype_of(self.dtype))

    def read(self, x: Any) -> np.ndarray:
        return self.backend.numpy(x).astype(np.float64 if x.dtype != bool else bool)

    def run(self, op: str, *arrays: Any, **params: Any) -> np.ndarray:
        result = self.backend.run(OPS[op], *arrays, **params)
        assert result.dtype.name == self.dtype
        return self.read(result)

    def assert_rounded(self, got: np.ndarray, expected: np.ndarray, roundings: int = 2) -> None:
        assert got.shape == expected.shape
        assert (np.abs(got - expected) <= roundings * self.roundoff * np.maximum(np.abs(expected), self.tiny)).all()


@pytest.fixture(params=STORED)
def device(request: pytest.FixtureRequest, emulator: Backend) -> Device:
    if request.param == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return Device(emulator, request.param)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3, 64, 8), (64, 1)),  # rows of a pack or two, and a number for each
        ((37, 1032), (1032,)),  # a bias
        ((40, 520), (40, 1)),  # a number for each row
        ((2, 1, 3, 1, 8), (1, 5, 1, 2, 1)),  # more axes in turn than the kernels know
        ((70003,), (70003,)),  # more than the grid takes at once, and a rest
        ((0, 3), (3,)),
        ((), (2, 3)),
    ],
)
def test_operands_broadcast(device: Device, a: Shape, b: Shape) -> None:
    x, y = device.normal(a), device.normal(b)
    first, second = device.read(x), device.read(y)
    device.assert_rounded(device.run("add", x, y), first + second)
    device.assert_rounded(device.run("mul", x, y), first * second)
    for shape in (np.broadcast_shapes(a, b), b):
        condition = device.backend.asarray(device.rng.random(shape) < 0.5)
        expected = np.where(device.read(condition), first, second)
        assert np.array_equal(device.run("where", condition, x, y), expected)


def test_a_float32_number_goes_with_arrays_of_any_storage(device: Device) -> None:
    x, number = device.normal((5, 1031)), device.backend.asarray(np.array(0.3, np.float32))
    factor = float(np.float32(0.3))
    for arrays in ((x, number), (number, x)):
        device.assert_rounded(device.run("mul", *arrays), device.read(x) * factor)
        device.assert_rounded(device.run("add", *arrays), device.read(x) + factor)


def test_arrays_of_two_dtypes_are_refused(emulator: Backend) -> None:
    narrow, wide = Device(emulator, "float16").normal((2, 3)), Device(emulator, "float32").normal((2, 3))
    with pytest.raises(TypeError, match="float32"):
        emulator.run(OPS["add"], narrow, wide)


@pytest.mark.parametrize("first", [0, 1])
def test_views_that_begin_between_two_packs(device: Device, first: int) -> None:
    x = device.normal((70001,))[first:]  # also more than the grid takes at once
    values = device.read(x)
    device.assert_rounded(device.run("scale", x, factor=0.3), values * 0.3)
    device.assert_rounded(device.run("relu_grad", x, x), np.maximum(values, 0))
    stream = Stream(1, 2, 3, 4)
    kept = np.where(keep_mask(np, stream, values.shape, 0.3), values / 0.7, 0)
    device.assert_rounded(device.run("dropout", x, rate=0.3, stream=stream), kept)


@pytest.mark.parametrize("first", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("step", [1, 2])
def test_copies_in_the_widest_elements_that_both_sides_allow(device: Device, first: int, step: int) -> None:
    source, target = device.normal((6, 24, 40)), device.backend.zeros((7, 3, 24, 40), dtype_of(device.dtype))
    inner = slice(first, 40, step)
    expected = np.zeros(target.shape)
    for place, (rows, outer) in enumerate([(slice(None), slice(0, 3)), (slice(8, 24, 2), slice(5, 2, -1))]):
        target[2 * place + 1, :, rows, inner] = source[outer, rows, inner]
        expected[2 * place + 1, :, rows, inner] = device.read(source)[outer, rows, inner]
        target[2 * place, :, rows, : inner.stop - first : step] = source[outer, rows, inner]
        expected[2 * place, :, rows, : inner.stop - first : step] = device.read(source)[outer, rows, inner]
    target[6, ..., first:] = source[3, 0, first:]  # the same row again and again
    expected[6, ..., first:] = device.read(source)[3, 0, first:]
    assert np.array_equal(device.read(target), expected)


def test_relu_hands_a_nan_on(device: Device) -> None:
    x = device.backend.asarray(np.array([np.nan, 1, -1]), dtype=dtype_of(device.dtype))
    assert np.array_equal(device.run("relu", x), [np.nan, 1, 0], equal_nan=True)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((4300, 40), 0),  # three launches: 4300 rows are 68 parts, which are 2
        ((4300, 9), 0),
        ((65, 264), 0),
        ((3, 4096), -1),
        ((3, 9, 16), 1),
        ((3, 9, 16), (0, 2)),
        ((2, 0, 3), 1),
        ((0, 3), 1),
        ((7, 1), 1),
        ((2, 3), ()),
    ],
)
def test_sums(device: Device, shape: Shape, axis: Any) -> None:
    x = device.normal(shape)
    got, values = device.run("reduce_sum", x, axis=axis), device.read(x)
    expected, size = values.sum(axis=axis), np.abs(values).sum(axis=axis)
    assert got.shape == expected.shape
    assert (np.abs(got - expected) <= device.roundoff * np.abs(expected) + 40 * 2.0**-24 * size).all()


def test_a_sum_of_millions_in_three_launches(emulator: Backend) -> None:
    x = np.ones(2048 * 2048 + 1, np.float32)  # one more than two launches add
    assert emulator.numpy(emulator.run(OPS["reduce_sum"], emulator.asarray(x))) == x.size


@pytest.mark.parametrize(("shape", "axis"), [((300, 70), 0), ((5, 5000), 1)])
def test_sums_have_the_same_bits_on_every_grid(
    emulator: Any, monkeypatch: pytest.MonkeyPatch, shape: Shape, axis: int
) -> None:
    x = Device(emulator, "float32").normal(shape)
    sums = set()
    for multiprocessors in (1, 2, 132):
        monkeypatch.setattr(emulator.driver, "multiprocessors", multiprocessors)
        monkeypatch.setattr("minibert.kernels.gpu.launch.WAVES", 1 if multiprocessors == 1 else 8)
        sums.add(emulator.numpy(emulator.run(OPS["reduce_sum"], x, axis=axis)).tobytes())
    assert len(sums) == 1
