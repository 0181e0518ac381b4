"""A folder with an adapter as Hugging Face PEFT lays it out: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from minibert.errors import UserError, path_of
from minibert.model.checkpoint import AnyPath, make_folder, read_arrays, read_json, write_arrays, write_atomically
from minibert.model.matching import BIAS, DECODER_BIAS, Arrays, named

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # before every name
BASE = "minibert_base_sha256"  # in the metadata of the tensors, where PEFT does not mind it: of which base they are
# What PEFT writes besides with bias="all": a head's bias as it was before training, and as it is, once more.
DOUBLES = (".original_module.bias", ".modules_to_save.bias")


def read_adapter(folder: AnyPath) -> tuple[dict[str, Any], Arrays, str | None]:
    """The config of an adapter, its tensors and, where it is known, the sha256 of its base.

    Raises UserError, one line that names the file, for what is wrong with it.
    """
    folder = path_of(folder, "a folder with an adapter")
    if not folder.is_dir():
        raise UserError(f"no adapter at {folder}: expected a folder with {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        mend = "expected a folder that save_pretrained of peft or of a tuned model wrote"
        if (folder / PICKLE).exists():
            mend = f"but {PICKLE}: a pickle can run code and is never loaded; convert it by save_pretrained of peft"
        raise UserError(f"no {WEIGHTS} in {folder}: {mend}")
    arrays, metadata = read_arrays(folder / WEIGHTS)
    return config, arrays, metadata.get(BASE)


def write_adapter(
    folder: AnyPath, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray], base_sha256: str
) -> None:
    """Write both files, each whole or not at all. Raises UserError where that cannot be done."""
    folder = make_folder(folder)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_arrays(folder / WEIGHTS, arrays, {"format": "pt", BASE: base_sha256})
    write_atomically(folder / CONFIG, lambda path: Path(path).write_text(text, encoding="utf-8"))


@contextmanager
def naming(folder: AnyPath) -> Iterator[None]:
    """What is wrong with an adapter is said with its folder; a value of a kind that no setting has is wrong too."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None
    except (AttributeError, IndexError, KeyError, MemoryError, OverflowError, TypeError, ValueError) as error:
        told = " ".join(str(error).split()) or "it asks for too much memory"
        raise UserError(f"{folder}: {CONFIG} holds a value that no such setting has: {told}; correct it") from None


def once_each(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """A file's tensors without those that PEFT writes twice; of a decoder's two biases the one that counts."""
    kept = {name: array for name, array in arrays.items() if not name.endswith(DOUBLES)}
    if PREFIX + DECODER_BIAS in kept:
        kept[PREFIX + BIAS] = kept.pop(PREFIX + DECODER_BIAS)
    return kept


def with_decoder_bias(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """With the second name of the decoder's bias, which transformers reads where the decoder is not tied."""
    return {**arrays, **({PREFIX + DECODER_BIAS: arrays[PREFIX + BIAS]} if PREFIX + BIAS in arrays else {})}


def demand_the_same(given: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError for a tensor that is missing, surplus, of another shape, or not of floats."""
    missing = [name for name in expected if name not in given]
    surplus = [name for name in given if name not in expected]
    if missing or surplus:
        said = [f"{what}: {named(names)}" for what, names in (("missing", missing), ("surplus", surplus)) if names]
        raise UserError(f"the tensors are not those of {CONFIG} and this model: {'; '.join(said)}")
    for name, shape in expected.items():
        if given[name].shape != tuple(shape):
            raise UserError(f"{name} is {given[name].shape}, expected {tuple(shape)} by {CONFIG} and this model")
        if given[name].dtype.kind in "iub":
            raise UserError(f"{name} is of {given[name].dtype}, expected floats")
