"""matmul: y = a b; linear: y = x W' + b, W (out, in); linear_gelu: y = gelu(z), z = x W' + b; keeps z.

linear_grad: dw = g' x and db, the sum of g over its rows, of which the product reads every element anyway; g (N, out),
x (N, in). add_linear_grad: total += g' x, in place, for a weight that has a gradient already.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minibert.kernels.activation import gelu, gelu_formula, gelu_grad
from minibert.kernels.drawing import Drawing
from minibert.kernels.op import Array, BertSize, Op, Run, Sample
from minibert.kernels.reduction import reduce_sum, sum_to
from minibert.kernels.view import reshape


def _matmul(xp: Any, a: Array, b: Array) -> Array:
    return a @ b


def _linear(xp: Any, x: Array, weight: Array, bias: Array) -> Array:
    return x @ weight.swapaxes(0, 1) + bias


def _linear_gelu(xp: Any, x: Array, weight: Array, bias: Array, *, approximate: str = "none") -> tuple[Array, Array]:
    z = xp.stored(x @ weight.swapaxes(0, 1) + bias)
    y = gelu_formula(xp, z, approximate=approximate)
    return y, z


def _linear_grad(xp: Any, g: Array, x: Array) -> tuple[Array, Array]:
    dw, db = g.swapaxes(0, 1) @ x, g.sum(axis=0)
    return dw, db


def _add_linear_grad(xp: Any, total: Array, g: Array, x: Array) -> tuple[Array]:
    return (total + g.swapaxes(0, 1) @ x,)


def _matmul_vjp(run: Run, g: Array, outs: tuple[Array, ...], a: Array, b: Array) -> tuple[Array | None, ...]:
    da = sum_to(run, run(matmul, g, b.swapaxes(-1, -2)), a) if wanted(run, 0) else None
    db = sum_to(run, run(matmul, a.swapaxes(-1, -2), g), b) if wanted(run, 1) else None
    return da, db


def wanted(run: Run, *numbers: int) -> bool:
    """Whether the gradient of one of the inputs with those numbers is asked for.

    Autodiff asks for none of what is frozen and led to by nothing that is not; who checks a gradient asks for all.
    """
    asked = getattr(run, "wanted", None)
    return asked is None or asked(*numbers)


def linear_vjp(run: Run, g: Array, outs: Any, x: Array, weight: Array, bias: Array) -> tuple[Array | None, ...]:
    dx = run(matmul, g, weight) if wanted(run, 0) else None
    if not wanted(run, 1, 2):
        return dx, None, None
    if x.ndim != 2:  # every row counts alike, whatever axes it stands in
        g, x = (run(reshape, a, shape=(-1, a.shape[-1])) for a in (g, x))
    return dx, *parameter_gradients(run, g, x, 1, 2)


def parameter_gradients(run: Run, g: Array, x: Array, weight: int, *bias: int) -> tuple[Array, Array]:
    """dW and db: of the inputs with those numbers (the bias's is left out where db is not yet its whole gradient).

    Where autodiff has a gradient of the weight already, and a backend a kernel for it, dW is that, with this added;
    it is None where the weight is frozen.
    """
    if not wanted(run, weight):
        return None, run(reduce_sum, g, axis=0)
    so_far = getattr(run, "gradient_so_far", None)
    total = None if so_far is None else so_far(weight, add_linear_grad)
    if total is None:
        dweight, dbias = gradients_of(run, weight, *bias)(linear_grad, g, x)
        return dweight, dbias
    run(add_linear_grad, total, g, x)
    return total, run(reduce_sum, g, axis=0)


def gradients_of(run: Run, *numbers: int) -> Run:
    """`run` for the call whose outputs are the gradients of the inputs with those numbers.

    Autodiff may have a place for them, where they are then made; who checks a gradient has none.
    """
    placed = getattr(run, "gradients_of", None)
    return run if placed is None else placed(*numbers)


def _products(rng: np.random.Generator) -> Iterator[Sample]:
    for a, b in [
        ((3, 4), (4, 5)),
        ((1, 1), (1, 1)),
        ((2, 3, 17, 9), (2, 3, 9, 5)),
        ((33, 70), (70, 1031)),
        ((2, 3, 4), (4, 5)),
    ]:
        yield Sample((rng.standard_normal(a), rng.standard_normal(b)))
    row = rng.standard_normal(40)
    yield Sample((np.concatenate([row, row])[None], np.concatenate([row, -row])[:, None] + 1e-3))  # cancels


def _layers(rng: np.random.Generator) -> Iterator[Sample]:
    for rows, inputs, outs in [(3, 4, 5), (1, 1, 1), (33, 70, 1031), (65, 129, 7)]:
        yield Sample(tuple(rng.standard_normal(s) for s in ((rows, inputs), (outs, inputs), (outs,))))

    wide = rng.standard_normal((2, 3, 4, 5)).swapaxes(0, 1)  # rows that are not one after the other
    yield Sample((wide, rng.standard_normal((7, 5)), rng.standard_normal(7)))


def _gelu_layers(rng: np.random.Generator) -> Iterator[Sample]:
    for approximate in ("none", "tanh"):
        for arrays, _ in _layers(rng):
            yield Sample(arrays, {"approximate": approximate})


def _gradients(rng: np.random.Generator) -> Iterator[Sample]:
    for rows, inputs, outs in [(3, 4, 5), (1, 1, 1), (33, 70, 1031), (300, 129, 7)]:
        yield Sample((rng.standard_normal((rows, outs)), rng.standard_normal((rows, inputs))))
    yield Sample((rng.standard_normal((300, 3)) + 100, rng.standard_normal((300, 2))))  # one sign: errors add up
    yield Sample((rng.standard_normal((6, 40)).swapaxes(0, 1), rng.standard_normal((40, 10))[:, ::2]))


def _additions(rng: np.random.Generator) -> Iterator[Sample]:
    for (g, x), _ in _gradients(rng):
        yield Sample((rng.standard_normal((g.shape[1], x.shape[1])), g, x))


def _draw_product(draw: Drawing, rows: int, inner: int, columns: int) -> Sample:
    batch = draw.among((), (2, 3))
    return Sample((draw.floats(*batch, rows, inner), draw.floats(*draw.among(batch, ()), inner, columns)))


def _draw_layer(**params: tuple[Any, ...]) -> Any:
    def draw(draw: Drawing, rows: int, inputs: int, outs: int) -> Sample:
        chosen = {name: draw.among(*choices) for name, choices in params.items()}
        return Sample((draw.floats(rows, inputs), draw.floats(outs, inputs), draw.floats(outs)), chosen)

    return draw


def _draw_gradients(draw: Drawing, rows: int, inputs: int, outs: int) -> Sample:
    return Sample((draw.floats(rows, outs), draw.floats(rows, inputs)))


def _draw_additions(draw: Drawing, rows: int, inputs: int, outs: int) -> Sample:
    return Sample((draw.floats(outs, inputs), draw.floats(rows, outs), draw.floats(rows, inputs)))


def _bench(rng: np.random.Generator, size: BertSize) -> Sample:
    n, c, i = size.tokens, size.hidden, size.intermediate
    return Sample((rng.standard_normal((n, c)), rng.standard_normal((i, c)) * 0.05, rng.standard_normal(i)))


def _bench_matmul(rng: np.random.Generator, size: BertSize) -> Sample:
    return Sample(
        (rng.standard_normal((size.tokens, size.hidden)), rng.standard_normal((size.hidden, size.intermediate)))
    )


def _bench_grad(rng: np.random.Generator, size: BertSize) -> Sample:
    return Sample(
        (rng.standard_normal((size.tokens, size.intermediate)), rng.standard_normal((size.tokens, size.hidden)))
    )


def _bench_add(rng: np.random.Generator, size: BertSize) -> Sample:
    g, x = _bench_grad(rng, size).arrays
    return Sample((rng.standard_normal((size.intermediate, size.hidden)), g, x))


matmul = Op("matmul", _matmul, samples=_products, bench=_bench_matmul, draw=_draw_product, vjp=_matmul_vjp)
linear = Op("linear", _linear, samples=_layers, bench=_bench, draw=_draw_layer(), vjp=linear_vjp)
linear_grad = Op("linear_grad", _linear_grad, samples=_gradients, bench=_bench_grad, draw=_draw_gradients)
add_linear_grad = Op(
    "add_linear_grad", _add_linear_grad, samples=_additions, bench=_bench_add, draw=_draw_additions, writes=(0,)
)
linear_gelu = Op(
    "linear_gelu",
    _linear_gelu,
    samples=_gelu_layers,
    draw=_draw_layer(approximate=("none", "tanh")),
    bench=_bench,
    vjp=lambda run, g, outs, *arrays, **params: linear_vjp(run, run(gelu_grad, g, outs[1], **params), None, *arrays),
    again=lambda run, kept, *_, **params: run(gelu, kept[0], **params),
)
