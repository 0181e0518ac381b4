"""What every model has: a place, a seed, and a folder to come from and to go to."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minibert import backends
from minibert.backends.base import Backend, dtype_of
from minibert.errors import UserError, warn
from minibert.model import checkpoint
from minibert.model.config import BertConfig, with_labels
from minibert.model.matching import LoadReport, finder, match, own_decoder
from minibert.model.nn import Module, Parameter, Place
from minibert.model.packing import as_array
from minibert.model.quantized import said_in, with_layers_of

# Arguments of from_pretrained in transformers that go by another name here.
INSTEAD = {
    "torch_dtype": "it is dtype here, as dtype='float32'",
    "device": "it is backend here, as backend='cupy'",
    "device_map": "it is backend here, as backend='cupy'",
    "state_dict": "call load_state_dict on the model",
    "add_pooling_layer": "only BertModel has a pooling layer to leave out",
}

# What scripts ask of a model of torch, and what they ask here instead.
MADE_THERE = "a model stays where it was made: give backend='cupy' or another to it or to from_pretrained"
OF_ITS_DTYPE = "a model keeps its dtype: give dtype='float16' or another to it or to from_pretrained"
ABSENT = {
    **dict.fromkeys(("to", "cuda", "cpu"), MADE_THERE),
    **dict.fromkeys(("half", "float", "double", "bfloat16"), OF_ITS_DTYPE),
    "resize_token_embeddings": "the vocabulary is fixed: make a model of another vocab_size and copy the rows over",
    "named_modules": "named_children() gives those within it, named_parameters() all parameters",
    "modules": "named_children() gives those within it, parameters() all parameters",
    "children": "named_children() gives those within it",
    "requires_grad_": "set p.requires_grad of its parameters(), or compute under no_grad()",
}


class PreTrained(Module):
    """A model on a backend. Dropout is off until `train()`."""

    config: BertConfig
    config_class: type[BertConfig] = BertConfig
    base_model_prefix = "bert"  # the name of the encoder in a model with a head
    place: Place
    seed: int
    has_decoder = False  # from channels to the vocabulary: the word embedding, if they are tied

    def begin(self, config: BertConfig, backend: str | Backend, dtype: str, seed: int) -> Place:
        if not isinstance(config, BertConfig):
            raise _no_config(config)
        if config.model_type != self.config_class.model_type:
            own, other = (kind.model_type for kind in (self.config_class, config))
            name = type(self).__name__
            named = name.startswith(own.capitalize())
            mend = f": take {name.replace(own.capitalize(), other.capitalize(), 1)}, if there is one" * named
            raise UserError(f"{name}: expected a config of model_type {own!r}, got {other!r}{mend}")
        if not isinstance(backend, str | Backend):
            raise UserError(f"backend: expected a name such as 'numba' or a Backend, got {reprlib.repr(backend)}")
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise UserError(f"seed: expected a whole number from 0 to {2**32 - 1}, got {reprlib.repr(seed)}")
        self.config, self.seed, dtype = config, seed, _dtype_name(dtype)
        found = backends.get(backend) if isinstance(backend, str) else backend
        if dtype not in found.dtypes:
            raise UserError(
                f"dtype: expected one of {', '.join(found.dtypes)} on {found.name}, got {reprlib.repr(dtype)}"
            )
        dtype_of(dtype)  # says what to install where NumPy lacks it
        self.place = Place(found, dtype)
        return self.place

    if not TYPE_CHECKING:  # a type checker should know a name that is not there

        def __getattr__(self, name: str) -> Any:
            mend = f": {ABSENT[name]}" if name in ABSENT else ""
            raise AttributeError(f"{type(self).__name__} has no {name!r}{mend}")

    @property
    def dtype(self) -> np.dtype[Any]:
        """What the parameters are stored in."""
        return dtype_of(self.place.dtype)

    @property
    def device(self) -> str:
        """Where inputs are given, by torch's name: the CPU, whatever the backend, which brings them where it is."""
        return "cpu"

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the parameters hold, or those that are not frozen; what is tied counts once."""
        counted = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        return sum(math.prod(p.declared_shape) for p in counted)

    def zero_grad(self) -> None:
        """Forget every gradient."""
        for p in self.parameters():
            p.grad = None

    @property
    def base_model(self) -> Any:
        """The encoder of a model with a head; an encoder is one itself."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def backend(self) -> Backend:
        return self.place.backend

    def initialise(self, only: set[str] | None = None) -> None:
        """Draw first values for every parameter, or for those named: by seed and name alone."""
        prefix = f"{self.base_model_prefix}."
        for name, parameter in self.named_parameters():
            if only is None or name in only:
                parameter.initialise(self.seed, name.removeprefix(prefix), self.config.initializer_range)

    def state_dict(self) -> dict[str, np.ndarray]:
        """A copy of every parameter, as NumPy, by Hugging Face's name."""
        return {name: np.array(self.backend.numpy(p.data)) for name, p in self.named_parameters()}

    def load_state_dict(
        self, arrays: Mapping[str, np.ndarray], strict: bool = True, ignore_mismatched_sizes: bool = False
    ) -> LoadReport:
        """Take values by name, NumPy arrays or what becomes one. Returns what did not fit.

        Raises UserError for a shape that differs, unless `ignore_mismatched_sizes`, for a missing or unexpected name,
        if `strict`, and for what is no array of numbers.
        """
        if not isinstance(arrays, Mapping):
            raise UserError(f"load_state_dict: expected a mapping from names to arrays, got {type(arrays).__name__}")
        given = {name: _numbers(name, array) for name, array in arrays.items()}
        integers = with_layers_of(self, given, finder(given))
        parameters: dict[str, Parameter] = dict(self.named_parameters())
        shapes = {name: p.declared_shape for name, p in parameters.items()}
        matched, report = match(given, shapes, ignore_mismatched_sizes, integers)
        if strict and report:
            raise UserError(f"the weights do not fit the model: {report}")
        for name, values in matched.items():
            parameters[name].assign(values)
        return report

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, backend: str | Backend = "numba", dtype: str = "float32", seed: int = 0, *,
        config: BertConfig | None = None, strict: bool = False, ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False, **more: Any,
    ) -> Any:  # fmt: skip
        """Load config.json and model.safetensors from a folder, with dropout off.

        `config` stands in for config.json; fields of it given by name, as `output_hidden_states=True`, change it.
        `dtype` is a name, a dtype of NumPy or torch, or "auto": the one that config.json names, else float32.
        `BertModel` also takes `add_pooling_layer`. Parameters that the file lacks are drawn from `seed`, and with
        `ignore_mismatched_sizes` those whose shape differs too. A warning names them, and the names in the file that
        the model has no use for; with `strict` that is an error. `output_loading_info` gives (model, info), as in
        transformers. A decoder in the file that is not the word embedding is kept, untied, whatever the config says.
        Raises UserError for a folder that is not a checkpoint, and for weights of the wrong shape.
        """
        model, report = cls.load_folder(folder, backend, dtype, seed, config, strict, ignore_mismatched_sizes, **more)
        report.tell(folder)
        return (model, report.loading_info()) if output_loading_info else model

    @classmethod
    def load_folder(
        cls, folder: str | Path, backend: str | Backend, dtype: str, seed: int, config: BertConfig | None = None,
        strict: bool = False, ignore_mismatched_sizes: bool = False, **more: Any,
    ) -> tuple[Any, LoadReport]:  # fmt: skip
        """As `from_pretrained`, without a warning: the model, and what did not match, for whoever tells of it."""
        pooling = {"add_pooling_layer"} & more.keys() & inspect.signature(cls).parameters.keys()
        options = {name: more.pop(name) for name in pooling}
        config = _changed(checkpoint.read_config(folder) if config is None else config, more)
        arrays = checkpoint.read_weights(folder)
        refuse_far_larger(config, arrays, folder)
        decoder = own_decoder(arrays) if cls.has_decoder and config.tie_word_embeddings else None
        if decoder is not None:
            warn(
                f"{folder}: {decoder} is not the word embedding, so they are not tied: set tie_word_embeddings to false"
            )
            config = replace(config, tie_word_embeddings=False)
        if isinstance(dtype, str) and dtype == "auto":
            dtype = config.others.get("dtype") or config.others.get("torch_dtype") or "float32"
        model = cls(config, backend, dtype, seed, initialise=False, **options)  # type: ignore[call-arg]
        try:
            report = model.load_state_dict(arrays, strict, ignore_mismatched_sizes)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        model.initialise({*report.missing_keys, *(name for name, *_ in report.mismatched_keys)})
        model.eval()
        return model, report

    def save_pretrained(self, folder: str | Path, tokenizer_files: Any = None) -> None:
        """Write config.json and model.safetensors as transformers reads them; `tokenizer_files` are copied there."""
        checkpoint.write_folder(
            folder, said_in(self.config, self), self.state_dict(), tokenizer_files, architecture=type(self).__name__
        )


def refuse_far_larger(config: BertConfig, arrays: Mapping[str, np.ndarray], folder: Any) -> None:
    """Raises UserError, before anything is allocated, for a config that cannot be that of the weights.

    Some layers more than the file has are drawn anew; a damaged number of layers would take hours, or all memory.
    """
    held = sum(array.size for array in arrays.values())
    if config.numbers() > 64 * held + 2**16:
        raise UserError(
            f"{folder}: config.json asks for a model of {config.numbers():,} numbers, and the weights beside it are "
            f"{held:,}: correct num_hidden_layers, hidden_size, intermediate_size or vocab_size there"
        )


def _dtype_name(given: Any) -> Any:
    """The name of a dtype of NumPy or torch; anything else as it came."""
    if isinstance(given, np.dtype) or (isinstance(given, type) and issubclass(given, np.generic)):
        return np.dtype(given).name
    module, _, name = str(given).partition(".")
    return name if module == "torch" and type(given).__module__ == "torch" else given


def _no_config(given: Any) -> UserError:
    got, mend = type(given).__name__, "see BertConfig.from_dict"
    if got == BertConfig.__name__:
        got, mend = f"that of {type(given).__module__}", "give mb.BertConfig.from_dict(config.to_dict())"
    return UserError(f"config: expected a minibert BertConfig, got {got}; {mend}")


def _numbers(name: str, given: Any) -> np.ndarray:
    """An array as NumPy; a tensor of torch also where it asks for a gradient."""
    return as_array(name, given.detach() if hasattr(given, "detach") else given, "an array of numbers")


def _changed(config: BertConfig, changes: Mapping[str, Any]) -> BertConfig:
    """`config` with the fields that were given to from_pretrained; what else was given there is refused."""
    if not isinstance(config, BertConfig):
        raise _no_config(config)
    changes = with_labels(changes)
    for name in sorted(changes.keys() - vars(config).keys()):
        mend = INSTEAD.get(name, "leave it out; given by name are also fields of the config, as num_hidden_layers=2")
        raise UserError(f"from_pretrained: unknown argument {name!r}: {mend}")
    return replace(config, **changes)
