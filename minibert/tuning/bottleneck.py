"""Adapters: two small layers with a bottleneck between, put into every block of a frozen encoder.

Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan, Gelly, "Parameter-efficient transfer
learning for NLP" (ICML 2019), `DoubleSeqBnConfig`: after both halves of a layer, d + up(f(down(d))) in place of what
the layer norm adds to the residual. Pfeiffer, Vulić, Gurevych, Ruder, "MAD-X" (EMNLP 2020), `SeqBnConfig`: after the
second half alone, and of LN(d + residual): d + up(f(down(LN(d + residual)))). Names and files are those of the library
`adapters`, which has no safetensors unless its `use_safetensors=True` is asked for, in saving and in loading.
"""

from __future__ import annotations

import dataclasses
import reprlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from minibert.errors import UserError
from minibert.kernels.activation import tanh
from minibert.kernels.dropout import dropout
from minibert.kernels.philox import NO_STREAM, Stream, random_words
from minibert.model.config import GELU
from minibert.model.nn import INITIALISATION_STREAM, LayerNorm, Linear, Module, Place, activated
from minibert.model.tensor import Tensor, apply
from minibert.tuning.low_rank import DROPOUT_STREAM

SWISH = ("swish", "silu")
FUNCTIONS = (*SWISH, "relu", "tanh", *GELU)
INITIALISATIONS = ("bert", "houlsby")
# Settings of `adapters` that change what is computed, each with the one value that is supported.
FIXED = {
    "adapter_residual_before_ln": False, "architecture": None, "cross_adapter": False, "inv_adapter": None,
    "is_parallel": False, "ln_after": False, "ln_before": False, "original_ln_after": True, "phm_layer": False,
    "residual_before_ln": True, "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip


@dataclass(frozen=True)
class BnConfig:
    """A bottleneck adapter, under the names of `adapters`. Raises UserError for a value that is out of range."""

    name: str = "default"  # of the adapter: a part of its tensors' names
    mh_adapter: bool = True  # one after attention
    output_adapter: bool = True  # one after the second half of a layer
    reduction_factor: float = 16  # channels for each of the bottleneck's
    non_linearity: str = "swish"
    original_ln_before: bool = False  # it reads what the layer norm makes, not what goes into it
    leave_out: Any = ()  # numbers of layers that have none
    scaling: float = 1.0  # of what it adds
    dropout: float = 0.0  # of what it adds
    init_weights: str = "bert"  # normal of std 0.02, or "houlsby": of std 0.01, cut at twice that; biases 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "leave_out", tuple(self.leave_out or ()))
        for name, condition, expected in (
            ("name", isinstance(self.name, str) and self.name and "." not in self.name, "a name without dots"),
            ("output_adapter", self.mh_adapter or self.output_adapter, "True, where mh_adapter is False"),
            ("reduction_factor", _is_number(self.reduction_factor) and self.reduction_factor > 0, "a number above 0"),
            ("non_linearity", self.non_linearity in FUNCTIONS, f"one of {', '.join(FUNCTIONS)}"),
            ("leave_out", all(isinstance(number, int) for number in self.leave_out), "numbers of layers"),
            ("scaling", _is_number(self.scaling), "a number"),
            ("dropout", _is_number(self.dropout) and 0 <= self.dropout < 1, "a share in [0, 1)"),
            ("init_weights", self.init_weights in INITIALISATIONS, " or ".join(INITIALISATIONS)),
        ):
            if not condition:
                got = reprlib.repr(getattr(self, name))
                raise UserError(f"{type(self).__name__}: {name}: expected {expected}, got {got}")

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json holds under "config"."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key != "name"}
        fixed = {key: value for key, value in FIXED.items() if key != "architecture"}
        return {**fixed, **values, "leave_out": list(self.leave_out), "scaling": float(self.scaling)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], name: str) -> BnConfig:
        """From what adapter_config.json holds under "config". Raises UserError for what is not supported."""
        for key, supported in FIXED.items():
            if values.get(key, supported) != supported:
                raise UserError(f"{key}: supported is {supported!r} alone, got {values[key]!r}")
        names = {field.name for field in dataclasses.fields(cls)} - {"name"}
        return cls(name=name, **{key: value for key, value in values.items() if key in names})


@dataclass(frozen=True)
class DoubleSeqBnConfig(BnConfig):
    """Houlsby's: after attention and after the second half of every layer."""


@dataclass(frozen=True)
class SeqBnConfig(BnConfig):
    """Pfeiffer's: after the second half of every layer alone, reading what the layer norm makes."""

    mh_adapter: bool = False
    non_linearity: str = "relu"
    original_ln_before: bool = True


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


class Bottleneck(Module):
    """x + scaling · up(f(down(x))): adapter_down (b, C) and adapter_up (C, b), with biases."""

    step: Any = None  # of the forward pass in progress: it names the dropout mask

    def __init__(self, layer: str, channels: int, config: BnConfig, seed: int, place: Place) -> None:
        self.layer, self.config, self.seed = layer, config, seed
        between = max(1, int(channels // config.reduction_factor))
        self.adapter_down, self.adapter_up = Linear(channels, between, place), Linear(between, channels, place)
        for name, parameter in self.named_parameters():
            parameter.initialise(seed, f"{layer}.{name}", 0.02)
            if config.init_weights == "houlsby" and parameter.begin == "normal":
                parameter.assign(self._cut_normal(name, parameter.declared_shape))

    def _cut_normal(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Normal of std 0.01 between -0.02 and 0.02, by inverting its distribution function."""
        from scipy.special import ndtr, ndtri

        key = zlib.crc32(f"{self.layer}.{name}".encode())
        words = random_words(Stream(self.seed, INITIALISATION_STREAM, 0, key), int(np.prod(shape)))
        uniform = (words + 0.5) * 2.0**-32
        return 0.01 * ndtri(ndtr(-2) + uniform * (ndtr(2) - ndtr(-2))).reshape(shape)

    def __call__(self, x: Tensor, residual: Tensor, norm: LayerNorm, dropped: dict[str, Any]) -> Tensor:
        """(N, C) and (N, C) -> (N, C), for `norm` to add to the residual; `dropped`, the dropout of x, comes first."""
        if dropped["rate"]:
            x = apply(dropout, x, **dropped)
        read = norm.add(x, residual, rate=0.0, stream=NO_STREAM) if self.config.original_ln_before else x
        update = self.adapter_up(self._between(read))
        if self.config.scaling != 1:
            update = update * self.config.scaling
        if self.training and self.config.dropout:
            if self.step is None:
                raise UserError(
                    "expected a call of the tuned model, which numbers its dropout masks, not of the one within"
                )
            stream = Stream(self.seed, DROPOUT_STREAM, self.step, zlib.crc32(self.layer.encode()))
            update = apply(dropout, update, rate=self.config.dropout, stream=stream)
        return x + update

    def _between(self, x: Tensor) -> Tensor:
        if self.config.non_linearity not in SWISH:
            return activated(self.adapter_down, x, self.config.non_linearity)
        half = self.adapter_down(x) * 0.5  # z sigmoid(z) = h + h tanh(h), h = z / 2
        return half + half * apply(tanh, half)
