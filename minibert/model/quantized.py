"""Linear layers in int8: weights by output channel, activations by row as they come (`kernels/int8`). For inference.

A file has them in the form of compressed-tensors that transformers reads too ("int-quantized"): `X.weight` int8,
`X.weight_scale` float32 (out, 1), and `quantization_config` in config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from minibert.errors import UserError
from minibert.kernels.int8 import linear_int8, linear_int8_gelu, quantize_rows, quantize_weight
from minibert.kernels.op import Op
from minibert.model.compressed import KEY, quantization_config
from minibert.model.config import BertConfig
from minibert.model.nn import Linear, Module, Parameter, Place
from minibert.model.tensor import Tensor, grad_enabled

SCALE = ".weight_scale"
NO_GRADIENT = (
    "a layer in int8 has no gradient: call the model under minibert.no_grad(), and train the model that it was made of"
)


class Int8Linear(Linear):
    """y = x W' + b; weight (out_features, in_features) int8, weight_scale (out_features, 1)."""

    parts = ("weight", "weight_scale", "bias")

    def __init__(self, in_features: int, out_features: int, place: Place) -> None:
        scale_dtype = "float64" if place.dtype == "float64" else "float32"
        self.weight = Parameter((out_features, in_features), "zeros", Place(place.backend, "int8"))
        self.weight_scale = Parameter((out_features, 1), "ones", Place(place.backend, scale_dtype))
        self.bias = Parameter((out_features,), "zeros", place)
        self.weight.requires_grad = self.weight_scale.requires_grad = False

    @staticmethod
    def joined(layers: Sequence[Any]) -> tuple[Tensor, ...]:
        backend = layers[0].weight.backend

        def join(parameters: Iterator[Parameter], *shape: int) -> Tensor:
            parts = list(parameters)
            if len(parts) == 1:
                return Tensor(parts[0].data.reshape(*shape), backend)
            whole = np.concatenate([backend.numpy(p.data).reshape(*shape) for p in parts])
            return Tensor(backend.asarray(whole), backend)

        return (
            join((layer.weight for layer in layers), -1, layers[0].weight.declared_shape[1]),
            join((layer.weight_scale for layer in layers), -1), join((layer.bias for layer in layers), -1),
        )  # fmt: skip

    @staticmethod
    def product(x: Tensor, operands: Sequence[Tensor]) -> Tensor:
        return _run(linear_int8, x, operands)

    @staticmethod
    def gelu_of_product(x: Tensor, operands: Sequence[Tensor], approximate: str) -> Tensor:
        return _run(linear_int8_gelu, x, operands, approximate=approximate)


def _run(op: Op, x: Tensor, operands: Sequence[Tensor], **params: Any) -> Tensor:
    if x.requires_grad and grad_enabled():
        raise UserError(NO_GRADIENT)
    rows = x.backend.run(quantize_rows, x.data)
    return Tensor(x.backend.run(op, *rows, *(operand.data for operand in operands), **params), x.backend)


def linear_layers(module: Module, prefix: str = "") -> Iterator[tuple[str, Linear, Callable[[Linear], None]]]:
    """Every linear layer within a module by its name, and a function that puts another in its place."""
    for name, child in list(module.named_children()):
        if isinstance(child, Linear):
            yield prefix + name, child, lambda layer, name=name: setattr(module, name, layer)  # type: ignore[misc]
        elif isinstance(child, Module):
            yield from linear_layers(child, f"{prefix}{name}.")


def int8_layers(module: Module) -> list[str]:
    """Names of the layers within that are in int8."""
    return [name for name, layer, _ in linear_layers(module) if isinstance(layer, Int8Linear)]


Replaced = tuple[Callable[[Linear], None], Linear]  # what puts a layer back in its place, and the one that was there


def make_int8(model: Any, names: Collection[str], values: bool = False) -> list[Replaced]:
    """Put layers in int8 in the place of those named; with `values`, of the same weights, rounded.

    None of the model's parameters asks for a gradient from then on.
    """
    replaced = []
    for name, layer, put in list(linear_layers(model)):
        if name not in names or isinstance(layer, Int8Linear):
            continue
        outs, inputs = layer.weight.declared_shape
        made = Int8Linear(inputs, outs, Place(layer.bias.backend, layer.bias.dtype.name))
        if values:
            if layer.low_rank is not None:
                raise UserError(f"{name} has a low-rank update: merge it first (AdapterModel.merge_and_unload)")
            weight, scale = quantize_weight(np.asarray(layer.weight.numpy(), np.float32))
            for parameter, given in zip(made.parameters(), (weight, scale[:, None], layer.bias.numpy()), strict=True):
                parameter.assign(given)
        made.prepacks = layer.prepacks
        put(made)
        replaced.append((put, layer))
    for parameter in model.parameters():
        parameter.requires_grad = False
    return replaced


def with_layers_of(model: Any, arrays: Mapping[str, np.ndarray], find: Callable[[str], str | None]) -> set[str]:
    """Make int8 what is so among arrays of a file, where `find` gives their name for a parameter.

    Returns the parameters that integers are expected for. Raises UserError for a weight in int8 without a scale.
    """
    whole = []
    for name, _, _ in linear_layers(model):
        weight, scale = find(f"{name}.weight"), find(name + SCALE)
        if weight is not None and arrays[weight].dtype == np.int8:
            if scale is None:
                raise UserError(f"{weight} is of int8, and there is no {weight.removesuffix('.weight')}{SCALE}")
            whole.append(name)
    if whole:
        make_int8(model, whole)
    return {f"{name}.weight" for name in int8_layers(model)}


def said_in(config: BertConfig, model: Module) -> BertConfig:
    """A config that says which layers are in int8, as transformers reads it."""
    others = {key: value for key, value in config.others.items() if key != KEY}
    if int8 := int8_layers(model):
        others[KEY] = quantization_config(int8)
    return replace(config, others=others)
