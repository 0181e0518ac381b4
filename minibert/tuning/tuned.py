"""A model that is tuned: frozen, but for what is put beside it. It is called, trained and saved as any model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from minibert.errors import UserError, warn
from minibert.model.checkpoint import AnyPath
from minibert.model.nn import Module, Parameter
from minibert.model.pretrained import PreTrained
from minibert.tuning.files import demand_the_same

ADDED = (".low_rank.", ".bottleneck.", ".prefix.")  # within the names of parameters that tuning adds


def is_added(name: str) -> bool:
    """Whether a parameter of that name is what tuning put beside the model."""
    return any(part in name for part in ADDED)


def get_peft_model(model: PreTrained, config: Any) -> Any:
    """Freeze a model, and put beside it what is trained. The model is changed in place, its weights are not.

    Raises UserError where the model is tuned already, and where it lacks what the config names.
    """
    return kind_of(config)(model, config)


def kind_of(config: Any) -> type[TunedModel]:
    """The class of models that are tuned by such a config. Raises UserError for what is none."""
    kinds: list[type[TunedModel]] = [*TunedModel.__subclasses__()]
    for kind in kinds:
        if type(config) in kind.config_types:
            return kind
        kinds += kind.__subclasses__()
    known = ", ".join(config_type.__name__ for kind in kinds for config_type in kind.config_types)
    raise UserError(f"expected one of {known}, got {type(config).__name__}")


class TunedModel:
    """What every model that is tuned has; all that it has not itself it asks of the model within.

    `layers` is what was put beside the model, by the names of the layers that it belongs to.
    """

    config_types: ClassVar[tuple[type, ...]] = ()
    layers: Mapping[str, Module]

    def __init__(self, model: PreTrained, config: Any, *, loaded: bool = False) -> None:
        if not isinstance(model, PreTrained):
            raise UserError(f"expected a model of minibert, got {type(model).__name__}")
        if any(is_added(name) for name, _ in model.named_parameters()):
            raise UserError("this model is tuned already: merge_and_unload() or unload() it first, or load it anew")
        self.model, self.peft_config = model, config
        self.of_base: set[str] = set()  # the model's own parameters that are trained

    def freeze(self, of_base: set[str]) -> None:
        """Leave of the model's own parameters only these to be trained."""
        self.of_base = of_base
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = name in of_base

    @property
    def draws_masks(self) -> bool:
        """Whether what was put beside the model has dropout of its own, drawn for a batch as a whole."""
        return True

    def file_name(self, name: str) -> str:
        """What a parameter that is trained is called in a file."""
        raise NotImplementedError

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

    def _number(self, step: Any) -> None:
        for layer in self.layers.values():
            layer.step = step

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The call, by torch's name."""
        return self(*args, **kwargs)

    def before_update(self) -> float:
        """What is due after the last `backward()` of an update and before `optimizer.step()`: of most kinds nothing.

        AdaLoRA adds the gradients of its regulariser. Returns what it added to the loss.
        """
        return 0.0

    def update_and_allocate(self, global_step: int, clip_factor: float = 1.0) -> None:
        """What is due after each `optimizer.step()` and before `zero_grad()`: of most kinds nothing; AdaLoRA prunes.

        `global_step` counts the updates done, this one included; `clip_factor` is the optimiser's.
        """

    def train(self, mode: bool = True) -> Any:
        """Dropout on (or off), here too. Returns this."""
        self.model.train(mode)
        return self

    def eval(self) -> Any:
        """Dropout off. Returns this."""
        return self.train(False)

    def get_base_model(self) -> PreTrained:
        """The model within."""
        return self.model

    # ----------------------------------------------------------------------------------------------- what is trained

    def trained(self) -> dict[str, Parameter]:
        """All that is trained, under the names that it has in files; there is no other parameter in them."""
        named = self.model.named_parameters()
        return {self.file_name(name): p for name, p in named if name in self.of_base or is_added(name)}

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are in all."""
        return self.model.num_parameters(only_trainable=True), self.model.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Say both, and the share."""
        trained, count = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,} || all params: {count:,} || trainable%: {100 * trained / count:.4f}")

    def state_dict(self) -> dict[str, np.ndarray]:
        """A copy of all that a run needs to go on: what is trained, by the names of `trained`."""
        return self.values()

    def load_state_dict(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take what `state_dict` gave. Raises UserError for a tensor that is missing, surplus or of another shape."""
        self.assign(arrays)

    def values(self) -> dict[str, np.ndarray]:
        """A copy of what is trained."""
        return {name: np.array(p.numpy()) for name, p in self.trained().items()}

    def assign(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take what `values` gave, all of it or, with a UserError, nothing."""
        parameters = self.trained()
        demand_the_same(arrays, {name: p.declared_shape for name, p in parameters.items()})
        for name, parameter in parameters.items():
            parameter.assign(arrays[name])

    def base_sha256(self) -> str:
        """Of the names and values, as float32, of all that is frozen: the same before and after tuning.

        Names are without the prefix `bert.`, so that an encoder is the same base as one with a head that is trained.
        """
        digest = hashlib.sha256()
        frozen = {n: p for n, p in self.model.named_parameters() if n not in self.of_base and not is_added(n)}
        for name, parameter in sorted((name.removeprefix("bert."), p) for name, p in frozen.items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(parameter.numpy(), np.float32).data)
        return digest.hexdigest()

    def settle(self, arrays: Mapping[str, np.ndarray], folder: AnyPath, base: str | None, is_trainable: bool) -> Any:
        """Take what was in a folder, saved beside a base of that sha256: the last thing in loading. Returns this."""
        try:
            self.assign(arrays)
        except UserError:
            self.unload()
            raise
        if base not in (None, own := self.base_sha256()):
            warn(
                f"{folder}: this adapter was trained on another base: the sha256 of its weights was {base[:12]}..., "
                f"this model's is {own[:12]}...; outputs will not be those of training"
            )
        for parameter in self.trained().values():
            parameter.requires_grad = is_trainable
        return self.eval()

    def unload(self) -> PreTrained:
        """The plain model without what was put beside it (its own parameters stay as they are); nothing is frozen."""
        raise NotImplementedError

    def thaw(self) -> PreTrained:
        """The model within, of which nothing is frozen any more."""
        for parameter in self.model.parameters():
            parameter.requires_grad = True
        return self.model
