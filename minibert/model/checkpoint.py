"""Weights on disk: a folder with model.safetensors and config.json, as Hugging Face lays it out. No pickle is read.

The `safetensors` library checks a file's header (its length, its JSON, that the tensors cover the data without gap or
overlap); the bytes are then read here, because the library cannot give NumPy a bfloat16.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minibert.errors import UserError, WriteError, path_of
from minibert.model.config import BertConfig, config_from
from minibert.model.matching import BIAS, DECODER, DECODER_BIAS, TIED, Arrays

AnyPath = str | os.PathLike[str]

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
GOOGLES_CONFIG = "bert_config.json"

# How safetensors names a dtype, and how its bytes lie in a file. A bfloat16 is the upper half of a float32.
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
}  # fmt: skip

# Weights in other files, by how the name ends, and what to do about them.
PICKLE = "a pickle can run code and is never loaded; convert it where you trust it, by from_pretrained and "
FOREIGN = "it is of TensorFlow or Flax, and not read; convert it by from_pretrained and "
EXPORT = f"it is made for another program, and not read; get the model that it was made from, with {WEIGHTS}"
OTHER_WEIGHTS = {
    ".safetensors": f"name it {WEIGHTS} if it is the whole model; if it is one of several, get {INDEX} too",
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), f"{PICKLE}save_pretrained of transformers"),
    **dict.fromkeys((".h5", ".msgpack", ".index"), f"{FOREIGN}save_pretrained of transformers 4"),
    **dict.fromkeys((".onnx", ".gguf", ".ot", ".tflite", ".pb", ".npz", ".mlmodel", ".mlpackage"), EXPORT),
}


class Checkpoint(NamedTuple):
    """What a folder holds: the config and every array under the name it has in the file."""

    config: BertConfig
    arrays: Arrays


# ---------------------------------------------------------------------------------------------------------- reading


def read_folder(folder: AnyPath) -> Checkpoint:
    """The config and weights in `folder`. Raises UserError, one line that names the file, for what is wrong with it."""
    return Checkpoint(read_config(folder), read_weights(folder))


def read_config(folder: AnyPath) -> BertConfig:
    """The config.json in `folder`. Raises UserError where it is missing, no JSON object, or no BERT or ELECTRA."""
    path = _folder(folder) / CONFIG
    if not path.exists() and (path.parent / GOOGLES_CONFIG).exists():
        raise UserError(f"no {CONFIG} in {path.parent}, but {GOOGLES_CONFIG}, which says the same: rename it")
    try:
        return config_from(read_json(path))
    except UserError as error:
        message = str(error)
        raise UserError(message if str(path) in message else f"{path}: {message}") from None


def read_weights(folder: AnyPath) -> Arrays:
    """What model.safetensors in `folder` holds, or its shards with their index; 16-bit floats as float32.

    Raises UserError, one line that names the file, for all that is wrong with it.
    """
    folder = _folder(folder)
    if not has_weights(folder):
        raise UserError(f"no {WEIGHTS} in {folder}: expected a folder that save_pretrained wrote")
    return read_arrays(folder / WEIGHTS)[0] if (folder / WEIGHTS).is_file() else _read_shards(folder / INDEX)


def has_weights(folder: AnyPath) -> bool:
    """Whether there is something for `read_weights`. Raises UserError where there are weights, but in other files."""
    folder = Path(folder)
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return True
    if (folder / WEIGHTS).is_dir():
        raise UserError(f"{folder / WEIGHTS} is a folder: expected the file of that name, with the weights")
    if (folder / WEIGHTS).is_symlink():
        raise UserError(f"{folder / WEIGHTS} is a link to a file that is not there: get the file anew")
    for ending, mend in OTHER_WEIGHTS.items():
        for path in sorted(folder.glob(f"*{ending}")):
            raise UserError(f"{folder} holds {path.name} but no {WEIGHTS}: {mend}")
    return False


def _folder(folder: AnyPath) -> Path:
    if not path_of(folder, "a folder with a checkpoint").is_dir():
        raise UserError(
            f"no checkpoint at {folder}: expected a folder with {CONFIG} and {WEIGHTS} (nothing is downloaded here)"
        )
    return Path(folder)


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
        if isinstance(error, SafetensorError) and _is_pointer(path):
            raise UserError(f"{path} is a pointer of git-lfs, not the file: fetch it by `git lfs pull`") from None
        raise UserError(f"cannot read {path} as safetensors: {_one_line(error)}; get the file anew") from None


def _is_pointer(path: Path) -> bool:
    """Whether git left a note of a large file instead of the file."""
    with open(path, "rb") as file:
        return file.read(20) == b"version https://git-"


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
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"expected weight_map, from tensor names to file names, in {index}: get the file anew")
    arrays: Arrays = {}
    for file in sorted(set(where.values())):
        if not file or Path(file).name != file:
            raise UserError(f"{index} names the file {file!r}: expected a plain name in the same folder")
        arrays |= read_arrays(index.with_name(file))[0]
    lost = sorted(where.keys() - arrays.keys())
    if lost:
        raise UserError(f"{index} lists {lost[0]!r}, but {where[lost[0]]} does not hold it: get the files anew")
    return arrays


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, one line that names it, where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"no {path.name} in {path.parent}: expected a folder that save_pretrained wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} as JSON: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"expected a JSON object in {path}, got {type(values).__name__}")
    return values


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
    folder = make_folder(folder)
    kept = {name: array for name, array in arrays.items() if not (config.tie_word_embeddings and name in TIED)}
    if DECODER in kept and BIAS in kept:
        kept.setdefault(DECODER_BIAS, kept[BIAS])
    dtypes = sorted({str(array.dtype) for array in kept.values()})
    write_arrays(folder / WEIGHTS, kept, {"format": "pt"})
    write_config(folder, config, architecture, dtypes[0] if len(dtypes) == 1 else "float32")
    for file in map(Path, tokenizer_files or ()):
        if not (folder / file.name).exists() or not file.samefile(folder / file.name):
            write_atomically(folder / file.name, lambda path, file=file: shutil.copyfile(file, path))  # type: ignore[misc]


def write_config(folder: AnyPath, config: BertConfig, architecture: str, dtype: str) -> None:
    """Write config.json as transformers does. Raises WriteError where it cannot be written."""
    about = {**config.to_dict(), "architectures": [architecture], "dtype": dtype}
    if "torch_dtype" in about:  # the same, as older files name it
        about["torch_dtype"] = dtype
    text = json.dumps(about, indent=2, sort_keys=True) + "\n"
    write_atomically(Path(folder) / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def write_arrays(path: AnyPath, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, whole or not at all. Raises WriteError where it cannot be written."""
    strange = {n: a.dtype for n, a in arrays.items() if a.dtype.kind not in "fiub"}
    unknown = [f"{n} ({dtype})" for n, dtype in strange.items() if dtype.name != "bfloat16"]  # NumPy: V
    if unknown:
        raise ValueError(f"expected arrays of numbers or booleans, got {', '.join(unknown)}")
    # The library takes the address of the first element: the rest must follow it.
    dense = {name: np.require(array, requirements="C") for name, array in arrays.items()}
    write_atomically(Path(path), lambda temporary: save_file(dense, temporary, metadata=dict(metadata or {})))


Write = Callable[[Path], Any]  # fills the file of that name
LATER: ContextVar[dict[Path, Write] | None] = ContextVar("later", default=None)


@contextmanager
def written_later() -> Iterator[dict[Path, Write]]:
    """What this thread would write is collected instead, by path: a model is copied now, written while it changes."""
    files: dict[Path, Write] = {}
    token = LATER.set(files)
    try:
        yield files
    finally:
        LATER.reset(token)


def make_folder(folder: AnyPath) -> Path:
    """A folder to write to, made where there is none. Raises UserError below a file, WriteError where it may not be."""
    folder = path_of(folder, "a folder to write to")
    try:
        if LATER.get() is None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        kind = UserError if isinstance(error, NotADirectoryError | FileExistsError) else WriteError
        raise kind(f"cannot write into {folder}: {error.strerror}; name another folder") from None
    return folder


def write_atomically(path: Path, write: Write) -> None:
    """Let `write` fill a file beside `path`, force it to the disk, then give it the name. Raises WriteError.

    Within `written_later` it is noted, and nothing is written.
    """
    if (later := LATER.get()) is not None:
        later[path] = write
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)  # the new name is an entry of the folder
    except (OSError, SafetensorError) as error:
        raise WriteError(f"cannot write {path}: {_one_line(error)}") from None
    finally:
        with suppress(OSError):  # the one that is raised says why
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
