"""LoRA: what Hugging Face PEFT calls a PeftModel, with its files."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from minibert.errors import UserError
from minibert.model.checkpoint import AnyPath
from minibert.model.nn import Embedding
from minibert.model.pretrained import PreTrained
from minibert.tuning.config import LoraConfig
from minibert.tuning.files import PREFIX, naming, once_each, read_adapter, with_decoder_bias, write_adapter
from minibert.tuning.low_rank import EmbeddingLowRank, LowRank
from minibert.tuning.targets import ALL_LINEAR, by_pattern, targets, trained_whole
from minibert.tuning.tuned import TunedModel, is_added, kind_of


class PeftModel(TunedModel):
    """A model with low-rank updates beside some of its linear layers, and modules that are trained whole."""

    config_types: ClassVar[tuple[type, ...]] = (LoraConfig,)
    suffix = ".weight"  # after the names of what is added, in a file
    layers: dict[str, Any]  # of LowRank, EmbeddingLowRank

    def __init__(self, model: PreTrained, config: LoraConfig, *, loaded: bool = False) -> None:
        super().__init__(model, config)
        whole = trained_whole(model, config, strict=not loaded)
        self.targets = targets(model, config, whole, strict=not loaded)
        self.freeze(self._of_base(whole))
        self.layers = {name: self._low_rank(name) for name in self.targets}
        for name, layer in self.layers.items():
            self.targets[name].low_rank = layer

    @property
    def draws_masks(self) -> bool:
        return any(layer.rate for layer in self.layers.values())

    def _of_base(self, whole: list[str]) -> set[str]:
        """The model's own parameters that are trained: of modules that are trained whole, and biases."""
        trained = set()
        for name, _ in self.model.named_parameters():
            module, _, kind = name.rpartition(".")
            bias = kind == "bias" and self.peft_config.bias == "all"
            bias |= kind == "bias" and self.peft_config.bias == "lora_only" and module in self.targets
            if bias or any(name.startswith(f"{one}.") for one in whole):
                trained.add(name)
        return trained

    def _low_rank(self, name: str) -> Any:
        config, target, seed, place = self.peft_config, self.targets[name], self.model.seed, self.model.place
        rank = by_pattern(config.rank_pattern, name, config.r)
        alpha = by_pattern(config.alpha_pattern, name, config.lora_alpha)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        rows, columns = target.weight.declared_shape
        layer: LowRank | EmbeddingLowRank
        if isinstance(target, Embedding):
            layer = EmbeddingLowRank(name, (rows, columns), rank, scaling, seed, place)
        else:
            layer = LowRank(name, (rows, columns), rank, scaling, config.lora_dropout, seed, place)
        layer.initialise(config.init_lora_weights)
        return layer.train(self.model.training)

    def file_name(self, name: str) -> str:
        """As PEFT writes it."""
        module, _, kind = name.rpartition(".")
        if is_added(name):
            name = name.replace(".low_rank.", ".") + ("" if kind.startswith("lora_embedding") else self.suffix)
        elif module in self.targets:
            name = f"{module}.base_layer.{kind}"
        return PREFIX + name

    def save_pretrained(self, folder: AnyPath) -> None:
        """Write adapter_config.json and adapter_model.safetensors as PEFT reads them: what is trained, and no more."""
        config, arrays = self._to_save()
        if config["target_modules"] == ALL_LINEAR:
            config["target_modules"] = sorted(self.targets)  # which these are depends on who is asked
        write_adapter(folder, config, with_decoder_bias(arrays), self.base_sha256())

    def _to_save(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return self.peft_config.to_dict(), self.values()

    @classmethod
    def from_pretrained(cls, model: PreTrained, folder: AnyPath, is_trainable: bool = False) -> Any:
        """Put beside a model what was saved in a folder, by minibert or by PEFT; frozen unless `is_trainable`.

        Warns where minibert saved it beside other weights than the model's. Raises UserError where files and model do
        not fit: a tensor that is missing, surplus or of another shape, a setting that is not supported.
        """
        values, arrays, base = read_adapter(folder)
        with naming(folder):
            config = LoraConfig.from_dict(values)
            return kind_of(config)(model, config, loaded=True).settle(once_each(arrays), folder, base, is_trainable)

    def merge_and_unload(self) -> PreTrained:
        """The plain model, with every update added to its weight: W + s B A. Nothing of it is frozen any more.

        Raises UserError where a word embedding that is also the decoder has an update, which is of one of them alone.
        """
        if self.model.has_decoder and self.model.config.tie_word_embeddings:
            for name in self.layers:
                if name.endswith("word_embeddings"):
                    raise UserError(
                        f"{name} is also the decoder, which has no update: keep the adapter apart, or tune a model "
                        "that was made with tie_word_embeddings=False"
                    )
        for name, layer in self.layers.items():
            weight = self.targets[name].weight
            weight.assign(np.asarray(weight.numpy(), layer.delta().dtype) + layer.delta())
        return self.unload()

    def unload(self) -> PreTrained:
        """The plain model without the updates (what was trained whole stays as it is); nothing is frozen any more."""
        for target in self.targets.values():
            del target.low_rank
        return self.thaw()
