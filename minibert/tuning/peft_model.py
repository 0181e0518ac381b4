"""A model that is tuned: frozen, but for what a config asks for. It is called, trained and saved as any model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from minibert.errors import UserError, warn
from minibert.model.checkpoint import AnyPath
from minibert.model.nn import Parameter
from minibert.model.pretrained import PreTrained
from minibert.tuning.config import LoraConfig
from minibert.tuning.files import PREFIX, demand_the_same, once_each, read_adapter, with_decoder_bias, write_adapter
from minibert.tuning.low_rank import LowRank
from minibert.tuning.targets import ALL_LINEAR, by_pattern, targets, trained_whole

ADDED = ".low_rank."  # within the names of parameters that tuning adds


def get_peft_model(model: PreTrained, config: LoraConfig) -> PeftModel:
    """Freeze a model, and put beside it what is trained. The model is changed in place, its weights are not.

    Raises UserError where the model is tuned already, and where it lacks what the config names.
    """
    return _kind_of(config)(model, config)


def _kind_of(config: Any) -> type[PeftModel]:
    kinds: list[type[PeftModel]] = [PeftModel, *PeftModel.__subclasses__()]
    for kind in kinds:
        if kind.config_type is type(config):
            return kind
    raise UserError(f"expected a LoraConfig or an AdaLoraConfig, got {type(config).__name__}")


class PeftModel:
    """What `get_peft_model` makes; all that it has not itself it asks of the model within."""

    config_type: type[LoraConfig] = LoraConfig
    suffix = ".weight"  # after the names of what tuning adds, in a file

    def __init__(self, model: PreTrained, config: LoraConfig, *, loaded: bool = False) -> None:
        if not isinstance(model, PreTrained):
            raise UserError(f"expected a model of minibert, got {type(model).__name__}")
        if any(ADDED in name for name, _ in model.named_parameters()):
            raise UserError("this model is tuned already: merge_and_unload() it first, or load it anew")
        self.model, self.peft_config = model, config
        whole = trained_whole(model, config, strict=not loaded)
        self.linears = targets(model, config, whole, strict=not loaded)
        self.of_base = self._of_base(whole)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name in self.of_base
        self.layers = {name: self._low_rank(name) for name in self.linears}
        for name, layer in self.layers.items():
            self.linears[name].low_rank = layer

    def _of_base(self, whole: list[str]) -> set[str]:
        """The model's own parameters that are trained: of modules that are trained whole, and biases."""
        trained = set()
        for name, _ in self.model.named_parameters():
            module, _, kind = name.rpartition(".")
            bias = kind == "bias" and self.peft_config.bias == "all"
            bias |= kind == "bias" and self.peft_config.bias == "lora_only" and module in self.linears
            if bias or any(name.startswith(f"{one}.") for one in whole):
                trained.add(name)
        return trained

    def _low_rank(self, name: str) -> LowRank:
        config, linear = self.peft_config, self.linears[name]
        outs, ins = linear.weight.declared_shape
        rank = by_pattern(config.rank_pattern, name, config.r)
        alpha = by_pattern(config.alpha_pattern, name, config.lora_alpha)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        layer = LowRank(name, (outs, ins), rank, scaling, config.lora_dropout, self.model.seed, self.model.place)
        layer.initialise(config.init_lora_weights)
        return layer.train(self.model.training)

    # ---------------------------------------------------------------------------------------------- as the model within

    if not TYPE_CHECKING:  # a type checker should know a name that is not there

        def __getattr__(self, name: str) -> Any:
            if name == "model":  # not made yet, as in copying
                raise AttributeError(name)
            return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the model within has is set there: `step`, which names the dropout masks, and `config`, say."""
        within = name not in vars(self) and "model" in vars(self) and hasattr(self.model, name)
        if within:
            setattr(self.model, name, value)
        else:
            object.__setattr__(self, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model within."""
        self._number(self.model.step)  # type: ignore[attr-defined]
        try:
            return self.model(*args, **kwargs)  # type: ignore[operator]
        finally:
            self._number(None)

    forward = __call__

    def _number(self, step: Any) -> None:
        for layer in self.layers.values():
            layer.step = step

    def update_and_allocate(self, global_step: int, clip_factor: float = 1.0) -> None:
        """What is due between an update and `zero_grad`: of LoRA nothing, see `AdaLoraModel`."""

    def train(self, mode: bool = True) -> PeftModel:
        """Dropout on (or off), that of the updates too. Returns this."""
        self.model.train(mode)
        return self

    def eval(self) -> PeftModel:
        """Dropout off. Returns this."""
        return self.train(False)

    def get_base_model(self) -> PreTrained:
        """The model within."""
        return self.model

    # ----------------------------------------------------------------------------------------------- what is trained

    def trained(self) -> dict[str, Parameter]:
        """All that is trained, under the names that PEFT writes; there is no other parameter in its files."""
        found = {}
        for name, parameter in self.model.named_parameters():
            module, _, kind = name.rpartition(".")
            if ADDED in name:
                name = f"{name.replace(ADDED, '.')}{self.suffix}"
            elif name not in self.of_base:
                continue
            elif module in self.linears:
                name = f"{module}.base_layer.{kind}"
            found[PREFIX + name] = parameter
        return found

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are in all."""
        return self.model.num_parameters(only_trainable=True), self.model.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Say both, and the share."""
        trained, count = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,} || all params: {count:,} || trainable%: {100 * trained / count:.4f}")

    def state_dict(self) -> dict[str, np.ndarray]:
        """A copy of all that a run needs to go on: what is trained, by the names of `trained`."""
        return self._values()

    def load_state_dict(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take what `state_dict` gave. Raises UserError for a tensor that is missing, surplus or of another shape."""
        self._assign(arrays)

    def _values(self) -> dict[str, np.ndarray]:
        return {name: np.array(p.numpy()) for name, p in self.trained().items()}

    def _assign(self, arrays: Mapping[str, np.ndarray]) -> None:
        parameters = self.trained()
        demand_the_same(arrays, {name: p.declared_shape for name, p in parameters.items()})
        for name, parameter in parameters.items():
            parameter.assign(arrays[name])

    def base_sha256(self) -> str:
        """Of the names and values, as float32, of all that is frozen: the same before and after tuning."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.model.named_parameters()):
            if name not in self.of_base and ADDED not in name:
                digest.update(name.encode())
                digest.update(np.ascontiguousarray(parameter.numpy(), np.float32).data)
        return digest.hexdigest()

    # ------------------------------------------------------------------------------------------------------------ files

    def save_pretrained(self, folder: AnyPath) -> None:
        """Write adapter_config.json and adapter_model.safetensors as PEFT reads them: what is trained, and no more."""
        config, arrays = self._to_save()
        if config["target_modules"] == ALL_LINEAR:
            config["target_modules"] = sorted(self.linears)  # which these are depends on who is asked
        write_adapter(folder, config, with_decoder_bias(arrays), self.base_sha256())

    def _to_save(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return self.peft_config.to_dict(), self._values()

    @classmethod
    def from_pretrained(cls, model: PreTrained, folder: AnyPath, is_trainable: bool = False) -> PeftModel:
        """Put beside a model what was saved in a folder, by minibert or by PEFT; frozen unless `is_trainable`.

        Warns where minibert saved it beside other weights than the model's. Raises UserError where files and model do
        not fit: a tensor that is missing, surplus or of another shape, a setting that is not supported.
        """
        values, arrays, saved_beside = read_adapter(folder)
        try:
            config = LoraConfig.from_dict(values)
            tuned = _kind_of(config)(model, config, loaded=True)
            try:
                tuned._assign(once_each(arrays))
            except UserError:
                tuned.unload()
                raise
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        if saved_beside not in (None, beside := tuned.base_sha256()):
            warn(
                f"{folder}: this adapter was trained on another base: the sha256 of its weights was "
                f"{saved_beside[:12]}..., this model's is {beside[:12]}...; outputs will not be those of training"
            )
        for parameter in tuned.trained().values():
            parameter.requires_grad = is_trainable
        return tuned.eval()

    def merge_and_unload(self) -> PreTrained:
        """The plain model, with every update added to its weight: W + s B A. Nothing of it is frozen any more."""
        for name, layer in self.layers.items():
            weight = self.linears[name].weight
            weight.assign(np.asarray(weight.numpy(), layer.delta().dtype) + layer.delta())
        return self.unload()

    def unload(self) -> PreTrained:
        """The plain model without the updates (what was trained whole stays as it is); nothing is frozen any more."""
        for linear in self.linears.values():
            del linear.low_rank
        for parameter in self.model.parameters():
            parameter.requires_grad = True
        return self.model
