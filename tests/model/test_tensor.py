"""Autodiff: gradients accumulate, graphs are freed, nothing recurses, and two backends never meet."""

from __future__ import annotations

import gc
import math
import sys
import threading
import weakref
from typing import Any

import numpy as np
import pytest

from minibert import UserError, backends
from minibert.backends import Backend
from minibert.kernels import OPS
from minibert.kernels.array_module import numpy_module
from minibert.kernels.elementwise import add, mul
from minibert.model.tensor import Tensor, apply, grad_enabled, no_grad

NUMPY = backends.get("numpy")


def leaf(*values: float, requires_grad: bool = True, dtype: Any = np.float64) -> Tensor:
    return Tensor(np.array(values, dtype), NUMPY, requires_grad)


def test_a_gradient_through_a_few_ops() -> None:
    a, b = leaf(1, 2, 3), leaf(4, 5, 6)
    loss = ((a * b + a) * 2.0).sum()
    assert loss.item() == 2 * (1 * 4 + 2 * 5 + 3 * 6 + 6)
    loss.backward()
    np.testing.assert_array_equal(a.grad, [10, 12, 14])
    np.testing.assert_array_equal(b.grad, [2, 4, 6])


def test_a_tensor_used_often_sums_its_gradients() -> None:
    a = leaf(3)
    b = a * a
    (b * b + b + a + a).sum().backward()  # a^4 + a^2 + 2 a
    np.testing.assert_array_equal(a.grad, [4 * 27 + 2 * 3 + 2])


def test_gradients_accumulate_over_calls_of_backward() -> None:
    a = leaf(1, 2)
    for expected in (3, 6, 9):
        (a * 3.0).sum().backward()
        np.testing.assert_array_equal(a.grad, [expected] * 2)


def test_a_gradient_goes_to_the_buffer_an_optimiser_wants_it_in() -> None:
    a = leaf(1, 2)
    a.grad_buffer = np.full(2, np.nan)
    (a * 3.0).sum().backward()
    assert a.grad is a.grad_buffer
    np.testing.assert_array_equal(a.grad_buffer, [3, 3])
    (a * 3.0).sum().backward()
    assert a.grad is a.grad_buffer
    np.testing.assert_array_equal(a.grad_buffer, [6, 6])


def test_broadcasting_is_summed_back() -> None:
    a, b = Tensor(np.ones((2, 3)), NUMPY, True), Tensor(np.full((1, 3), 2.0), NUMPY, True)
    (a * b).sum().backward()
    np.testing.assert_array_equal(b.grad, [[2, 2, 2]])
    assert a.grad is not None and a.grad.shape == (2, 3)


def test_methods_of_a_tensor_are_differentiable() -> None:
    x = Tensor(np.arange(6.0).reshape(2, 3), NUMPY, True)
    y = (x.transpose(1, 0).reshape(2, 3).slice(1, 0, 2) @ leaf(1, 10).reshape(2, 1)).sum(axis=0).sum()
    y.backward()
    direction = np.random.default_rng(0).standard_normal((2, 3))
    moved = (x.numpy() + direction).T.reshape(2, 3)[:, :2] @ [1, 10]
    assert x.grad is not None
    assert (x.grad * direction).sum() == pytest.approx(moved.sum() - y.item())


def test_a_gradient_may_be_weighed() -> None:
    a = leaf(1, 2)
    (a * a).backward(np.array([1.0, 10.0]))
    np.testing.assert_array_equal(a.grad, [2, 40])
    with pytest.raises(ValueError, match=r"expected a scalar or an explicit gradient, got a tensor of shape \(2,\)"):
        (a * a).backward()


def test_only_leaves_that_ask_get_a_gradient() -> None:
    a, b = leaf(1), leaf(2, requires_grad=False)
    middle = a * b
    middle.sum().backward()
    assert a.grad is not None and b.grad is None and middle.grad is None


def test_a_second_backward_is_an_error() -> None:
    a = leaf(1)
    loss = (a * a).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="an earlier backward\\(\\) went through a part of this and freed it"):
        loss.backward()
    np.testing.assert_array_equal(a.grad, [2])


def test_a_part_that_was_freed_is_an_error_and_not_a_lost_gradient() -> None:
    a = leaf(1)
    shared = a * a
    first, second = shared.sum(), (shared * 2.0).sum()
    first.backward()
    with pytest.raises(RuntimeError, match="add the losses and go through once"):
        second.backward()


def test_backward_frees_what_it_has_passed() -> None:
    a = leaf(1)
    middle = a * a
    kept = weakref.ref(middle)
    loss = (middle * 3.0).sum()
    del middle
    loss.backward()
    assert kept() is None


def test_nothing_is_remembered_under_no_grad() -> None:
    a = leaf(1)
    with no_grad():
        assert not grad_enabled()
        with no_grad():
            pass
        assert not grad_enabled()
        quiet = a * a
    assert grad_enabled()
    assert quiet.made_by is None and not quiet.requires_grad
    with pytest.raises(RuntimeError):
        quiet.backward()


def test_no_grad_ends_after_an_error_and_holds_for_its_own_thread() -> None:
    with pytest.raises(ZeroDivisionError), no_grad():
        raise ZeroDivisionError
    assert grad_enabled()
    seen: list[bool] = []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append(grad_enabled()))
        thread.start()
        thread.join(600)
    assert seen == [True]


def test_a_deep_chain_needs_no_deep_stack() -> None:
    depth = 20_000
    assert sys.getrecursionlimit() < depth
    a = leaf(1.0)
    x = a
    for _ in range(depth):
        x = apply(add, x, a)
    x.sum().backward()
    np.testing.assert_array_equal(a.grad, [depth + 1])
    for _ in range(depth):
        x = apply(add, x, a)
    del x  # dropped with its graph, that no backward has freed


def test_backward_frees_the_graph() -> None:
    a = leaf(1, 2)
    middle = a * a
    kept = weakref.ref(middle)
    loss = (middle * 2.0).sum()
    del middle
    assert kept() is not None
    loss.backward()
    gc.collect()
    assert kept() is None


def test_what_was_kept_is_freed_on_the_way() -> None:
    """Peak memory of a long chain's backward is far below what the whole chain kept."""
    a = Tensor(np.ones(100_000), NUMPY, True)
    x = a
    for _ in range(20):
        x = x * x
    with NUMPY.peak_memory() as peak:
        x.sum().backward()
    assert peak() < 8 * a.data.nbytes


def test_integers_get_no_gradient() -> None:
    table = Tensor(np.ones((4, 3)), NUMPY, True)
    index = Tensor(np.array([1, 1, 3]), NUMPY)
    apply(OPS["gather_rows"], table, index).sum().backward()
    np.testing.assert_array_equal(table.grad[:, 0], [0, 2, 0, 1])  # type: ignore[index]
    assert index.grad is None


def test_an_op_without_a_gradient_says_so() -> None:
    a = leaf(4.0)
    with pytest.raises(NotImplementedError, match="op 'clip_scale' has no vjp"):
        apply(OPS["clip_scale"], a, max_norm=1.0).sum().backward()


def test_two_backends_never_meet() -> None:
    a, b = leaf(1), Tensor(np.ones(1), Backend("elsewhere", numpy_module))
    with pytest.raises(ValueError, match="mul: its inputs stand on numpy, elsewhere; move them to one backend first"):
        apply(mul, a, b)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_dtypes_are_kept(name: str, dtype: str) -> None:
    backend = backends.get(name)
    x = Tensor(backend.asarray(np.ones((3, 5)), dtype=dtype), backend, True)
    y = apply(OPS["softmax"], apply(OPS["gelu"], x)) * 0.5
    assert y.dtype == dtype
    (y * y).sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype
    assert repr(x) == f"Tensor(shape=(3, 5), dtype={dtype}, backend={name})"


def test_gradients_of_two_leaves_are_two_arrays() -> None:
    a, b = leaf(1), leaf(2)
    (a + b).sum().backward()
    assert a.grad is not b.grad and not np.shares_memory(a.grad, b.grad)


def test_a_gradient_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a gradient of shape"):
        (leaf(1) * 2.0).backward(np.ones((3, 4)))


# ------------------------------------------------------------------------------------ arithmetic, indices and values

X, Y = np.array([[1.5, -2.0, 4.0], [0.25, 3.0, -1.0]]), np.array([[2.0, 5.0, -3.0], [1.0, 0.5, 7.0]])
ROW = np.array([2.0, -4.0, 0.5])
EXPRESSIONS: dict[str, Any] = {
    "a / 4": lambda a, b: a / 4,
    "a / np.int64(8)": lambda a, b: a / np.int64(8),
    "a / array": lambda a, b: a / ROW,
    "2 * a": lambda a, b: 2 * a,
    "np.float32(2) * a": lambda a, b: np.float32(2) * a,
    "array * a": lambda a, b: ROW * a,
    "a * array": lambda a, b: a * ROW,
    "-a": lambda a, b: -a,
    "a - b": lambda a, b: a - b,
    "a - a": lambda a, b: a - a * a,
    "a - 1": lambda a, b: a - 1,
    "1 - a": lambda a, b: 1 - a,
    "array - a": lambda a, b: ROW - a,
    "a + 0.5": lambda a, b: a + 0.5,
    "array + a": lambda a, b: ROW + a,
    "sum of a list": lambda a, b: sum([a, b * a, a]),
    "a[1]": lambda a, b: a[1] * b[0],
    "a[-1, 2]": lambda a, b: a[-1, 2] * b,
    "a[:, 0]": lambda a, b: a[:, 0] * b[:, 1],
    "a[..., 1:]": lambda a, b: a[..., 1:] * b[:, :-1],
    "a[0:1, np.int64(2)]": lambda a, b: a[0:1, np.int64(2)] + b[1, 1:2],
    "a ** 2": lambda a, b: a**2,
    "a ** np.float64(3)": lambda a, b: a ** np.float64(3),
    "a @ array": lambda a, b: a @ Y.T,
    "array @ a": lambda a, b: Y.T @ a,
    "a @ b'": lambda a, b: a @ b.transpose(1, 0),
    "a.reshape((3, 2))": lambda a, b: a.reshape((3, 2)) @ b,
    "a.transpose((1, 0))": lambda a, b: a.transpose((1, 0)) @ b,
    "a[:]": lambda a, b: a[:] + a[...],
    "a[1:0]": lambda a, b: a[1:0],
    "rows of a": lambda a, b: sum(x * y for x, y in zip(a, b, strict=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_arithmetic_and_indices_have_numpy_s_values_and_the_right_gradients(name: str) -> None:
    """The directional derivative of each, times weights, against central differences of the same line in NumPy."""
    f, rng = EXPRESSIONS[name], np.random.default_rng(1)
    a, b = Tensor(X, NUMPY, requires_grad=True), Tensor(Y, NUMPY, requires_grad=True)
    out, expected = f(a, b), np.asarray(f(X, Y))
    assert isinstance(out, Tensor) and out.shape == expected.shape and out.dtype == np.float64
    np.testing.assert_array_equal(out.numpy(), expected)
    weights, da, db = rng.standard_normal(out.shape), rng.standard_normal(X.shape), rng.standard_normal(X.shape)
    out.backward(weights)
    found = sum((leaf.grad * d).sum() for leaf, d in ((a, da), (b, db)) if leaf.grad is not None)
    ahead, behind = (np.sum(weights * f(X + s * da, Y + s * db)) for s in (1e-6, -1e-6))
    assert found == pytest.approx((ahead - behind) / 2e-6, rel=1e-8, abs=1e-9)


def test_arithmetic_keeps_the_dtype_of_the_tensor() -> None:
    x = leaf(1, 2, dtype=np.float32)
    for y in (x / 3, 2 * x, 1 - x, x + np.float64(1), np.array([1.0, 2.0]) - x, x / np.array([3.0, 7.0])):
        assert y.dtype == np.float32


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda x: x + None, TypeError, "expected a tensor, a number or an array beside a tensor, got NoneType"),
        (lambda x: x - "1", TypeError, "bad operand|expected a tensor"),
        (lambda x: x / x, UserError, r"divided by numbers alone: / float\(x\)"),
        (lambda x: x / 0, UserError, "divided by numbers other than 0"),
        (lambda x: x / np.array([1.0, 0.0]), UserError, "divided by numbers other than 0"),
        (lambda x: 1 / x, UserError, "no gradient of a divisor"),
        (lambda x: np.ones(2) / x, UserError, "no gradient of a divisor"),
        (lambda x: abs(x), UserError, r"no gradient of abs\(\): abs\(float\(x\)\)"),
        (lambda x: round(x, 2), UserError, "a tensor of one element"),
        (lambda x: x**0.5, UserError, "a whole number from 1 to 8, got 0.5"),
        (lambda x: x**-1, UserError, "a whole number from 1 to 8, got -1"),
        (lambda x: x @ x, UserError, r"@: expected .* got \(2,\) and \(2,\)"),
        (lambda x: np.ones((3, 3)) @ x.reshape(2, 1), UserError, r"@: expected .* got \(3, 3\) and \(2, 1\)"),
        (lambda x: x @ None, TypeError, "expected a tensor, a number or an array beside a tensor"),
        (lambda x: x[::2], UserError, r"index of a tensor of shape \(2,\): .* take .numpy\(\)\[...\]"),
        (lambda x: x[[0, 1]], UserError, "numbers and slices of step 1"),
        (lambda x: x[np.array([True, False])], UserError, "numbers and slices of step 1"),
        (lambda x: x[True], UserError, "numbers and slices of step 1"),
        (lambda x: x[0, 0], UserError, "at most 1 numbers and slices"),
        (lambda x: x[2], IndexError, "index 2 is out of range for an axis of 2"),
        (lambda x: float(x), UserError, r"expected a tensor of one element, got shape \(2,\)"),
        (lambda x: bool(x), UserError, "a tensor of one element"),
        (lambda x: f"{x:.3f}", UserError, "a tensor of one element"),
        (lambda x: len(x.sum()), TypeError, "without axes"),
        (lambda x: x.argmax(-1), AttributeError, r"has no 'argmax'; .numpy\(\) gives its values"),
    ],
)
def test_what_a_tensor_cannot_do_names_what_can(use: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        use(leaf(1, 2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["numpy", "numba", "emulator"])
def test_values_leave_a_tensor_as_numbers_and_arrays(name: str) -> None:
    status = next(s for s in backends.available() if s.name == name)
    if status.backend is None:
        pytest.skip(status.reason)
    values = np.array([[1.5, -2.0, 4.0]], np.float32)
    x = Tensor(status.backend.asarray(values), status.backend, requires_grad=True)
    for array in (np.asarray(x), np.array(x), np.array(x, copy=True), x.detach().cpu().numpy(), np.stack([x])[0]):
        assert type(array) is np.ndarray and array.dtype == np.float32
        np.testing.assert_array_equal(array, values)
    assert np.asarray(x, np.float64).dtype == np.float64 and np.exp(x).shape == (1, 3)
    assert np.mean([x[0, 0], x[0, 2]]) == 2.75 and (x > -2).tolist() == [[True, False, True]] and (x <= x).all()
    assert x[0, 0] < 2 and x[0, 0] >= 1.5 and float(min(9.0, x[0, 0])) == 1.5 and math.exp(x[0, 0]) == math.exp(1.5)
    copy = np.array(x)
    copy[...] = 0
    assert x.tolist() == values.tolist() and len(x) == 1 and not x.detach().requires_grad
    one = x[0, 0]
    assert float(one) == one.item() == 1.5 and int(one) == 1 and bool(one) and f"{one:.2f}" == "1.50"
    assert round(one, 1) == 1.5 and round(one) == 2
    assert f"{x}" == f"Tensor(shape=(1, 3), dtype=float32, backend={name})"
    if name == "numpy":
        assert np.shares_memory(np.asarray(x), x.data) and np.array(x, copy=False) is x.data
    with pytest.raises(ValueError, match="cannot be avoided"):
        np.array(x, np.float64, copy=False)
