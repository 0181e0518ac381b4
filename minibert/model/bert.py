"""BERT (Devlin et al., "BERT: Pre-training of deep bidirectional transformers", 2019), under Hugging Face's names.

One letter per axis: B sequences, N packed tokens, T positions, C channels, H heads, V vocabulary, M predicted
positions. Inside, a batch is (N, C): no attention mask and no arithmetic on padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from minibert.errors import UserError
from minibert.kernels.activation import tanh
from minibert.kernels.attention import attention
from minibert.kernels.cross_entropy import linear_cross_entropy
from minibert.kernels.dropout import dropout
from minibert.kernels.embedding import gather_rows
from minibert.kernels.philox import NO_STREAM, Stream
from minibert.kernels.softmax import softmax
from minibert.model.config import BertConfig
from minibert.model.nn import (
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Parameter,
    Place,
    activated,
    embed,
    lay_together,
    side_by_side,
)
from minibert.model.outputs import Batch, BertOutput, MaskedLMOutput, PreTrainingOutput
from minibert.model.packing import IGNORE, Packed, as_array, pack, refuse_unknown
from minibert.model.pretrained import PreTrained
from minibert.model.recompute import SumOfParts, recomputed
from minibert.model.tensor import Tensor, apply, at_place

HEAD_ROWS = 384  # predicted positions whose logits exist at one time
EMBEDDING_STREAM, ATTENTION_OUTPUT_STREAM, ATTENTION_STREAM, OUTPUT_STREAM, CLASSIFIER_STREAM = 16, 17, 18, 19, 20


class BertEmbeddings(Module):
    first_position = 0  # of every sequence; a prefix has those before

    def __init__(self, config: BertConfig, place: Place) -> None:
        channels = config.embedding_size
        self.config = config
        self.word_embeddings = Embedding(config.vocab_size, channels, place, padding_idx=config.pad_token_id)
        self.position_embeddings = Embedding(config.max_position_embeddings, channels, place)
        self.token_type_embeddings = Embedding(config.type_vocab_size, channels, place)
        self.LayerNorm = LayerNorm(channels, config.layer_norm_eps, place)

    def __call__(self, batch: Batch, embeds: Tensor | None = None) -> Tensor:  # embeds (rows, C) -> (N, C)
        packed = batch.packed
        word, padding_idx = (
            (self.word_embeddings.weight, self.config.pad_token_id) if embeds is None else (embeds, None)
        )
        tables = word, self.position_embeddings.weight, self.token_type_embeddings.weight
        ids = [batch.integers(i) for i in (packed.input_ids, self.positions(packed), packed.token_type_ids)]
        x = embed(tables, (ids[0], ids[1], ids[2]), padding_idx)
        if embeds is None:
            x = self.word_embeddings.tuned(x, ids[0])
        x = self.token_type_embeddings.tuned(self.position_embeddings.tuned(x, ids[1]), ids[2])
        x = self.LayerNorm(x)
        params = batch.dropout(self.config.hidden_dropout_prob, EMBEDDING_STREAM, 0, x.shape[1])
        if not params["rate"]:
            return x
        y = apply(dropout, x, **params)
        x.forget()  # a mask is all that the gradient reads, and the layer norm's gradient reads its input
        return y

    def positions(self, packed: Packed) -> np.ndarray:
        """(N,) counted from `first_position`. Raises UserError where they are more than the model has."""
        first, count = self.first_position, self.config.max_position_embeddings
        if first and len(packed.position_ids) and packed.position_ids.max() + first >= count:
            raise UserError(
                f"a sequence of {packed.position_ids.max() + 1} tokens is too long: beside a prefix of {first} there "
                f"are positions for {count - first}; cut it"
            )
        return packed.position_ids + np.int32(first) if first else packed.position_ids


class BertSelfAttention(Module):
    prefix: Any = None  # a minibert.tuning.prefix.Prefix: keys and values before those of every sequence

    def __init__(self, config: BertConfig, place: Place, layer: int) -> None:
        self.config, self.layer = config, layer
        self.query, self.key, self.value = (Linear(config.hidden_size, config.hidden_size, place) for _ in range(3))
        for three in zip(*(part.parameters() for part in (self.query, self.key, self.value)), strict=True):
            lay_together(*three)  # the three are one product

    def __call__(self, x: Tensor, batch: Batch, attentions: list[Tensor] | None) -> Tensor:  # (N, C) -> (N, C)
        qkv = side_by_side(x, self.query, self.key, self.value)  # (N, 3C): one product for all three
        if attentions is not None:
            attentions.append(self.probabilities(qkv, batch))
        heads, rate = self.config.num_attention_heads, self.config.attention_probs_dropout_prob
        params = batch.attention_dropout(rate, ATTENTION_STREAM, self.layer, heads)
        if self.prefix is not None:
            return self.prefix(qkv, batch, num_heads=heads, **params)
        return apply(attention, qkv, batch.cu_seqlens, num_heads=heads, **params)

    def probabilities(self, qkv: Tensor, batch: Batch) -> Tensor:
        """softmax(q k' / sqrt D), (B, H, T, T), before dropout; computed when asked for: no kernel keeps it."""
        if self.prefix is not None:
            raise UserError("output_attentions: not of a model with a prefix, whose keys stand in no row; leave it out")
        heads, head_size = self.config.num_attention_heads, self.config.hidden_size // self.config.num_attention_heads
        count, length = batch.rows[1]
        x = batch.by_sequence(qkv).reshape(count, length, 3, heads, head_size).transpose(2, 0, 3, 1, 4)
        q, k = (x.slice(0, i, i + 1).reshape(count, heads, length, head_size) for i in (0, 1))
        scores = (q @ k.transpose(0, 1, 3, 2)) * head_size**-0.5
        return apply(softmax, batch.or_least(batch.real.reshape(count, 1, 1, length), scores))


class BertSelfOutput(Module):
    """The end of a block: dense, dropout, residual, layer norm; before that norm what tuning puts there."""

    bottleneck: Any = None  # a minibert.tuning.bottleneck.Bottleneck

    def __init__(self, inputs: int, config: BertConfig, place: Place, stream: int, layer: int) -> None:
        self.config, self.stream, self.layer = config, stream, layer
        self.dense = Linear(inputs, config.hidden_size, place)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, place)

    def __call__(self, x: Tensor, residual: Tensor, batch: Batch) -> Tensor:  # (N, in), (N, C) -> (N, C)
        dropout = batch.dropout(self.config.hidden_dropout_prob, self.stream, self.layer, self.config.hidden_size)
        dense = self.dense(x)
        if self.bottleneck is not None:
            dense = self.bottleneck(dense, residual, self.LayerNorm, dropout)
            dropout = {"rate": 0.0, "stream": NO_STREAM}
        y = self.LayerNorm.add(dense, residual, **dropout)
        dense.forget()  # the layer norm keeps its sum with the residual, which is all that the gradient reads
        return y


class BertAttention(Module):
    def __init__(self, config: BertConfig, place: Place, layer: int) -> None:
        self.self = BertSelfAttention(config, place, layer)
        self.output = BertSelfOutput(config.hidden_size, config, place, ATTENTION_OUTPUT_STREAM, layer)

    def __call__(self, x: Tensor, batch: Batch, attentions: list[Tensor] | None) -> Tensor:
        return self.output(self.self(x, batch, attentions), x, batch)


class BertIntermediate(Module):
    def __init__(self, config: BertConfig, place: Place) -> None:
        self.hidden_act = config.hidden_act
        self.dense = Linear(config.hidden_size, config.intermediate_size, place)

    def __call__(self, x: Tensor) -> Tensor:  # (N, C) -> (N, I)
        return activated(self.dense, x, self.hidden_act)


class BertLayer(Module):
    def __init__(self, config: BertConfig, place: Place, layer: int) -> None:
        self.attention = BertAttention(config, place, layer)
        self.intermediate = BertIntermediate(config, place)
        self.output = BertSelfOutput(config.intermediate_size, config, place, OUTPUT_STREAM, layer)

    def __call__(self, x: Tensor, batch: Batch, attentions: list[Tensor] | None) -> Tensor:
        x = self.attention(x, batch, attentions)
        inner = self.intermediate(x)
        y = self.output(inner, x, batch)
        for read in (x, inner):
            read.forget_until_backward()
        return y


class BertEncoder(Module):
    def __init__(self, config: BertConfig, place: Place) -> None:
        self.layer = [BertLayer(config, place, i) for i in range(config.num_hidden_layers)]


class BertPooler(Module):
    def __init__(self, config: BertConfig, place: Place) -> None:
        self.dense = Linear(config.hidden_size, config.hidden_size, place)

    def __call__(self, first: Tensor) -> Tensor:  # (B, C) -> (B, C)
        return apply(tanh, self.dense(first))


class BertPredictionHeadTransform(Module):
    def __init__(self, config: BertConfig, place: Place) -> None:
        self.hidden_act = config.hidden_act
        self.dense = Linear(config.hidden_size, config.hidden_size, place)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, place)

    def __call__(self, x: Tensor) -> Tensor:
        return self.LayerNorm(activated(self.dense, x, self.hidden_act))


class BertLMPredictionHead(Module):
    def __init__(self, config: BertConfig, place: Place) -> None:
        self.bias = Parameter((config.vocab_size,), "zeros", place)
        self.transform = BertPredictionHeadTransform(config, place)
        if not config.tie_word_embeddings:
            self.decoder = Embedding(config.vocab_size, config.hidden_size, place)  # `decoder.weight`


class BertHeads(Module):
    """`cls`: the masked-language-model head, and for pretraining the next-sentence head."""

    def __init__(self, config: BertConfig, place: Place, next_sentence: bool) -> None:
        self.predictions = BertLMPredictionHead(config, place)
        if next_sentence:
            self.seq_relationship = Linear(config.hidden_size, 2, place)


class BertModel(PreTrained):
    """The encoder, with its pooler."""

    gradient_checkpointing = False  # in training, keep each layer's input alone and compute the rest again in backward

    def __init__(
        self, config: BertConfig, backend: Any = "numba", dtype: str = "float32", seed: int = 0,
        *, add_pooling_layer: bool = True, initialise: bool = True,
    ) -> None:  # fmt: skip
        place = self.begin(config, backend, dtype, seed)
        self.step = 0  # forward passes in training so far: it names their dropout masks
        self.embeddings = BertEmbeddings(config, place)
        self.encoder = BertEncoder(config, place)
        self.pooler = BertPooler(config, place) if add_pooling_layer else None
        if initialise:
            self.initialise()

    def get_input_embeddings(self) -> Embedding:
        """The word embeddings; called with ids they make `inputs_embeds`."""
        return self.embeddings.word_embeddings

    def gradient_checkpointing_enable(self) -> None:
        """Train in less memory: backward computes each layer again. The gradients have the same bits."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep in forward all that backward reads."""
        self.gradient_checkpointing = False

    def __call__(
        self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None, position_ids: Any = None,
        *, inputs_embeds: Any = None, cu_seqlens: Any = None, output_hidden_states: bool | None = None,
        output_attentions: bool | None = None, return_dict: bool | None = None, **unknown: Any,
    ) -> Any:  # fmt: skip
        """Encode (B, T) padded ids with their mask, (N,) packed ids with `cu_seqlens`, or a `Packed` batch alone.

        The mask is 1 for a token and 0 for padding, in any dtype; a row that is masked throughout has outputs of zeros
        and changes no other. `inputs_embeds` (B, T, C), or (N, C), stand in place of the ids' word embeddings: a
        `Tensor` through which gradients go, or an array. What to put out the config says where the call does not;
        `return_dict=False` gives a tuple, all of it computed. Raises UserError for shapes that do not match, for ids
        that are out of range and for arguments that are not known.
        """
        refuse_unknown(unknown)
        out = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds=inputs_embeds, cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        return out.in_form(return_dict)

    def encode(
        self, input_ids: Any, attention_mask: Any, token_type_ids: Any, position_ids: Any, *, inputs_embeds: Any = None,
        cu_seqlens: Any = None, labels: Any = None, num_labels: int | None = None,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None, **unknown: Any,
    ) -> BertOutput:  # fmt: skip
        """What a call makes, with the labels of each token, if the model around this one has them."""
        refuse_unknown(unknown)
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("expected input_ids or inputs_embeds, one of the two")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        described = (attention_mask, token_type_ids, position_ids, labels, cu_seqlens)
        embeds = None if inputs_embeds is None else self._embeds(inputs_embeds, 2 if cu_seqlens is not None else 3)
        if isinstance(input_ids, Packed):
            packed = input_ids
            if any(given is not None for given in described):
                raise UserError("a Packed batch has its positions, types and labels within; give it alone")
        else:
            shape = None if embeds is None else embeds.shape[:-1]
            packed = pack(self.config, input_ids, *described, shape, num_labels)
        batch = Batch(packed, self.place, Stream(self.seed, 0, self.step, 0) if self.training else None)
        self.step += self.training
        attentions: list[Tensor] | None = [] if output_attentions else None
        layers = [self.embedded(batch, None if embeds is None else embeds.reshape(-1, embeds.shape[-1]))]
        for layer in self.encoder.layer:
            if self.gradient_checkpointing and self.training and attentions is None:
                same = partial(layer.as_it_is(), batch=batch, attentions=None)
                x = recomputed(same, layers[-1], weights=layer.parameters())
            else:
                x = layer(layers[-1], batch, attentions)
            if not output_hidden_states:
                layers[-1].forget_until_backward()
            layers = [*layers, x] if output_hidden_states else [x]
        return BertOutput(self, batch, layers, attentions)

    def embedded(self, batch: Batch, embeds: Tensor | None) -> Tensor:  # embeds (rows, C) -> (N, C)
        """What goes into the first layer."""
        return self.embeddings(batch, embeds)

    def _embeds(self, given: Any, axes: int) -> Tensor:
        """(B, T, C) or (N, C) in the model's dtype, on its backend."""
        backend, dtype, channels = self.place.backend, self.place.dtype, self.config.embedding_size
        if isinstance(given, Tensor):
            if given.backend is not backend or given.dtype != dtype:
                raise UserError(f"inputs_embeds: expected {dtype} on {backend.name}, got {given!r}")
        else:
            array = as_array("inputs_embeds", given, "an array of numbers")
            given = Tensor(backend.asarray(array, dtype=dtype), backend)
        if given.ndim != axes or given.shape[-1] != channels:
            raise UserError(
                f"inputs_embeds: expected (B, T, {channels}), or (N, {channels}) with cu_seqlens, got {given.shape}"
            )
        return given


class WithEncoder(PreTrained):
    """A model with a head: its encoder is `bert`, or by what other name `base_model_prefix` says."""

    pooled = False  # whether the head reads the pooler's output

    def __init__(
        self, config: BertConfig, backend: Any = "numba", dtype: str = "float32", seed: int = 0,
        *, initialise: bool = True,
    ) -> None:  # fmt: skip
        place = self.begin(config, backend, dtype, seed)
        setattr(self, self.base_model_prefix, self.new_encoder(config, place))
        self.add_head(config, place)
        if initialise:
            self.initialise()

    def new_encoder(self, config: BertConfig, place: Place) -> BertModel:
        return BertModel(config, *place, self.seed, add_pooling_layer=self.pooled, initialise=False)

    def add_head(self, config: BertConfig, place: Place) -> None:
        raise NotImplementedError

    @property
    def step(self) -> int:
        """Forward passes in training so far: it names their dropout masks."""
        return self.base_model.step

    @step.setter
    def step(self, step: int) -> None:
        self.base_model.step = step

    def get_input_embeddings(self) -> Embedding:
        """As `BertModel.get_input_embeddings`."""
        return self.base_model.get_input_embeddings()

    def gradient_checkpointing_enable(self) -> None:
        """As `BertModel.gradient_checkpointing_enable`."""
        self.base_model.gradient_checkpointing_enable()

    def gradient_checkpointing_disable(self) -> None:
        """As `BertModel.gradient_checkpointing_disable`."""
        self.base_model.gradient_checkpointing_disable()


class BertForMaskedLM(WithEncoder):
    """BERT with the masked-language-model head, its decoder tied to the word embeddings."""

    output = MaskedLMOutput
    next_sentence = False
    has_decoder = True
    head_in_parts = True  # where there are more labels than `HEAD_ROWS`

    def add_head(self, config: BertConfig, place: Place) -> None:
        self.cls = BertHeads(config, place, next_sentence=self.next_sentence)

    def output_of(self, encoded: BertOutput) -> Any:
        return self.output.of(encoded, self.cls)

    def __call__(
        self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None, position_ids: Any = None,
        *, labels: Any = None, return_dict: bool | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """As `BertModel`; `labels` (ids, -100 where nothing is predicted) give `out.loss`, their mean cross entropy.

        A label on padding does not count. With more than `HEAD_ROWS` labels the loss is computed by `backward()`, or
        when it is read, which has to be before the weights change: read after `backward()`, it is computed once.
        """
        encoded = self.base_model.encode(
            input_ids, attention_mask, token_type_ids, position_ids, labels=labels, **options
        )
        out = self.output_of(encoded)
        packed = encoded._batch.packed
        if packed.labels is not None:
            out.loss = self.loss_in_parts(out) if self.in_parts(packed.predicted) else out.masked_lm_loss()
        return out.in_form(return_dict)

    def in_parts(self, predicted: np.ndarray | None) -> bool:
        """Whether the head runs on some of the predicted positions at a time.

        Beside a next-sentence loss it is read before backward and so runs twice: only where memory is asked for.
        """
        wanted = self.head_in_parts and (self.base_model.gradient_checkpointing or not self.next_sentence)
        return wanted and predicted is not None and len(predicted) > HEAD_ROWS

    def loss_in_parts(self, out: MaskedLMOutput) -> Tensor:
        """As `masked_lm_loss`, on at most `HEAD_ROWS` positions at a time: there are logits of no more.

        Loss and gradients are sums of as many parts, each rounded to the model's dtype.
        """
        predicted, targets = out._batch.packed.predicted, out._batch.packed.targets
        assert predicted is not None and targets is not None
        transform, decoder, counted = out.transform, out.decoder(), targets != IGNORE
        batch = out._batch  # not `out`: it holds the loss

        def parts(x: Tensor) -> Iterator[Tensor]:
            count = -(-len(predicted) // HEAD_ROWS)
            for start, stop in pairwise(len(predicted) * i // count for i in range(count + 1)):
                labels = batch.integers(targets[start:stop])
                loss = apply(linear_cross_entropy, transform(x.slice(0, start, stop)), *decoder, labels)
                yield loss * float(counted[start:stop].sum() / counted.sum())

        with at_place(out.head_name):
            rows = batch.integers(predicted.astype(np.int32, copy=False))
            weights = (*transform.parameters(), *decoder)
            return SumOfParts(parts, apply(gather_rows, out._layers[-1], rows), weights)


class BertForPreTraining(BertForMaskedLM):
    """BERT with both heads of its pretraining: masked language model and next sentence."""

    output = PreTrainingOutput
    next_sentence = pooled = True

    def __call__(
        self, *args: Any, next_sentence_label: Any = None, return_dict: bool | None = None, **kwargs: Any
    ) -> Any:
        """As `BertForMaskedLM`; `next_sentence_label` (B,) adds the cross entropy of the next-sentence head.

        0: the second segment follows the first, 1: it does not; -100, and a row that is masked throughout: does not
        count. The loss is the mean over the rest; UserError where nothing is left.
        """
        out = super().__call__(*args, return_dict=True, **kwargs)
        if next_sentence_label is not None:
            loss = out.next_sentence_loss(next_sentence_label)
            out.loss = loss if out.loss is None else out.loss + loss
        return out.in_form(return_dict)
