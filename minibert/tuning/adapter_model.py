"""A model with bottleneck adapters, and the folder in which the library `adapters` lays one out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from minibert.errors import UserError, path_of, warn
from minibert.model.bert import BertSelfOutput
from minibert.model.checkpoint import AnyPath, make_folder, read_arrays, read_json, write_arrays, write_atomically
from minibert.model.config import BertConfig
from minibert.model.matching import Arrays
from minibert.model.pretrained import PreTrained
from minibert.tuning.bottleneck import BnConfig, Bottleneck, DoubleSeqBnConfig, SeqBnConfig
from minibert.tuning.config import HEADS
from minibert.tuning.files import BASE, CONFIG, naming
from minibert.tuning.targets import named_modules
from minibert.tuning.tuned import TunedModel, is_added

WEIGHTS, PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
HEAD_CONFIG, HEAD_WEIGHTS = "head_config.json", "model_head.safetensors"
VERSION = "adapters.1.3.0"  # the format


class AdapterModel(TunedModel):
    """A model with bottlenecks in its encoder, and a head, `classifier` or `qa_outputs`, that is trained whole."""

    config_types: ClassVar[tuple[type, ...]] = (BnConfig, DoubleSeqBnConfig, SeqBnConfig)
    layers: dict[str, Bottleneck]
    peft_config: BnConfig

    def __init__(self, model: PreTrained, config: BnConfig, *, loaded: bool = False) -> None:
        if model.config.model_type != BertConfig.model_type:
            raise UserError(
                f"bottleneck adapters: expected a BERT, got model_type {model.config.model_type!r}, for which their "
                "files are not written: take lora, say"
            )
        super().__init__(model, config)
        heads = {head for heads in HEADS.values() for head in heads}
        self.freeze({name for name, _ in model.named_parameters() if name.split(".")[0] in heads})
        self.places = {name: end for name, end in self._ends() if self._is_place(name)}
        if not self.places:
            raise UserError(f"leave_out: no layer of {model.config.num_hidden_layers} is left")
        channels, place = model.config.hidden_size, model.place
        self.layers = {name: Bottleneck(name, channels, config, model.seed, place) for name in self.places}
        for name, layer in self.layers.items():
            self.places[name].bottleneck = layer.train(model.training)

    def _ends(self) -> list[tuple[str, BertSelfOutput]]:
        return [(name, one) for name, one in named_modules(self.model) if isinstance(one, BertSelfOutput)]

    def _is_place(self, name: str) -> bool:
        number = int(name.split("layer.")[1].split(".")[0])
        wanted = self.peft_config.mh_adapter if ".attention." in name else self.peft_config.output_adapter
        return wanted and number not in self.peft_config.leave_out

    def file_name(self, name: str) -> str:
        """As `adapters` writes it."""
        if not is_added(name):
            return name
        name = name.replace(".adapter_down.", ".adapter_down.0.")
        return name.replace(".bottleneck.", f".adapters.{self.peft_config.name}.")

    def save_pretrained(self, folder: AnyPath) -> None:
        """Write what is trained as `load_adapter(folder, use_safetensors=True)` of `adapters` reads it."""
        folder, config = make_folder(folder), self.model.config
        about = {
            "hidden_size": config.hidden_size, "model_class": type(self.model).__name__, "model_name": "",
            "model_type": "bert", "version": VERSION,
        }  # fmt: skip
        values, metadata = self.values(), {"format": "pt", BASE: self.base_sha256()}
        write_arrays(folder / WEIGHTS, {n: a for n, a in values.items() if n not in self.of_base}, metadata)
        _write_json(folder / CONFIG, {**about, "config": self.peft_config.to_dict(), "name": self.peft_config.name})
        if self.of_base:
            write_arrays(folder / HEAD_WEIGHTS, {name: values[name] for name in sorted(self.of_base)}, {"format": "pt"})
            names = config.label2id or {f"LABEL_{i}": i for i in range(config.num_labels)}
            labels = {"label2id": names, "num_labels": config.num_labels}
            _write_json(folder / HEAD_CONFIG, {**about, **labels, "config": None, "name": None})

    @classmethod
    def from_pretrained(cls, model: PreTrained, folder: AnyPath, is_trainable: bool = False) -> Any:
        """Put beside a model the adapter in a folder, that of minibert or of `adapters`; frozen unless `is_trainable`.

        Warns where minibert saved it beside other weights, and where the head's labels have other names than the
        model's. Raises UserError where files and model do not fit: a tensor that is missing, surplus or of another
        shape, a setting that is not supported.
        """
        folder = path_of(folder, "a folder with an adapter")
        if not folder.is_dir():
            raise UserError(f"no adapter at {folder}: expected a folder with {CONFIG} and {WEIGHTS}")
        about = read_json(folder / CONFIG)
        if not (folder / WEIGHTS).is_file():
            mend = "expected a folder that save_adapter(..., use_safetensors=True) of adapters wrote"
            if (folder / PICKLE).exists():
                mend = f"but {PICKLE}: a pickle can run code and is never loaded; save it with use_safetensors=True"
            raise UserError(f"no {WEIGHTS} in {folder}: {mend}")
        arrays, metadata = read_arrays(folder / WEIGHTS)
        with naming(folder):
            if not isinstance(about.get("config"), Mapping) or not isinstance(about.get("name"), str):
                raise UserError(f"{CONFIG}: expected a mapping `config` and a `name`, as adapters 1 writes them")
            tuned = cls(model, BnConfig.from_dict(about["config"], about["name"]), loaded=True)
            try:
                head = _head(tuned, folder)
            except UserError:
                tuned.unload()
                raise
            return tuned.settle({**_under(tuned, arrays), **head}, folder, metadata.get(BASE), is_trainable)

    def merge_and_unload(self) -> PreTrained:
        """Raises UserError: there is something between the two layers that is no product, so nothing to add up."""
        raise UserError("a bottleneck cannot be merged into weights; unload() gives the model without it")

    def unload(self) -> PreTrained:
        """The plain model without the bottlenecks (its head stays as it is); nothing is frozen any more."""
        for end in self.places.values():
            del end.bottleneck
        return self.thaw()


def _head(tuned: AdapterModel, folder: Path) -> Arrays:
    """The head's tensors: those of the model where the folder has none, as `adapters` leaves it then."""
    if not (folder / HEAD_WEIGHTS).is_file():
        if tuned.of_base:
            warn(f"{folder} holds no {HEAD_WEIGHTS}: the head stays as it is in the model")
        return {name: values for name, values in tuned.values().items() if name in tuned.of_base}
    if not tuned.of_base:
        warn(f"{folder}: its head is not used: {type(tuned.model).__name__} has none")
        return {}
    named = read_json(folder / HEAD_CONFIG).get("label2id") if (folder / HEAD_CONFIG).is_file() else None
    own = tuned.model.config.label2id
    if named and own and named != own:
        of_file, of_model = (", ".join(sorted(names, key=lambda name: names[name])) for names in (named, own))
        warn(f"{folder}: the head was trained for the labels {of_file}; the model's are {of_model}")
    return read_arrays(folder / HEAD_WEIGHTS)[0]


def _under(tuned: AdapterModel, arrays: Arrays) -> Arrays:
    """A file's tensors under this model's names: a bare encoder's have no prefix, those of a model with a head do."""
    bare = not any(name.startswith("bert.") for name in tuned.layers)
    prefix = "" if bare else "bert."
    return {prefix + name.removeprefix("bert."): array for name, array in arrays.items()}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda to: to.write_text(text, encoding="utf-8"))
