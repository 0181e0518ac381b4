"""What goes through a model and what comes out of it: a batch on its backend, and outputs computed when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from minibert.errors import UserError
from minibert.kernels.cross_entropy import cross_entropy, linear_cross_entropy
from minibert.kernels.elementwise import where
from minibert.kernels.embedding import gather_rows, scatter_rows
from minibert.kernels.linear import linear
from minibert.kernels.philox import Stream, StreamFrom
from minibert.kernels.view import concatenate
from minibert.model.nn import Place
from minibert.model.packing import IGNORE, Packed, Part, sentence_labels
from minibert.model.tensor import Tensor, apply, at_place, demand_unchanged, grad_enabled, set_grad_enabled, tick


class Batch:
    """A packed batch on its backend, with the dropout of this forward pass."""

    def __init__(self, packed: Packed, place: Place, streams: Stream | None) -> None:
        self.packed, self.place, self.streams = packed, place, streams
        self.cu_seqlens = self.integers(packed.cu_seqlens)
        self.with_prefix: Any = None  # where rows stand beside a prefix: minibert.tuning.prefix notes it here

    def integers(self, ids: np.ndarray) -> Tensor:
        return Tensor(self.place.backend.asarray(ids), self.place.backend)

    def dropout(self, rate: float, stream: int, layer: int, columns: int, **part: int) -> dict[str, Any]:
        """`rate` and `stream` of one dropout of (rows, columns); rate 0 outside training.

        In a part of a batch it is that of the whole after `before` rows, the tokens' if not given; `width` is that of
        `StreamFrom`.
        """
        if self.streams is None:
            return {"rate": 0.0, "stream": Stream()}
        named = self.streams._replace(stream=stream, layer=layer)
        if self.packed.part != Part():
            words = part.get("before", self.packed.part.row) * columns
            assert words % 4 == 0, "a part begins with a block of four words: see `packing.halves`"
            named = StreamFrom.of(named, words // 4, part.get("width", 0))
        return {"rate": rate, "stream": named}

    def attention_dropout(self, rate: float, stream: int, layer: int, heads: int) -> dict[str, Any]:
        """The same of an attention's probabilities."""
        width = -(-self.packed.part.longest // 4) * 4
        return self.dropout(rate, stream, layer, heads * width, width=width)

    def floats(self, values: np.ndarray) -> Tensor:
        return Tensor(self.place.backend.asarray(values, dtype=self.place.dtype), self.place.backend)

    @cached_property
    def rows(self) -> tuple[np.ndarray, tuple[int, int]]:
        """Where each token stands in the flat (B * T) padded batch, (N,); and (B, T), of a packed batch too."""
        packed = self.packed
        if packed.rows is not None and packed.padded_shape is not None:
            return packed.rows, packed.padded_shape
        lengths = np.diff(packed.cu_seqlens)
        count, length = len(lengths), int(lengths.max())
        shift = np.arange(count) * length - packed.cu_seqlens[:-1]
        return (np.repeat(shift, lengths) + np.arange(len(packed.input_ids))).astype(np.int32), (count, length)

    @property
    def real(self) -> np.ndarray:
        """(B, T) whether there is a token."""
        rows, shape = self.rows
        real = np.zeros(shape, bool)
        real.reshape(-1)[rows] = True
        return real

    def by_sequence(self, x: Tensor) -> Tensor:  # (N, C) -> (B, T, C), zero where there is no token
        rows, (count, length) = self.rows
        spread = apply(scatter_rows, x, self.integers(rows), num_rows=count * length)
        return spread.reshape(count, length, x.shape[-1])

    def or_least(self, real: np.ndarray, x: Tensor) -> Tensor:
        """x where it is of a token, else a number whose exp vanishes beside any other's."""
        least = -6e4 if self.place.dtype == "float16" else -1e30  # float16 ends at 65504
        return apply(where, self.integers(real), x, self.floats(np.asarray(least)))

    def padded(self, x: Tensor) -> Tensor:  # (N, C) -> (B, T, C), zero where the batch was padded
        if self.packed.rows is None or self.packed.padded_shape is None:
            return x
        return self.by_sequence(x)

    def of_its_own(self, x: Tensor) -> Tensor:  # (N, C) -> (B, T, C) or (N, C)
        """As `padded`, always in other memory than x: who writes there changes nothing that is computed from x."""
        return apply(concatenate, x, axis=0) if self.packed.rows is None else self.padded(x)


class BertOutput(Mapping[Any, Any]):
    """What the encoder made of a batch. Everything but the loss is computed when first asked for.

    Padded input gives padded output, zero where the padding was; packed input gives packed output. As transformers'
    ModelOutput it is also a mapping, whose values can be had by number: `out["logits"]`, `out[0]`, `out[:2]`. What
    would be computed from weights that have changed since the forward pass raises UserError; modules and parameters
    that are put in the places of others change nothing.
    """

    names: tuple[str, ...] = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")

    def __init__(self, model: Any, batch: Batch, layers: list[Tensor], attentions: list[Tensor] | None) -> None:
        self._batch, self._layers, self._attentions = batch, layers, attentions
        self._config, self._pooler = model.config, model.pooler and model.pooler.as_it_is()
        self._word_embeddings = model.embeddings.word_embeddings.as_it_is()
        self._grad, self._made_at = grad_enabled(), tick()
        self.loss: Tensor | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        tick(after=self._made_at)

    def __iter__(self) -> Iterator[str]:
        """The names of what there is, in transformers' order."""
        absent = {
            "loss": self.loss is None, "pooler_output": self._pooler is None,
            "hidden_states": len(self._layers) == 1, "attentions": self._attentions is None,
        }  # fmt: skip
        return (name for name in self.names if not absent.get(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(name == own for own in self)

    def __getitem__(self, key: Any) -> Any:
        names = list(self)
        if isinstance(key, slice):
            return tuple(getattr(self, name) for name in names[key])
        if isinstance(key, str) and key not in names:
            raise KeyError(f"{key}: this output has {', '.join(names)}")
        return getattr(self, key if isinstance(key, str) else names[key])

    def __setitem__(self, key: str, value: Any) -> None:
        """`out["loss"] = x`, as `out.loss = x`. Raises UserError for any other name."""
        if key != "loss" or key not in self.names:
            raise UserError(f"out[{key!r}] = ...: of what comes out of a model only the loss can be set")
        self.loss = value

    __eq__, __hash__ = object.__eq__, object.__hash__  # not those of a mapping: they would compute every value

    def to_tuple(self) -> tuple[Any, ...]:
        """All that there is, computed, in the order of the names."""
        return tuple(self[:])

    def in_form(self, return_dict: bool | None) -> Any:
        """This, or the tuple of its values: as the call says or, where it says nothing, the config."""
        asked = self._config.return_dict if return_dict is None else return_dict
        return self if asked else self.to_tuple()

    @cached_property
    def last_hidden_state(self) -> Tensor:
        """(B, T, C), or (N, C) for packed input."""
        with set_grad_enabled(self._grad):
            return self._batch.of_its_own(self._layers[-1])

    @cached_property
    def hidden_states(self) -> tuple[Tensor, ...] | None:
        """The embeddings and every layer's output; None unless `output_hidden_states` was asked for."""
        if len(self._layers) == 1:
            return None
        with set_grad_enabled(self._grad):
            return tuple(self._batch.of_its_own(x) for x in self._layers)

    @property
    def attentions(self) -> tuple[Tensor, ...] | None:
        """(B, H, T, T) of every layer; None unless `output_attentions` was asked for."""
        return None if self._attentions is None else tuple(self._attentions)

    @cached_property
    def pooler_output(self) -> Tensor | None:
        """(B, C): tanh(W x + b) of each sequence's first real token (of padding on the left, none).

        Zero for a sequence without any; None where the model has no pooler (`add_pooling_layer`).
        """
        pooler = self._pooler
        if pooler is None:
            return None
        demand_unchanged("out.pooler_output", pooler.parameters(), self._made_at)
        with set_grad_enabled(self._grad):
            return self.of_first_tokens(pooler)

    def of_first_tokens(self, make: Callable[[Tensor], Tensor] = lambda first: first) -> Tensor:
        """(B, C): what is made of each sequence's first token; zeros for a sequence without any."""
        packed = self._batch.packed
        real = packed.not_empty
        first = self._batch.integers(packed.first_rows[real])
        made = make(apply(gather_rows, self._layers[-1], first))
        if real.all():
            return made
        rows = self._batch.integers(np.flatnonzero(real).astype(np.int32))
        return apply(scatter_rows, made, rows, num_rows=len(real))


class MaskedLMOutput(BertOutput):
    """With the masked-language-model logits, which are computed when first asked for."""

    names: tuple[str, ...] = ("loss", "logits", "hidden_states", "attentions")
    heads: Any

    @classmethod
    def of(cls, encoded: BertOutput, heads: Any) -> Any:
        out = cls.__new__(cls)
        vars(out).update(vars(encoded), heads=heads.as_it_is())
        return out

    def _demand_unchanged(self, what: str) -> None:
        demand_unchanged(what, (*self.transform.parameters(), *self.decoder()), self._made_at)

    @property
    def transform(self) -> Any:
        """What stands before the decoder: (M, C) -> (M, C)."""
        return self.heads.predictions.transform

    @property
    def head_name(self) -> str:
        return self.heads.predictions.name

    def decoder(self) -> tuple[Tensor, Tensor]:
        predictions = self.heads.predictions
        return getattr(predictions, "decoder", self._word_embeddings).weight, predictions.bias

    @cached_property
    def logits(self) -> Tensor:
        """(B, T, V), or (N, V) for packed input."""
        self._demand_unchanged("out.logits")
        with set_grad_enabled(self._grad):
            x = self.transform(self._layers[-1])
            return self._batch.padded(apply(linear, x, *self.decoder()))

    def logits_at(self, index: np.ndarray) -> Tensor:
        """(M, V): logits of the packed rows `index` (M,) alone, as where predictions are counted."""
        self._demand_unchanged("out.logits_at")
        with set_grad_enabled(self._grad):
            return apply(linear, self.transformed(index), *self.decoder())

    def transformed(self, index: np.ndarray) -> Tensor:  # (M,) rows -> (M, C)
        rows = self._batch.integers(index.astype(np.int32, copy=False))
        return self.transform(apply(gather_rows, self._layers[-1], rows))

    def masked_lm_loss(self) -> Tensor:
        """Cross entropy on the positions that have a label: the head runs on no others."""
        packed = self._batch.packed
        if packed.predicted is None or packed.targets is None or not len(packed.predicted):
            raise UserError(f"labels: expected at least one position to predict, but every label is {IGNORE}")
        self._demand_unchanged("out.loss")
        with at_place(self.head_name):
            targets = self._batch.integers(packed.targets)
            return apply(linear_cross_entropy, self.transformed(packed.predicted), *self.decoder(), targets)


class PreTrainingOutput(MaskedLMOutput):
    """With the logits of the next-sentence head beside those of the masked language model."""

    names: tuple[str, ...] = ("loss", "prediction_logits", "seq_relationship_logits", "hidden_states", "attentions")

    @property
    def prediction_logits(self) -> Tensor:
        return self.logits

    @cached_property
    def seq_relationship_logits(self) -> Tensor:
        """(B, 2): index 0 for "the second segment follows the first", 1 for "it does not"."""
        pooled, head = self.pooler_output, self.heads.seq_relationship
        demand_unchanged("out.seq_relationship_logits", head.parameters(), self._made_at)
        with set_grad_enabled(self._grad):
            return head(pooled)

    def next_sentence_loss(self, next_sentence_label: Any) -> Tensor:
        """Mean cross entropy of the (B,) labels that count: 0 and 1. Raises UserError for others and where none does.

        -100 does not count, nor does the label of a sequence that is masked throughout.
        """
        labels = sentence_labels(next_sentence_label, self._batch.packed)
        return apply(cross_entropy, self.seq_relationship_logits, self._batch.integers(labels))
