"""A low-rank update beside the weight of a linear layer: y = W x + b + s B A dropout(x), A and B trained."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from minibert.errors import UserError
from minibert.kernels.dropout import dropout
from minibert.kernels.embedding import gather_rows
from minibert.kernels.philox import Stream, random_words
from minibert.model.nn import INITIALISATION_STREAM, Module, Parameter, Place, standard_normal
from minibert.model.tensor import Tensor, apply

DROPOUT_STREAM = 32


class Update(Module):
    """What is trained beside a layer, whose name its first values and its dropout are drawn from."""

    step: Any = None  # of the forward pass in progress: it names the dropout mask
    layer: str
    seed: int

    def normal(self, name: str, std: float) -> np.ndarray:
        """First values of a parameter: normal ones, by seed, layer and name."""
        shape = getattr(self, name).declared_shape
        return std * standard_normal(self._stream(name), int(np.prod(shape))).reshape(shape)

    def uniform(self, name: str, limit: float) -> np.ndarray:
        """First values of a parameter: uniform in ±limit, by seed, layer and name."""
        shape = getattr(self, name).declared_shape
        words = random_words(self._stream(name), int(np.prod(shape)))
        return (((words + 0.5) * 2.0**-31 - 1) * limit).reshape(shape)

    def _stream(self, name: str) -> Stream:
        return Stream(self.seed, INITIALISATION_STREAM, 0, zlib.crc32(f"{self.layer}.{name}".encode()))


class LowRank(Update):
    """The update of one linear layer (Hu et al. 2021, section 4.1): lora_A (r, in), lora_B (out, r), s `scaling`.

    `nn.side_by_side` adds it.
    """

    def __init__(
        self, layer: str, shape: tuple[int, int], rank: int, scaling: float, rate: float, seed: int, place: Place
    ) -> None:
        outs, ins = shape
        self.lora_A = Parameter((rank, ins), "zeros", place)
        self.lora_B = Parameter((outs, rank), "zeros", place)
        self.rank = rank  # where it is 0, nothing is added
        self.layer, self.scaling, self.rate, self.seed = layer, scaling, rate, seed

    def initialise(self, how: Any) -> None:
        """A uniform in ±1/sqrt(in) and B 0, so that training begins at the model; "gaussian": A normal, of std 1/r.

        False: B uniform too, in ±1/sqrt(r), so that the update is something from the start.
        """
        ranks, ins = self.lora_A.declared_shape
        self.lora_A.assign(self.normal("lora_A", 1 / ranks) if how == "gaussian" else self.uniform("lora_A", ins**-0.5))
        self.lora_B.assign(np.zeros(self.lora_B.declared_shape) if how else self.uniform("lora_B", ranks**-0.5))

    def down(self, x: Tensor) -> Tensor:
        """dropout(x) A': (N, in) -> (N, r)."""
        if self.training and self.rate:
            if self.step is None:
                raise UserError(
                    "expected a call of the PeftModel, which numbers its dropout masks, not of the model within"
                )
            stream = Stream(self.seed, DROPOUT_STREAM, self.step, zlib.crc32(self.layer.encode()))
            x = apply(dropout, x, rate=self.rate, stream=stream)
        return x @ self.a().transpose(1, 0)

    def a(self) -> Tensor:
        """A, (r, in)."""
        return self.lora_A

    def up(self) -> Tensor:
        """s B, (out, r): scaling B costs less than scaling what it makes."""
        return self.lora_B * self.scaling

    def delta(self) -> np.ndarray:
        """s B A, (out, in), in float32 or better: what `merge` adds to the weight."""
        a, b = (np.asarray(p.numpy(), np.result_type(p.dtype, np.float32)) for p in (self.lora_A, self.lora_B))
        return (b @ a) * np.asarray(self.scaling, a.dtype)


class EmbeddingLowRank(Update):
    """The update of a table W (V, C): those of s (B A)', lora_embedding_A (r, V), lora_embedding_B (C, r)."""

    def __init__(self, layer: str, shape: tuple[int, int], rank: int, scaling: float, seed: int, place: Place) -> None:
        count, channels = shape
        self.lora_embedding_A = Parameter((rank, count), "zeros", place)
        self.lora_embedding_B = Parameter((channels, rank), "zeros", place)
        self.layer, self.scaling, self.seed = layer, scaling, seed

    def initialise(self, how: Any) -> None:
        """A 0 and B normal, of std 1; False: A normal too."""
        self.lora_embedding_A.assign(self.normal("lora_embedding_A", 0.0 if how else 1.0))
        self.lora_embedding_B.assign(self.normal("lora_embedding_B", 1.0))

    def __call__(self, ids: Tensor) -> Tensor:  # (N,) -> (N, C)
        """The update of some rows."""
        rows = apply(gather_rows, self.lora_embedding_A.transpose(1, 0), ids)
        return rows @ (self.lora_embedding_B * self.scaling).transpose(1, 0)

    def delta(self) -> np.ndarray:
        """s (B A)', (V, C), in float32 or better: what `merge` adds to the table."""
        parts = self.lora_embedding_A, self.lora_embedding_B
        a, b = (np.asarray(p.numpy(), np.result_type(p.dtype, np.float32)) for p in parts)
        return (b @ a).swapaxes(0, 1) * np.asarray(self.scaling, a.dtype)
