"""quantize_rows: q = rint(x / scale) + zero_point, a scale for each row; linear_int8: y = x W' + b in whole numbers.

Dynamic quantisation: activations to 8 bits without sign, by row ("token"), with a zero point; weights to 8 bits with
sign, by output channel (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2018, section 2.1; Dettmers et al., "LLM.int8()", 2022, section 2.1).

    x[i, k]  ~ scale[i] (q[i, k] - zero_point[i]),    W[j, k] ~ weight_scale[j] weight[j, k]
    y[i, j]  = float(sum over k of (q[i, k] - zero_point[i]) weight[j, k]) scale[i] weight_scale[j] + bias[j]

The sums are exact in int32 while 255 * 127 * in < 2^31 (in <= 66,000), and each operation on floats is written singly:
a backend that rounds each by itself gives the same bits as any other that does, whatever its instructions.
Shapes: x (N, in), q (N, in) uint8, scale (N, 1), zero_point (N, 1) int32, weight (out, in) int8, weight_scale (out,),
bias (out,), y (N, out). linear_int8_gelu: gelu of that y. There is no gradient through what is rounded to integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minibert.kernels.activation import gelu_formula
from minibert.kernels.array_module import numpy_module
from minibert.kernels.drawing import LARGEST, Drawing
from minibert.kernels.op import Array, BertSize, Op, Sample

LEVELS = 255.0  # steps from the least to the largest of a row
SMALLEST = 2.0**-120  # scale: its inverse is still a number
MOST_INPUTS = (2**31 - 1) // (255 * 127)  # of a row, for sums in int32
WEIGHT_LEVELS = 127  # the largest |weight|; -128 is left out, so that both signs reach as far


def _quantize_rows(xp: Any, x: Array) -> tuple[Array, Array, Array]:
    above = xp.maximum(x.max(axis=1, keepdims=True), 0.0)
    below = xp.maximum((-x).max(axis=1, keepdims=True), 0.0)  # how far the row reaches below 0, which is in its range
    scale = xp.maximum((above + below) / LEVELS, SMALLEST)
    inverse = 1.0 / scale
    zero_point = xp.rint(below * inverse)
    q = -xp.maximum(-xp.maximum(xp.rint(x * inverse) + zero_point, 0.0), -LEVELS)
    return q, scale, zero_point


def _linear_int8(
    xp: Any, q: Array, scale: Array, zero_point: Array, weight: Array, weight_scale: Array, bias: Array
) -> Array:
    sums = xp.integer_matmul(q, weight.T) - zero_point.astype("int64") * weight.sum(axis=1, dtype="int64")
    y = xp.as_floats(sums, scale) * scale * weight_scale + bias
    return y


def _linear_int8_gelu(
    xp: Any, q: Array, scale: Array, zero_point: Array, weight: Array, weight_scale: Array, bias: Array, *,
    approximate: str = "none",
) -> Array:  # fmt: skip
    return gelu_formula(xp, _linear_int8(xp, q, scale, zero_point, weight, weight_scale, bias), approximate=approximate)


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(out, in) floats -> int8 of the same shape and a scale (out,) float32 for each row."""
    largest = np.abs(weight).max(axis=1, initial=0.0).astype(np.float32)
    scale = np.maximum(largest / np.float32(WEIGHT_LEVELS), np.float32(SMALLEST))
    whole = np.rint(weight / scale[:, None]).clip(-WEIGHT_LEVELS, WEIGHT_LEVELS)
    return whole.astype(np.int8), scale


def _draw_layer(**params: tuple[Any, ...]) -> Callable[..., Sample]:
    def draw(draw: Drawing, rows: int, inputs: int = 2**16, outs: int = LARGEST) -> Sample:
        weight, weight_scale = quantize_weight(draw.floats(outs, inputs))
        chosen = {name: draw.among(*choices) for name, choices in params.items()}
        return _on(draw.floats(rows, inputs), weight, weight_scale, draw.floats(outs), **chosen)

    return draw


def _on(x: np.ndarray, weight: np.ndarray, weight_scale: np.ndarray, bias: np.ndarray, **params: Any) -> Sample:
    q, scale, zero_point = _quantize_rows(numpy_module, x)
    return Sample(
        (q.astype(np.uint8), scale, zero_point.astype(np.int32), weight, weight_scale.astype(np.float64), bias), params
    )


def _bench(rng: np.random.Generator, size: BertSize) -> Sample:
    weight, weight_scale = quantize_weight(rng.standard_normal((size.intermediate, size.hidden)) * 0.05)
    x, bias = rng.standard_normal((size.tokens, size.hidden)), rng.standard_normal(size.intermediate)
    return _on(x, weight, weight_scale, bias)


quantize_rows = Op(
    "quantize_rows",
    _quantize_rows,
    draw=lambda draw, rows, columns: Sample((draw.floats(rows, columns),)),
    bench=lambda rng, size: Sample((rng.standard_normal((size.tokens, size.hidden)),)),
    whole_outputs={0: "uint8", 2: "int32"},
    wide_outputs=(1,),
)
linear_int8 = Op("linear_int8", _linear_int8, draw=_draw_layer(), bench=_bench, wide_inputs=(1, 4))
linear_int8_gelu = Op(
    "linear_int8_gelu",
    _linear_int8_gelu,
    draw=_draw_layer(approximate=("none", "tanh")),
    bench=_bench,
    wide_inputs=(1, 4),
)
