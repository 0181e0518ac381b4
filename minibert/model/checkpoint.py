"""Weights on disk: a folder with model.safetensors and config.json, as Hugging Face lays it out. No pickle is read.

The `safetensors` library checks a file's header (its length, its JSON, that the tensors cover the data without gap or
overlap); the bytes are then read here, because the library cannot give NumPy a bfloat16.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minibert.errors import UserError
from minibert.model.config import BertConfig

AnyPath = str | os.PathLike[str]
Arrays = dict[str, np.ndarray]

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

# How safetensors names a dtype, and how its bytes lie in a file. A bfloat16 is the upper half of a float32.
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
}  # fmt: skip

# TensorFlow's names, in files converted before 2019.
LEGACY = ((re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"), (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"))
# Constants that older files hold; the model computes them.
BUFFERS = re.compile(r"(^|\.)embeddings\.(position_ids|token_type_ids)$")
# The decoder's names, each with the parameter that it is when the embeddings are tied. In transformers the two biases
# part when they are untied, and the decoder's is the one that counts.
DECODER, DECODER_BIAS, BIAS = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "cls.predictions.bias"
TIED = {DECODER: "bert.embeddings.word_embeddings.weight", DECODER_BIAS: BIAS}


class Checkpoint(NamedTuple):
    """What a folder holds: the config and every array under the name it has in the file."""

    config: BertConfig
    arrays: Arrays


class LoadReport(NamedTuple):
    """Parameters of the model that the file lacks, and names in the file that the model has no use for."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{label}: {', '.join(names)}" for label, names in zip(self._fields, self, strict=True) if names]
        return "; ".join(parts) or "every name matched"


# ---------------------------------------------------------------------------------------------------------- reading


def read_folder(folder: AnyPath) -> Checkpoint:
    """The config and weights in `folder`: config.json, and model.safetensors or its shards with their index.

    16-bit floats come back as float32. Raises UserError, one line that names the file, for all that is wrong with it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {folder}: expected a folder with {CONFIG} and {WEIGHTS}")
    config = read_config(folder)
    if (folder / WEIGHTS).is_file():
        return Checkpoint(config, read_arrays(folder / WEIGHTS)[0])
    if (folder / INDEX).is_file():
        return Checkpoint(config, _read_shards(folder / INDEX))
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} holds {pickles[0]} but no {WEIGHTS}: a pickle can run code and is never loaded; convert it "
            "where you trust it, by from_pretrained and save_pretrained of transformers"
        )
    raise UserError(f"no {WEIGHTS} in {folder}: expected a folder that save_pretrained wrote")


def read_config(folder: AnyPath) -> BertConfig:
    """The config.json in `folder`. Raises UserError where it is missing, no JSON object, or not a BERT of this kind."""
    path = Path(folder) / CONFIG
    try:
        return BertConfig.from_dict(_read_json(path))
    except UserError as error:
        message = str(error)
        raise UserError(message if str(path) in message else f"{path}: {message}") from None


def read_arrays(path: AnyPath) -> tuple[Arrays, dict[str, str]]:
    """Every array of one safetensors file, and its metadata. 16-bit floats come back as float32, others as they are.

    Raises UserError where the file is missing, damaged, or holds a dtype that is not supported.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as checked:
            metadata = checked.metadata() or {}
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            return {name: _read_array(file, 8 + length, name, entry) for name, entry in header.items()}, metadata
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, SafetensorError, ValueError, struct.error) as error:
        raise UserError(f"cannot read {path} as safetensors: {_one_line(error)}; get the file anew") from None


def _read_array(file: Any, data_start: int, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    dtype, (begin, end) = entry["dtype"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise UserError(f"tensor {name!r} is of dtype {dtype}; supported are {', '.join(DTYPES)}: convert it")
    file.seek(data_start + begin)
    array = np.frombuffer(bytearray(file.read(end - begin)), DTYPES[dtype]).reshape(entry["shape"])
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype == "BOOL":
        return array != 0
    return array.astype(np.float32) if dtype == "F16" else array


def _read_shards(index: Path) -> Arrays:
    """The arrays of several files, as `model.safetensors.index.json` tells: weight_map gives each name its file."""
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"expected weight_map, from tensor names to file names, in {index}: get the file anew")
    arrays: Arrays = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise UserError(f"{index} names the file {file!r}: expected a plain name in the same folder")
        arrays |= read_arrays(index.with_name(file))[0]
    lost = sorted(where.keys() - arrays.keys())
    if lost:
        raise UserError(f"{index} lists {lost[0]!r}, but {where[lost[0]]} does not hold it: get the files anew")
    return arrays


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no {path.name} in {path.parent}: expected a folder that save_pretrained wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} as JSON: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"expected a JSON object in {path}, got {type(values).__name__}")
    return values


# --------------------------------------------------------------------------------------------------------- matching


def match(arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> tuple[Arrays, LoadReport]:
    """The arrays under the model's parameter names, and what did not match.

    `expected` gives the model's names and shapes. Accepted are legacy names, the prefix `bert.` or its absence, and a
    tied decoder's second name. Raises UserError where a shape differs or nothing matches.
    """
    found = {_modern(name): array for name, array in arrays.items() if not BUFFERS.search(name)}
    for second, first in TIED.items():
        concerns = second in found and second not in expected and first in expected
        if concerns and (DECODER in expected or _same_where_both(found, first, second)):
            found[first] = found.pop(second)
    matched: Arrays = {}
    unexpected = []
    for name, array in found.items():
        target = _target(name, expected)
        if target is None or target in matched:
            unexpected.append(name)
        else:
            matched[target] = array
    if not matched:
        sample = ", ".join(list(arrays)[:3]) or "nothing"
        raise UserError(f"no weight of this model among the {len(arrays)} arrays given ({sample}, ...): is it a BERT?")
    wrong = [
        f"{name} is {matched[name].shape}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in matched and matched[name].shape != tuple(shape)
    ]
    if wrong:
        raise UserError(f"weights that do not fit the config: {'; '.join(wrong)}")
    missing = tuple(name for name in expected if name not in matched)
    return matched, LoadReport(missing, tuple(unexpected))


def _modern(name: str) -> str:
    for old, new in LEGACY:
        name = old.sub(new, name)
    return name


def _target(name: str, expected: Iterable[str]) -> str | None:
    """The model's name for an array: as it is, with the prefix that a bare BertModel lacks, or without it."""
    return next((n for n in (name, f"bert.{name}", name.removeprefix("bert.")) if n in expected), None)


def _same_where_both(found: Mapping[str, np.ndarray], first: str, second: str) -> bool:
    """False where a file holds a decoder of its own: then its name is reported, not silently dropped."""
    return first not in found or np.array_equal(found[first], found[second], equal_nan=True)


# ---------------------------------------------------------------------------------------------------------- writing


def write_folder(
    folder: AnyPath,
    config: BertConfig,
    arrays: Mapping[str, np.ndarray],
    tokenizer_files: Iterable[AnyPath] | None = None,
    architecture: str = "BertForMaskedLM",
) -> None:
    """Write a folder that `read_folder` and transformers' `from_pretrained` read: each file whole, or not at all.

    The names are those that transformers writes: of tied parameters the first, of an untied decoder also the bias.
    Tokenizer files are copied under their own names. Raises UserError where something cannot be read or written.
    """
    folder = Path(folder)
    kept = {name: array for name, array in arrays.items() if not (config.tie_word_embeddings and name in TIED)}
    if DECODER in kept and BIAS in kept:
        kept.setdefault(DECODER_BIAS, kept[BIAS])
    dtypes = sorted({str(array.dtype) for array in kept.values()})
    about = {"architectures": [architecture], "dtype": dtypes[0] if len(dtypes) == 1 else "float32", **config.to_dict()}
    text = json.dumps(about, indent=2, sort_keys=True) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {_one_line(error)}") from None
    write_arrays(folder / WEIGHTS, kept, {"format": "pt"})
    _write_atomically(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
    for file in map(Path, tokenizer_files or ()):
        if not (folder / file.name).exists() or not file.samefile(folder / file.name):
            _write_atomically(folder / file.name, lambda path, file=file: shutil.copyfile(file, path))  # type: ignore[misc]


def write_arrays(path: AnyPath, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, whole or not at all. Raises UserError where it cannot be written."""
    strange = {n: a.dtype for n, a in arrays.items() if a.dtype.kind not in "fiub"}
    unknown = [f"{n} ({dtype})" for n, dtype in strange.items() if dtype.name != "bfloat16"]  # NumPy: V
    if unknown:
        raise ValueError(f"expected arrays of numbers or booleans, got {', '.join(unknown)}")
    # The library takes the address of the first element: the rest must follow it.
    dense = {name: np.require(array, requirements="C") for name, array in arrays.items()}
    _write_atomically(Path(path), lambda temporary: save_file(dense, temporary, metadata=dict(metadata or {})))


def _write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, force it to the disk, and only then give it the name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        if os.name == "posix":  # the new name is an entry of the folder
            _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {_one_line(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
