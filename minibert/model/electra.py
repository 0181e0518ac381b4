"""ELECTRA (Clark et al., "ELECTRA: Pre-training text encoders as discriminators", 2020), under Hugging Face's names.

A BERT without a pooler, whose embeddings may be narrower than its layers. Of a pair that is pretrained together
(`minibert.model.rtd`) the generator is an `ElectraForMaskedLM`, the discriminator an `ElectraForPreTraining`.

One letter per axis: B sequences, N packed tokens, T positions, C channels, E channels of the embeddings, K labels.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from minibert.model.bert import BertForMaskedLM, BertModel, WithEncoder
from minibert.model.config import BertConfig, ElectraConfig
from minibert.model.heads import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    ClassifierOutput,
    head_dropout,
)
from minibert.model.losses import sequence_loss
from minibert.model.nn import LayerNorm, Linear, Module, Parameter, Place, activated
from minibert.model.outputs import Batch, BertOutput, MaskedLMOutput
from minibert.model.tensor import Tensor


class ElectraModel(BertModel):
    """The encoder. Its first hidden state is that of the embeddings after `embeddings_project`, (N, E) -> (N, C)."""

    config_class = ElectraConfig
    base_model_prefix = "electra"
    embeddings_project: Linear | None = None  # only where E is not C

    def __init__(
        self, config: BertConfig, backend: Any = "numba", dtype: str = "float32", seed: int = 0,
        *, initialise: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(config, backend, dtype, seed, add_pooling_layer=False, initialise=False)
        if config.embedding_size != config.hidden_size:
            self.embeddings_project = Linear(config.embedding_size, config.hidden_size, self.place)
        if initialise:
            self.initialise()

    def embedded(self, batch: Batch, embeds: Tensor | None) -> Tensor:
        x = super().embedded(batch, embeds)
        return x if self.embeddings_project is None else self.embeddings_project(x)


class OnElectra(WithEncoder):
    """A model with a head, whose encoder is `electra`."""

    config_class = ElectraConfig
    base_model_prefix = "electra"
    pooled = False
    electra: ElectraModel

    def new_encoder(self, config: BertConfig, place: Place) -> BertModel:
        return ElectraModel(config, *place, self.seed, initialise=False)


# ------------------------------------------------------------------------------------------------------- the generator


class ElectraGeneratorPredictions(Module):
    def __init__(self, config: BertConfig, place: Place) -> None:
        self.LayerNorm = LayerNorm(config.embedding_size, config.layer_norm_eps, place)
        self.dense = Linear(config.hidden_size, config.embedding_size, place)

    def __call__(self, x: Tensor) -> Tensor:  # (M, C) -> (M, E)
        return self.LayerNorm(activated(self.dense, x, "gelu"))  # whatever the config's hidden_act is


class ElectraGeneratorLMHead(Module):
    """The decoder: its weight is the word embedding, unless they are not tied."""

    def __init__(self, config: BertConfig, place: Place) -> None:
        if not config.tie_word_embeddings:
            self.weight = Parameter((config.vocab_size, config.embedding_size), "normal", place)
        self.bias = Parameter((config.vocab_size,), "zeros", place)


class GeneratorHeads(NamedTuple):
    generator_predictions: ElectraGeneratorPredictions
    generator_lm_head: ElectraGeneratorLMHead


class ElectraMaskedLMOutput(MaskedLMOutput):
    """As `MaskedLMOutput`."""

    @classmethod
    def of(cls, encoded: BertOutput, heads: GeneratorHeads) -> Any:
        out = cls.__new__(cls)
        vars(out).update(vars(encoded), heads=GeneratorHeads(*(head.as_it_is() for head in heads)))
        return out

    @property
    def transform(self) -> ElectraGeneratorPredictions:
        return self.heads.generator_predictions

    @property
    def head_name(self) -> str:
        return self.transform.name

    def decoder(self) -> tuple[Tensor, Tensor]:
        head = self.heads.generator_lm_head
        return getattr(head, "weight", self._word_embeddings.weight), head.bias


class ElectraForMaskedLM(OnElectra, BertForMaskedLM):
    """The generator: ELECTRA with the masked-language-model head, its decoder tied to the word embeddings."""

    output = ElectraMaskedLMOutput

    def add_head(self, config: BertConfig, place: Place) -> None:
        self.generator_predictions = ElectraGeneratorPredictions(config, place)
        self.generator_lm_head = ElectraGeneratorLMHead(config, place)

    def output_of(self, encoded: BertOutput) -> ElectraMaskedLMOutput:
        heads = GeneratorHeads(self.generator_predictions, self.generator_lm_head)
        return ElectraMaskedLMOutput.of(encoded, heads)


# --------------------------------------------------------------------------------------------------- the discriminator


class ElectraDiscriminatorPredictions(Module):
    def __init__(self, config: BertConfig, place: Place) -> None:
        self.hidden_act = config.hidden_act
        self.dense = Linear(config.hidden_size, config.hidden_size, place)
        self.dense_prediction = Linear(config.hidden_size, 1, place)

    def __call__(self, x: Tensor) -> Tensor:  # (N, C) -> (N, 1)
        return self.dense_prediction(activated(self.dense, x, self.hidden_act))


class ElectraForPreTrainingOutput(ClassifierOutput):
    """`packed_logits` (N, 1) are above 0 where a token is taken for a replaced one."""

    @cached_property
    def logits(self) -> Tensor:
        """(B, T), zero where the batch was padded; (N,) for packed input."""
        x = self._batch.padded(self.packed_logits)
        return x.reshape(*x.shape[:-1])


class ElectraForPreTraining(OnElectra):
    """The discriminator: for each token whether it was replaced."""

    def add_head(self, config: BertConfig, place: Place) -> None:
        self.discriminator_predictions = ElectraDiscriminatorPredictions(config, place)

    def __call__(
        self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None, position_ids: Any = None,
        *, labels: Any = None, return_dict: bool | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """As `ElectraModel`; `labels` (B, T), 1 where a token was replaced and 0 where not, give `out.loss`.

        That is the mean binary cross entropy over all tokens; -100 does not count, nor does a label on padding. Raises
        UserError for other labels.
        """
        encoded = self.base_model.encode(
            input_ids, attention_mask, token_type_ids, position_ids, labels=labels, num_labels=2, **options
        )
        logits = self.discriminator_predictions(encoded._layers[-1])
        out = ElectraForPreTrainingOutput.of(encoded, logits)
        if (counted := encoded._batch.packed.labels) is not None:
            out.loss = replaced_token_loss(logits, counted)
        return out.in_form(return_dict)


def replaced_token_loss(logits: Tensor, replaced: np.ndarray) -> Tensor:
    """() Mean binary cross entropy of (N, 1) logits against (N,) of 0 and 1; -100 does not count."""
    return sequence_loss(logits, replaced, "multi_label_classification")


# ---------------------------------------------------------------------------------------------------------- fine-tuning


class ElectraClassificationHead(Module):
    """dropout, dense, gelu, dropout, out_proj, over the first token of each sequence."""

    def __init__(self, config: BertConfig, place: Place) -> None:
        self.dense = Linear(config.hidden_size, config.hidden_size, place)
        self.out_proj = Linear(config.hidden_size, config.num_labels, place)

    def __call__(self, x: Tensor, encoded: BertOutput, rate: float) -> Tensor:  # (B, C) -> (B, K)
        x = activated(self.dense, head_dropout(x, encoded, rate), "gelu")
        return self.out_proj(head_dropout(x, encoded, rate, layer=1))


class ElectraForSequenceClassification(OnElectra, BertForSequenceClassification):
    """ELECTRA with a classifier over the first token of each sequence."""

    def add_head(self, config: BertConfig, place: Place) -> None:
        self.classifier = ElectraClassificationHead(config, place)

    def summary(self, encoded: BertOutput) -> Tensor:
        return encoded.of_first_tokens()

    def classified(self, x: Tensor, encoded: BertOutput) -> Tensor:
        return self.classifier(x, encoded, self.dropout_rate)


class ElectraForTokenClassification(OnElectra, BertForTokenClassification):
    """ELECTRA with a classifier over every token."""


class ElectraForQuestionAnswering(OnElectra, BertForQuestionAnswering):
    """ELECTRA with the start and the end of an answer marked in the text."""
