"""Modules: parameters with names, and the layers BERT is made of."""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, NamedTuple

import numpy as np

from minibert.backends.base import Backend
from minibert.kernels.activation import gelu, relu, tanh
from minibert.kernels.embedding import embedding
from minibert.kernels.layer_norm import add_layer_norm, layer_norm
from minibert.kernels.linear import linear, linear_gelu, matmul
from minibert.kernels.op import Array
from minibert.kernels.philox import Stream, random_words
from minibert.kernels.view import concatenate, pad_axis
from minibert.model.config import GELU
from minibert.model.packing import row_numbers
from minibert.model.tensor import Tensor, apply, at_place, grad_enabled, tick

INITIALISATION_STREAM = 3


class Place(NamedTuple):
    """Where parameters live, and in which dtype."""

    backend: Backend
    dtype: str


class Parameter(Tensor):
    """A leaf tensor with a name and a way to begin: "normal", "zeros" or "ones". It has no data until initialised.

    Whoever writes its values tells it (`wrote`), so that nothing is computed from weights that came after a forward
    pass: `assign`, `load_state_dict`, AdamW and setting `data` do. What is written through a view (`p.data[0] = 1`)
    cannot be seen: call `wrote` after it.
    """

    __slots__ = ("begin", "declared_shape", "master", "written_at", "zero_row")

    def __init__(self, shape: tuple[int, ...], begin: str, place: Place, zero_row: int | None = None) -> None:
        super().__init__(place.backend.asarray(np.empty((0,)), dtype=place.dtype), place.backend, requires_grad=True)
        self.declared_shape, self.begin, self.zero_row = shape, begin, zero_row
        self.master: Array | None = None  # the same in float32, where an optimiser keeps it: `data` follows it

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "data":
            self.wrote()

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array, to read: `assign` writes."""
        values = super().numpy().view()
        values.flags.writeable = False
        return values

    def wrote(self) -> None:
        """Note that the values have changed."""
        self.written_at = tick()

    def move(self, memory: Array) -> None:
        """Live in other memory of the same shape and dtype from now on, with the same values."""
        memory[...] = self.data
        super().__setattr__("data", memory)

    def initialise(self, seed: int, name: str, std: float) -> None:
        """Draw the first values: normal ones from Philox by seed and name, in float64, rounded once."""
        count = int(np.prod(self.declared_shape))
        if self.begin == "normal":
            values = std * standard_normal(Stream(seed, INITIALISATION_STREAM, 0, zlib.crc32(name.encode())), count)
        else:
            values = np.full(count, float(self.begin == "ones"))
        values = values.reshape(self.declared_shape)
        if self.zero_row is not None:
            values[self.zero_row] = 0
        self.assign(values)

    def assign(self, values: Array) -> None:
        """Take new values; where there are some already, in place, since an optimiser may hold a view of them."""
        if self.master is not None:
            self.master[...] = self.backend.asarray(values, dtype=np.float32)
        values = self.backend.asarray(values, dtype=self.dtype)
        if self.data.shape == self.declared_shape:
            self.data[...] = values
            self.wrote()
        else:
            self.data = values.copy()


def lay_together(*parameters: Parameter) -> None:
    """Give parameters that have no data yet memory one after the other, so that joining them copies nothing."""
    first = parameters[0]
    ends = np.cumsum([0, *(np.prod(p.declared_shape) for p in parameters)]).tolist()
    whole = first.backend.asarray(np.zeros(ends[-1]), dtype=first.dtype)
    for p, start, stop in zip(parameters, ends, ends[1:], strict=False):
        p.data = whole[start:stop].reshape(p.declared_shape)


def standard_normal(stream: Stream, count: int) -> np.ndarray:
    """(count,) float64 by Box and Muller (1958) from pairs of Philox words."""
    words = random_words(stream, 2 * count).reshape(-1, 2).astype(np.float64)
    u, v = (words.T + 0.5) * 2.0**-32
    return np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)


def _at_its_place(call: Callable[..., Any]) -> Callable[..., Any]:
    """A module's call, whose ops know where in the model they are."""

    @wraps(call)
    def placed(self: Module, *args: Any, **kwargs: Any) -> Any:
        with at_place(self.name):
            return call(self, *args, **kwargs)

    return placed


class Module:
    """Attributes that are parameters or modules are found by name, in the order in which they were set."""

    training = False
    name = ""  # from the model down, as its parameters are named: `bert.encoder.layer.2.attention`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls):
            cls.__call__ = _at_its_place(cls.__call__)  # type: ignore[method-assign]

    def __setattr__(self, attribute: str, value: Any) -> None:
        super().__setattr__(attribute, value)
        if isinstance(value, Module | list):
            self._name_children()

    def _name_children(self) -> None:
        for name, child in self.named_children():
            if isinstance(child, Module):
                child.name = f"{self.name}.{name}".removeprefix(".")
                child._name_children()

    def as_it_is(self) -> Any:
        """The module with all within it as it is now: the same parameters, whatever is put in their places later."""
        now = object.__new__(type(self))
        for name, value in vars(self).items():
            if isinstance(value, list):
                value = [item.as_it_is() if isinstance(item, Module) else item for item in value]
            vars(now)[name] = value.as_it_is() if isinstance(value, Module) else value
        return now

    def named_children(self) -> Iterator[tuple[str, Any]]:
        for name, value in vars(self).items():
            if isinstance(value, list):
                yield from ((f"{name}.{i}", item) for i, item in enumerate(value) if isinstance(item, Module))
            elif isinstance(value, Module | Parameter):
                yield name, value

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """(name, parameter) pairs under Hugging Face's names."""
        for name, child in self.named_children():
            if isinstance(child, Parameter):
                yield prefix + name, child
            else:
                yield from child.named_parameters(f"{prefix}{name}.")

    def parameters(self) -> list[Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The call, by torch's name."""
        call: Any = self
        return call(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """Dropout on (or off), here and in every module within. Returns the module."""
        self.training = mode
        for _, child in self.named_children():
            if isinstance(child, Module):
                child.train(mode)
        return self

    def eval(self) -> Any:
        """Dropout off. Returns the module."""
        return self.train(False)

    def prepack(self) -> Any:
        """From now on, without gradients, keep the weights of linear layers as kernels read them. Returns the module.

        Outputs are the same bits, sooner: where rows are few, to pack a weight takes longer than to multiply by it. It
        takes as much memory again as these weights, on backends that pack. A weight that was written is packed anew
        when it is next read: what is written through a view has to be told (`Parameter.wrote`).
        """
        for _, child in self.named_children():
            if isinstance(child, Module):
                child.prepack()
        return self


class AsOne(NamedTuple):
    """Linear layers side by side, as one: what is kept of them while none of their parameters is written."""

    operands: tuple[Tensor, ...]
    parameters: list[Parameter]  # of which it was made
    made_at: int

    def holds(self, parameters: list[Parameter]) -> bool:
        """Whether these are they still."""
        same = len(parameters) == len(self.parameters) and all(map(operator.is_, parameters, self.parameters))
        return same and all(p.written_at < self.made_at for p in parameters)


class Linear(Module):
    """y = x W' + b; weight (out_features, in_features). To it is added what tuning hangs on it as `low_rank`."""

    low_rank: Any = None  # a minibert.tuning.low_rank.LowRank
    prepacks = False  # see `prepack`
    kept: AsOne | None = None  # this layer and those that it stands beside
    parts: tuple[str, ...] = ("weight", "bias")  # its own parameters

    def __init__(self, in_features: int, out_features: int, place: Place) -> None:
        self.weight = Parameter((out_features, in_features), "normal", place)
        self.bias = Parameter((out_features,), "zeros", place)

    def __call__(self, x: Tensor) -> Tensor:  # (N, in) -> (N, out)
        return side_by_side(x, self)

    @staticmethod
    def joined(layers: Sequence[Any]) -> tuple[Tensor, ...]:
        """What is multiplied by, of layers of this kind side by side: weight (sum of out, in) and bias."""
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        if len(layers) == 1:
            return weights[0], biases[0]
        return apply(concatenate, *weights, axis=0), apply(concatenate, *biases, axis=0)

    @staticmethod
    def product(x: Tensor, operands: Sequence[Tensor]) -> Tensor:
        """Of rows (N, in) and what `joined` gave: (N, sum of out)."""
        return apply(linear, x, *operands)

    @staticmethod
    def gelu_of_product(x: Tensor, operands: Sequence[Tensor], approximate: str) -> Tensor:
        return apply(linear_gelu, x, *operands, approximate=approximate)

    def prepack(self) -> Any:
        self.prepacks = True
        return self

    def __getstate__(self) -> dict[str, Any]:  # a copy makes its own
        return {name: value for name, value in vars(self).items() if name != "kept"}


def as_one(layers: Sequence[Linear]) -> tuple[Tensor, ...]:
    """What is multiplied by, of linear layers of a kind side by side, the weight first."""
    first, parameters = layers[0], [getattr(layer, part) for layer in layers for part in layer.parts]
    keeps = first.prepacks and not grad_enabled()
    kept = first.kept  # read once: other threads may be at the same model
    if keeps and kept is not None and kept.holds(parameters):
        return kept.operands
    first.kept, made_at = None, tick()  # before they are read: who writes them meanwhile is later
    weight, *others = first.joined(layers)
    if keeps:
        weight = Tensor(weight.backend.prepacked(weight.data), weight.backend)
        first.kept = AsOne((weight, *others), parameters, made_at)
    return weight, *others


def side_by_side(x: Tensor, *layers: Linear) -> Tensor:
    """Linear layers of one input as one product, their outputs along the channels: (N, in) -> (N, sum of out).

    Low-rank updates of some of them are one more: x A' of each, side by side, (N, sum of r), times a matrix
    (sum of out, sum of r) in which the B of each stands at its layer's rows and its A's columns.
    """
    first = layers[0]
    if all(type(layer) is type(first) for layer in layers):
        y = first.product(x, as_one(layers))
    else:
        y = apply(concatenate, *(layer.product(x, as_one([layer])) for layer in layers), axis=1)
    ends = np.cumsum([layer.weight.declared_shape[0] for layer in layers]).tolist()
    tuned = [(layer.low_rank, end) for layer, end in zip(layers, ends, strict=True) if layer.low_rank is not None]
    tuned = [(low_rank, end) for low_rank, end in tuned if low_rank.rank]
    if not tuned:
        return y
    downs = [low_rank.down(x) for low_rank, _ in tuned]
    ups = [low_rank.up() for low_rank, _ in tuned]
    if len(layers) > 1:
        ups = [
            apply(pad_axis, up, axis=0, before=end - up.shape[0], after=ends[-1] - end)
            for up, (_, end) in zip(ups, tuned, strict=True)
        ]
    if len(tuned) > 1:
        downs, ups = ([apply(concatenate, *parts, axis=1)] for parts in (downs, ups))
    update = apply(matmul, downs[0], ups[0].transpose(1, 0))
    total = y + update
    for part in (y, update):
        part.forget()  # a sum's gradient reads neither
    return total


def activated(dense: Linear, x: Tensor, hidden_act: str) -> Tensor:  # (N, in) -> (N, out)
    """act(x W' + b), in one op where there is one."""
    if hidden_act in GELU and dense.low_rank is not None:
        return apply(gelu, dense(x), approximate=GELU[hidden_act])
    if hidden_act in GELU:
        return dense.gelu_of_product(x, as_one([dense]), GELU[hidden_act])
    return apply(tanh if hidden_act == "tanh" else relu, dense(x))


class LayerNorm(Module):
    """Layer norm over channels, of x or of dropout(x) + residual."""

    def __init__(self, channels: int, eps: float, place: Place) -> None:
        self.weight = Parameter((channels,), "ones", place)
        self.bias = Parameter((channels,), "zeros", place)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:  # (N, C) -> (N, C)
        return apply(layer_norm, x, self.weight, self.bias, eps=self.eps)

    def add(self, x: Tensor, residual: Tensor, rate: float, stream: Stream) -> Tensor:
        return apply(add_layer_norm, x, residual, self.weight, self.bias, eps=self.eps, rate=rate, stream=stream)


class Embedding(Module):
    """A table (num_embeddings, channels). To its rows is added what tuning hangs on it as `low_rank`."""

    low_rank: Any = None  # a minibert.tuning.low_rank.EmbeddingLowRank

    def __init__(self, num_embeddings: int, channels: int, place: Place, padding_idx: int | None = None) -> None:
        self.weight = Parameter((num_embeddings, channels), "normal", place, zero_row=padding_idx)

    def __call__(self, ids: Any) -> Tensor:
        """Rows of the table: ids of any shape -> (*shape, channels). Raises UserError for ids that are out of range."""
        count, channels = self.weight.declared_shape
        rows, backend = row_numbers("ids", ids, count), self.weight.backend
        nothing = Tensor(backend.asarray(np.zeros((1, channels)), dtype=self.weight.dtype), backend)
        there = Tensor(backend.asarray(rows.reshape(-1).astype(np.int32)), backend)
        first = Tensor(backend.asarray(np.zeros(rows.size, np.int32)), backend)
        found = embed((self.weight, nothing, nothing), (there, first, first), self.weight.zero_row)
        return self.tuned(found, there).reshape(*rows.shape, channels)

    def tuned(self, rows: Tensor, ids: Tensor) -> Tensor:  # (N, C), (N,) -> (N, C)
        """Rows of the table, or sums of them with others, with the update of these."""
        return rows if self.low_rank is None else rows + self.low_rank(ids)


def embed(tables: tuple[Tensor, Tensor, Tensor], ids: tuple[Tensor, Tensor, Tensor], padding_idx: int | None) -> Tensor:
    """Word, position and token-type rows, added: three ids (N,) -> (N, C)."""
    return apply(embedding, *tables, *ids, padding_idx=padding_idx)
