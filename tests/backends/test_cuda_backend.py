"""The host side of the CUDA backend, on the emulator: arrays and views, memory, formulas, errors."""

from __future__ import annotations

import gc
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert import backends
from minibert.backends import BackendUnavailable
from minibert.backends.base import dtype_of
from minibert.backends.cuda.driver import DeviceMemoryExhausted
from minibert.cli import main
from minibert.kernels import OPS
from minibert.kernels.op import Op
from minibert.kernels.readings.bounded import PRECISIONS
from minibert.model.tensor import Tensor, apply

STORED = ("float32", "float16", "bfloat16")
KINDS = (*STORED, "int32", "int64", "uint8", "bool")
Shape = tuple[int, ...]


@pytest.fixture(scope="module")
def emulator() -> Any:
    pytest.importorskip("ml_dtypes")
    try:
        return backends.get("emulator")
    except BackendUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def own_emulator(monkeypatch: pytest.MonkeyPatch, emulator: Any) -> Callable[[str], Any]:
    """Another emulator, with so many GiB of memory."""

    def make(gibibytes: str) -> Any:
        monkeypatch.setenv("MINIBERT_EMULATOR_MEMORY", gibibytes)
        return type(emulator)(type(emulator.driver)())

    return make


def numbers(shape: Shape, kind: str) -> np.ndarray:
    """Different ones, that every dtype holds exactly up to 256 of them."""
    return (np.arange(int(np.prod(shape))) % 251).reshape(shape).astype(dtype_of(kind))


def assert_equal(backend: Any, device: Any, host: np.ndarray) -> None:
    got = backend.numpy(device)
    assert (got.shape, got.dtype) == (host.shape, host.dtype) == (device.shape, device.dtype)
    np.testing.assert_array_equal(got.astype(np.float64), host.astype(np.float64))


# Arrays and views.


@st.composite
def indices(draw: Any, shape: Shape) -> tuple[Any, ...]:
    """Slices, whole numbers and new axes, for some of the axes."""
    index: list[Any] = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        if size and draw(st.booleans()):
            index.append(draw(st.integers(-size, size - 1)))
        else:
            index.append(draw(st.slices(size)))
        if draw(st.integers(0, 5)) == 0:
            index.append(None)
    if draw(st.booleans()):
        index.append(Ellipsis)
    return tuple(index)


@st.composite
def regrouped(draw: Any, shape: Shape) -> Shape:
    """Another shape of as many elements: axes merged and split, with ones between."""
    count = int(np.prod(shape))
    out: list[int] = []
    while count > 1 and len(out) < 5:
        divisors = [d for d in range(2, count + 1) if count % d == 0]
        out.append(draw(st.sampled_from(divisors)))
        count //= out[-1]
    return (*out, count) if draw(st.booleans()) or count != 1 else tuple(out)


@settings(max_examples=300)
@given(st.data(), st.lists(st.integers(0, 5), max_size=4).map(tuple), st.sampled_from(KINDS))
def test_views_are_those_of_numpy(emulator: Any, data: Any, shape: Shape, kind: str) -> None:
    host = numbers(shape, kind)
    device = emulator.asarray(host)
    for _ in range(data.draw(st.integers(1, 4))):
        kind_of_view = data.draw(st.sampled_from(("index", "transpose", "swap", "reshape", "broadcast", "contiguous")))
        if kind_of_view == "index":
            index = data.draw(indices(host.shape))
            host, device = host[(*index,)] if Ellipsis in index else host[(*index, ...)], device[index]
        elif kind_of_view == "transpose":
            axes = data.draw(st.permutations(range(host.ndim)))
            host, device = host.transpose(axes), device.transpose(axes)
        elif kind_of_view == "swap" and host.ndim:
            a, b = (data.draw(st.integers(-host.ndim, host.ndim - 1)) for _ in range(2))
            host, device = host.swapaxes(a, b), device.swapaxes(a, b)
        elif kind_of_view == "reshape" and host.size:
            wanted = data.draw(regrouped(host.shape))
            host, device = host.reshape(wanted), device.reshape(wanted)
        elif kind_of_view == "broadcast" and host.size < 500:
            wanted = (data.draw(st.integers(1, 3)), *(3 if n == 1 else n for n in host.shape))
            host, device = np.broadcast_to(host, wanted), device.broadcast_to(wanted)
        elif kind_of_view == "contiguous":
            device = device.contiguous()
            assert device.is_contiguous
    assert_equal(emulator, device, host)
    assert device.is_contiguous == host.flags.c_contiguous or device.size == 0 or kind_of_view == "contiguous"
    assert_equal(emulator, device.copy(), host)


@settings(max_examples=150)
@given(st.data(), st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple), st.sampled_from(KINDS))
def test_parts_are_written_as_by_numpy(emulator: Any, data: Any, shape: Shape, kind: str) -> None:
    host, more = numbers(shape, kind), numbers(shape, kind)[..., ::-1]
    device, index = emulator.asarray(host), data.draw(indices(shape))
    target = host[(*index,)] if Ellipsis in index else host[(*index, ...)]
    source = more[(*index,)] if Ellipsis in index else more[(*index, ...)]
    on_device = emulator.asarray(np.ascontiguousarray(source).reshape(source.shape))
    if target.ndim and data.draw(st.booleans()):  # one row for all
        source, on_device = source[:1], on_device[:1]
        if not len(source):
            return
    target[...] = source
    device[index] = on_device if data.draw(st.booleans()) else source
    assert_equal(emulator, device, host)


@settings(max_examples=40)
@given(st.data(), st.sampled_from(KINDS), st.integers(1, 3))
def test_concatenate_as_numpy(emulator: Any, data: Any, kind: str, ndim: int) -> None:
    axis = data.draw(st.integers(-ndim, ndim - 1))
    shape = [data.draw(st.integers(0, 4)) for _ in range(ndim)]
    parts = []
    for _ in range(data.draw(st.integers(1, 4))):
        shape[axis] = data.draw(st.integers(0, 3))
        parts.append(numbers(tuple(reversed(shape)), kind).transpose())
    on_device = [emulator.asarray(p.transpose()).transpose() for p in parts]
    assert_equal(emulator, emulator.run(OPS["concatenate"], *on_device, axis=axis), np.concatenate(parts, axis=axis))


def test_a_copy_onto_itself_reads_before_it_writes(emulator: Any) -> None:
    for index, source in ((np.s_[1:], np.s_[:-1]), (np.s_[:], np.s_[::-1]), (np.s_[:-40], np.s_[40:])):
        host = np.arange(1000, dtype=np.float32)
        device = emulator.asarray(host)
        device[index] = device[source]
        host[index] = host[source].copy()
        assert_equal(emulator, device, host)


def test_axes_beyond_those_of_the_kernel(emulator: Any) -> None:
    host = np.arange(3**8, dtype=np.int32).reshape((3,) * 8)
    assert_equal(
        emulator, emulator.asarray(host).transpose(7, 5, 3, 1, 6, 4, 2, 0), host.transpose(7, 5, 3, 1, 6, 4, 2, 0)
    )


def test_numbers_of_any_layout_are_uploaded_as_they_are(emulator: Any) -> None:
    for host in (np.arange(6, dtype=">f4"), np.arange(12.0)[::-2], np.float32(3.5), np.zeros((3, 0, 2), np.float16)):
        device = emulator.asarray(host)
        assert_equal(emulator, device, np.asarray(host).astype(np.asarray(host).dtype.newbyteorder("=")))
    doubled = emulator.run(OPS["scale"], emulator.asarray(np.arange(3, dtype=">f4")), factor=2.0)
    assert emulator.numpy(doubled).tolist() == [0, 2, 4]
    with pytest.raises(TypeError, match="expected integers, floats or booleans, got object"):
        emulator.asarray([None])


def test_what_the_host_knows_of_integers(emulator: Any) -> None:
    ids = np.array([[3, 1], [2, 0]])
    device = emulator.asarray(ids)
    ids[0, 0] = 9
    for same in (device, device.reshape(4), device.contiguous(), device.copy()):
        assert same.host.reshape(-1).tolist() == [3, 1, 2, 0] and not same.host.flags.writeable
    assert device[0].host is None and emulator.asarray(np.ones(2, np.float32)).host is None


BINARY = (
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow,
    operator.matmul, operator.lt, operator.eq, operator.and_, operator.or_, operator.xor,
)  # fmt: skip


@pytest.mark.parametrize("use", [*BINARY, lambda a, b: np.float32(2) * a, lambda a, b: np.ones(4, np.float32) + a])
def test_no_arithmetic_by_accident(emulator: Any, use: Callable[[Any, Any], Any]) -> None:
    x = emulator.asarray(np.ones(4, np.float32))
    with pytest.raises(TypeError):
        use(x, x)
    if use in BINARY and use not in (operator.lt, operator.eq):
        with pytest.raises(TypeError):
            use(2, x)


@pytest.mark.parametrize(
    "use", [np.asarray, np.exp, bool, float, int, lambda x: x.sum(), lambda x: [x] == [0] or x in x]
)
def test_no_conversion_by_accident(emulator: Any, use: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError):
        use(emulator.asarray(np.ones(1, np.float32)))


def refused(use: Callable[[Any], Any], error: type[Exception], message: str) -> Any:
    return pytest.param(use, error, message, id=message[:40])


@pytest.mark.parametrize(("use", "error", "message"), [
    refused(lambda x: x.reshape(-1, 5), ValueError, "cannot reshape array of size 12"),
    refused(lambda x: x.transpose(1, 0).reshape(5, -1), ValueError, "cannot reshape array of size 12 "),
    refused(lambda x: x.reshape(-1, -1), ValueError, "only specify one unknown"),
    refused(lambda x: x[True], TypeError, "slices and whole numbers as an index, got True"),
    refused(lambda x: x[np.array([0, 1])], TypeError, "slices and whole numbers as an index, got array"),
    refused(lambda x: x[x], TypeError, "op gather_rows"),
    refused(lambda x: x[3], IndexError, "out of bounds"),
    refused(lambda x: x.transpose(0, 0), ValueError, "repeated axis"),
    refused(lambda x: x[0].broadcast_to((2, 4)).__setitem__(..., x[:2]), ValueError, "share memory"),
    refused(lambda x: x.__setitem__(0, x), ValueError, r"expected values of shape \(4,\), or such as broadcast"),
    refused(lambda x: x.__setitem__(0, x.device.zeros((4,), np.float16)), TypeError, "expected float32, got float16"),
    refused(lambda x: concatenated(x, x[:, :1], axis=0), ValueError, r"shapes differ elsewhere: \(3, 4\), \(3, 1\)"),
    refused(lambda x: concatenated(x, x, axis=2), ValueError, "no axis 2 in an array"),
    refused(lambda x: concatenated(x[0, 0], axis=0), ValueError, r"no axis 0 in an array of shape \(\)"),
])  # fmt: skip
def test_mistakes_are_refused(emulator: Any, use: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        use(emulator.asarray(np.arange(12, dtype=np.float32).reshape(3, 4)))


def concatenated(*arrays: Any, axis: int) -> Any:
    return arrays[0].device.run(OPS["concatenate"], *arrays, axis=axis)


# Ops without a kernel.


@pytest.fixture
def third_party() -> Iterator[Callable[..., Op]]:
    """Ops of another package: known as long as the test runs."""
    made: list[str] = []

    def define(formula: Callable[..., Any], **more: Any) -> Op:
        made.append(f"third_party_{len(made)}")
        return Op(made[-1], formula, samples=lambda rng: iter(()), bench=lambda rng, size: None, **more)  # type: ignore

    yield define
    for name in made:
        del OPS[name]


def test_a_formula_runs_on_the_host_where_it_computes(emulator: Any, third_party: Callable[..., Op]) -> None:
    x, ids = np.arange(12, dtype=np.float32).reshape(3, 4), np.array([2, 0])
    for formula in (
        lambda xp, a: a // 2 + a % 3, lambda xp, a: np.float32(2) * a, lambda xp, a: a[[1, 0]],
        lambda xp, a: xp.exp(-a),
        lambda xp, a: a.argmax(axis=-1), lambda xp, a: a > 1, lambda xp, a: (a.sum(), a.T), lambda xp, a: np.float32(1),
        lambda xp, a: a * 2 if a[0, 0] == 0 else a,
        lambda xp, a: a[1:, ::-1].transpose(1, 0),
    ):  # fmt: skip
        op = third_party(formula)
        got, expected = emulator.run(op, emulator.asarray(x)), backends.get("numpy").run(op, x)
        assert emulator.by(op) == "formula" and isinstance(got, tuple) == isinstance(expected, tuple)
        for g, e in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, expected)), strict=True):
            assert_equal(emulator, g, np.asarray(e))
    rows = emulator.run(third_party(lambda xp, i, table: table[i] * 0.5), emulator.asarray(ids), emulator.asarray(x))
    assert_equal(emulator, rows, x[ids] * np.float32(0.5))


def test_a_formula_that_writes_and_one_with_a_gradient(emulator: Any, third_party: Callable[..., Op]) -> None:
    accumulate = third_party(lambda xp, total, x: (total + x,), writes=(0,))
    total, x = (emulator.asarray(np.full(3, v, np.float32)) for v in (1, 2))
    (result,) = emulator.run(accumulate, total, x)
    assert result is total and emulator.numpy(total).tolist() == [3, 3, 3]
    square = third_party(lambda xp, a: a * a, vjp=lambda run, g, outs, a: (run(OPS["mul"], g, run(OPS["add"], a, a)),))
    leaf = Tensor(x, emulator, requires_grad=True)
    apply(square, leaf).sum().backward()
    assert emulator.numpy(leaf.grad).tolist() == [4, 4, 4]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_formulas_give_what_kernels_give_in_16_bits(emulator: Any, dtype: str) -> None:
    """The same dtypes, also of what stays float32, and values that differ by roundings."""
    for name in ("layer_norm", "cross_entropy", "attention", "adamw_shadow", "square_norm", "softmax", "where"):
        op = OPS[name]
        sample = next(iter(op.samples(np.random.default_rng(0))))

        def upload(op: Op = op, sample: Any = sample) -> list[Any]:
            kinds = ["float32" if i in op.wide_inputs else dtype for i in range(len(sample.arrays))]
            host = [np.asarray(a) for a in sample.arrays]
            return [
                emulator.asarray(a, dtype=None if a.dtype.kind in "iub" else dtype_of(k))
                for a, k in zip(host, kinds, strict=True)
            ]

        by_kernel = emulator.run(op, *upload(), **sample.params)
        with emulator.using({op: None}):
            by_formula = emulator.run(op, *upload(), **sample.params)
        for k, f in zip(*(r if isinstance(r, tuple) else (r,) for r in (by_kernel, by_formula)), strict=True):
            assert (k.dtype, k.shape) == (f.dtype, f.shape), name
            values = emulator.numpy(k).astype(np.float64)
            scale = 8 * PRECISIONS[dtype].roundoff * np.abs(values).max(initial=1e-30)
            np.testing.assert_allclose(emulator.numpy(f).astype(np.float64), values, rtol=0, atol=scale, err_msg=name)


# Memory.


def test_memory_comes_back(emulator: Any) -> None:
    x = emulator.asarray(np.ones((64, 64), np.float32))
    for _ in range(3):
        y = emulator.run(OPS["softmax"], x)
    used, taken = emulator.pool.used, emulator.driver.memory()
    for _ in range(600):  # more than the emulator's queue holds
        y = emulator.run(OPS["softmax"], x)
    assert emulator.numpy(y).sum() == 64
    assert emulator.pool.used == used and emulator.driver.memory() == taken


def test_the_peak_is_of_the_block_alone(emulator: Any) -> None:
    kept = emulator.zeros((1024,), np.float32)
    with emulator.peak_memory() as outer:
        first = emulator.zeros((1024,), np.float32)
        with emulator.peak_memory() as inner:
            second = emulator.zeros((256,), np.float32)
            del second
        del first
    assert (inner(), outer()) == (1024, 5120) and kept.nbytes == 4096


def test_trimming_leaves_what_is_held(own_emulator: Callable[[str], Any]) -> None:
    backend = own_emulator("0.01")
    kept = backend.asarray(np.arange(5, dtype=np.float32))
    for size in range(1, 40):
        backend.zeros((size * 1000,), np.float32)
    before = backend.driver.memory()[0]
    backend.pool.trim()
    free, total = backend.driver.memory()
    assert before < free == total - 512 and backend.numpy(kept).tolist() == [0, 1, 2, 3, 4]
    assert backend.numpy(backend.run(OPS["add"], kept, kept)).tolist() == [0, 2, 4, 6, 8]


def test_exhausted_memory_says_who_holds_it(own_emulator: Callable[[str], Any]) -> None:
    backend = own_emulator("0.01")
    kept = [backend.asarray(np.zeros((1000, 500), np.float32)) for _ in range(3)]
    kept.append(backend.run(OPS["softmax"], kept[0]))
    backend.zeros((300_000,), np.float32)  # given back to the device when memory is short
    kept.append(backend.run(OPS["softmax"], kept[0]))
    with pytest.raises(DeviceMemoryExhausted) as caught:
        backend.run(OPS["relu"], kept[0])
    message = str(caught.value)
    assert message.startswith("relu asked for 1.9 MiB of emulator's memory, of which 0.2 of 10 MiB are free")
    assert message.count("1.9 MiB made by an array") == 3 and message.count("1.9 MiB made by softmax") == 2
    assert "live arrays hold 9.5 MiB" in message and "\n" not in message
    kept.pop()
    del caught
    gc.collect()
    assert backend.numpy(backend.run(OPS["relu"], kept[0])).sum() == 0, "and goes on"


@pytest.mark.parametrize("asked", ["lots", "0", "-1", "nan", "inf", "1e9"])
def test_a_size_of_memory_that_is_none(own_emulator: Callable[[str], Any], asked: str) -> None:
    with pytest.raises(BackendUnavailable, match=rf"MINIBERT_EMULATOR_MEMORY: expected GiB .* got '{asked}'"):
        own_emulator(asked)


def test_the_command_line_says_that_memory_is_exhausted(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    own_emulator: Callable[[str], Any],
    tmp_path: Any,
) -> None:
    place = own_emulator("0.001")
    monkeypatch.setitem(backends._loaded, "emulator", place)
    monkeypatch.setattr(place, "device_memory", lambda: None)  # it is not known before the run, which begins
    words = ["pretrain", "--backend", "emulator", "--layers", "1", "--hidden", "64", "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["minibert", *words, "--vocab-size", "300"])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(said) == 1
    assert re.match(r"error: .* asked for .* MiB of emulator's memory, of which .* are free", said[0])
