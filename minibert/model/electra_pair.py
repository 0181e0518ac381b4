"""Replaced-token detection: an ELECTRA's generator and discriminator, as they are pretrained (Clark et al. 2020, 3.1).

The generator guesses the tokens that were masked. A token is drawn from each guess and put where the mask was; the
discriminator says of every token whether it is the text's own. No gradient goes through the draw.

One letter per axis: B sequences, N packed tokens, M masked positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minibert.errors import UserError
from minibert.kernels.gumbel import gumbel
from minibert.kernels.philox import Stream
from minibert.model import checkpoint
from minibert.model.bert import HEAD_ROWS
from minibert.model.config import BertConfig, ElectraConfig
from minibert.model.electra import (
    ElectraForMaskedLM,
    ElectraForPreTraining,
    ElectraForPreTrainingOutput,
    ElectraMaskedLMOutput,
)
from minibert.model.nn import Parameter
from minibert.model.packing import Packed, pack
from minibert.model.pretrained import PreTrained
from minibert.model.tensor import Tensor, no_grad

SAMPLING_STREAM = 6
GENERATOR = "generator"  # the folder in the discriminator's
GENERATOR_SEED = 0x6E4E  # beside the discriminator's: equal names are not to draw equal weights and equal dropout


def generator_of(config: ElectraConfig, size: float) -> ElectraConfig:
    """The config of a generator of `size` times the width: as many layers, in whole heads, over the same embeddings."""
    heads = max(1, round(size * config.num_attention_heads))
    return replace(
        config,
        num_attention_heads=heads,
        hidden_size=heads * (config.hidden_size // config.num_attention_heads),
        intermediate_size=max(1, config.intermediate_size * heads // config.num_attention_heads),
    )


class ReplacedTokens(NamedTuple):
    """What both halves made of a batch."""

    generated: ElectraMaskedLMOutput  # its loss is the mean over the M masked tokens
    judged: ElectraForPreTrainingOutput  # its loss is the mean over all N tokens
    replaced: np.ndarray  # (N,) int64: 1 where the discriminator saw another token than the text's, 0 elsewhere
    rtd_weight: float

    @property
    def loss(self) -> Tensor:
        """(): the generator's, and `rtd_weight` times the discriminator's."""
        assert self.generated.loss is not None and self.judged.loss is not None
        return self.generated.loss + self.judged.loss * self.rtd_weight

    @property
    def accuracy(self) -> float:
        """The share of tokens of which the discriminator is right."""
        found = self.judged.packed_logits.numpy().reshape(-1) > 0
        return float((found == (self.replaced == 1)).mean())


class ElectraPair(PreTrained):
    """Generator and discriminator, which share their embeddings; the discriminator is what is used afterwards.

    `rtd_weight` is what the discriminator's loss counts in the sum. Raises UserError for configs whose embeddings or
    vocabularies differ, so that they cannot be shared.
    """

    config_class = ElectraConfig

    def __init__(
        self, config: BertConfig, generator: BertConfig, backend: Any = "numba", dtype: str = "float32", seed: int = 0,
        *, rtd_weight: float = 50.0, initialise: bool = True,
    ) -> None:  # fmt: skip
        place = self.begin(config, backend, dtype, seed)
        self.rtd_weight = rtd_weight
        self.discriminator = ElectraForPreTraining(config, *place, seed, initialise=initialise)
        self.generator = ElectraForMaskedLM(generator, *place, seed ^ GENERATOR_SEED, initialise=False)
        of_both = [
            [p.declared_shape for p in model.electra.embeddings.parameters()]
            for model in (self.generator, self.discriminator)
        ]
        if of_both[0] != of_both[1]:
            raise UserError(
                f"the generator's embeddings are {of_both[0]}, the discriminator's {of_both[1]}: they are shared, so "
                "vocab_size, embedding_size, max_position_embeddings and type_vocab_size are to be the same"
            )
        self.generator.electra.embeddings = self.discriminator.electra.embeddings
        self.generator.head_in_parts = False  # its loss is read before backward, and would be computed twice
        if initialise:
            own = {name for name, _ in self.generator.named_parameters() if ".embeddings." not in name}
            self.generator.initialise(own)

    @property
    def base_model(self) -> Any:
        """The discriminator's encoder."""
        return self.discriminator.electra

    @property
    def generator_parameters(self) -> int:
        """How many numbers the generator has beside what is shared."""
        return self.num_parameters() - self.discriminator.num_parameters()

    @property
    def step(self) -> int:
        """Forward passes in training so far: it names their draws and dropout masks."""
        return self.discriminator.step

    @step.setter
    def step(self, step: int) -> None:
        self.discriminator.step = self.generator.step = step

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """As `Module.named_parameters`; what is shared comes once, as the discriminator's."""
        shared = {id(p) for p in self.discriminator.electra.embeddings.parameters()}
        for name, parameter in super().named_parameters(prefix):
            if name.startswith(f"{prefix}discriminator.") or id(parameter) not in shared:
                yield name, parameter

    def gradient_checkpointing_enable(self) -> None:
        """As `BertModel.gradient_checkpointing_enable`, in both."""
        self.discriminator.gradient_checkpointing_enable()
        self.generator.gradient_checkpointing_enable()

    def __call__(
        self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None, position_ids: Any = None,
        *, labels: Any = None, cu_seqlens: Any = None, return_dict: bool = True,
    ) -> ReplacedTokens:  # fmt: skip
        """Masked ids and the `labels` of the masked ones, in any form that `BertForMaskedLM` takes.

        Raises UserError where no position has a label.
        """
        packed = input_ids
        if not isinstance(packed, Packed):
            packed = pack(
                self.config, input_ids, attention_mask, token_type_ids, position_ids, labels=labels,
                cu_seqlens=cu_seqlens,
            )  # fmt: skip
        if packed.predicted is None or not len(packed.predicted):
            raise UserError("labels: expected those of the masked positions, got none")
        step = self.step
        generated = self.generator(packed, return_dict=True)
        corrupted, replaced = corrupt(packed, self.drawn(generated, packed.predicted, step))
        judged = self.discriminator(corrupted, return_dict=True)
        return ReplacedTokens(generated, judged, replaced, self.rtd_weight)

    def drawn(self, generated: ElectraMaskedLMOutput, positions: np.ndarray, step: int) -> np.ndarray:
        """(M,) ids, each drawn from the generator's softmax at a packed position, by seed and step alone."""
        found, backend = [], self.backend
        with no_grad():
            for part, (start, stop) in enumerate(pairwise([*range(0, len(positions), HEAD_ROWS), len(positions)])):
                logits = generated.logits_at(positions[start:stop])
                stream = Stream(self.seed, SAMPLING_STREAM, step, part)
                found.append(backend.numpy(backend.run(gumbel, logits.data, stream=stream)).argmax(axis=-1))
        return np.concatenate(found)

    # ----------------------------------------------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(  # type: ignore[override]  # two models have no one config
        cls, folder: str | Path, backend: Any = "numba", dtype: str = "float32", seed: int = 0, *,
        rtd_weight: float = 50.0,
    ) -> ElectraPair:  # fmt: skip
        """The discriminator of a folder and the generator in its folder `generator`, which takes its embeddings.

        Raises UserError where one of them is missing or they do not fit.
        """
        place = Path(folder) / GENERATOR
        if not place.is_dir():
            raise UserError(f"no generator in {place}: expected an ElectraForMaskedLM there, as pretraining writes it")
        configs = [checkpoint.read_config(each) for each in (folder, place)]
        pair = cls(configs[0], configs[1], backend, dtype, seed, rtd_weight=rtd_weight)
        for half, each in ((pair.generator, place), (pair.discriminator, Path(folder))):
            loaded = type(half).from_pretrained(each, half.backend, dtype, half.seed)
            half.load_state_dict(loaded.state_dict())
        pair.eval()
        return pair

    def save_pretrained(self, folder: str | Path, tokenizer_files: Any = None) -> None:
        """Write the discriminator into `folder`, the generator into its folder `generator`, as transformers would."""
        files = [*(tokenizer_files or ())]
        self.discriminator.save_pretrained(folder, files)
        self.generator.save_pretrained(Path(folder) / GENERATOR, files)


def corrupt(packed: Packed, drawn: np.ndarray) -> tuple[Packed, np.ndarray]:
    """The batch with `drawn` (M,) at its masked positions; and which tokens are not the text's own, (N,) of 0 and 1.

    What was drawn as it was counts as original.
    """
    assert packed.predicted is not None and packed.targets is not None
    ids, replaced = packed.input_ids.copy(), np.zeros(len(packed.input_ids), np.int64)
    ids[packed.predicted] = drawn
    replaced[packed.predicted] = drawn != packed.targets
    return packed._replace(input_ids=ids, labels=replaced, predicted=None, targets=None), replaced
