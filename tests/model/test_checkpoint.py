"""Checkpoints and configs: what is read, what is refused and how, and that a file is written whole or not at all."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minibert.errors import UserError
from minibert.model import checkpoint
from minibert.model.checkpoint import (
    has_weights,
    read_arrays,
    read_config,
    read_folder,
    read_weights,
    write_arrays,
    write_folder,
)
from minibert.model.config import BertConfig
from minibert.model.matching import DECODER, DECODER_BIAS, WORDS

SMALL = BertConfig(vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6)


def layout(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file, byte by byte: the header's length (8 bytes, little endian), its JSON, the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def one_line(error: pytest.ExceptionInfo[UserError], *words: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


EIGHT = bytes(8)
MALFORMED = {
    "zero length": b"",
    "shorter than its length field": b"abc",
    "no header": layout(b""),
    "header cut off": layout({"a": tensor(0, 8)})[:-5],
    "header longer than the file": layout(b"{}", length=10_000_000),
    "header of 100 MB and a byte": layout(b"{}", length=100_000_001),
    "header of 2^63 bytes": layout(b"{}", length=2**63),
    "a pickle": b"\x80\x02}q\x00." + bytes(100),
    "a zip, as torch.save writes": b"PK\x03\x04" + bytes(100),
    "header not JSON": layout(b"not json at all "),
    "header not UTF-8": layout(b'{"\xff\xfe": 1}'),
    "header a list": layout([1, 2]),
    "header a number": layout(3),
    "header of 200000 brackets": layout(b"[" * 200_000),
    "metadata not text": layout({"__metadata__": {"a": 3}, "a": tensor(0, 8)}, EIGHT),
    "entry without a shape": layout({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT),
    "entry with three offsets": layout({"a": {**tensor(0, 8), "data_offsets": [0, 4, 8]}}, EIGHT),
    "data cut off": layout({"a": tensor(0, 8)}, EIGHT[:7]),
    "data too long": layout({"a": tensor(0, 8)}, EIGHT + b"0"),
    "overlapping tensors": layout({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
    "two tensors in one place": layout({"a": tensor(0, 8), "b": tensor(0, 8)}, EIGHT),
    "a gap between tensors": layout({"a": tensor(0, 8), "b": tensor(12, 20)}, bytes(20)),
    "offsets backwards": layout({"a": tensor(8, 0)}, EIGHT),
    "negative offset": layout({"a": tensor(-8, 0)}, EIGHT),
    "offset past the end": layout({"a": tensor(0, 800, shape=(200,))}, EIGHT),
    "offset of 2^64": layout({"a": tensor(0, 2**64)}, EIGHT),
    "shape that is not its bytes": layout({"a": tensor(0, 8, shape=(3,))}, EIGHT),
    "negative shape": layout({"a": tensor(0, 8, shape=(-2,))}, EIGHT),
    "shape whose size overflows": layout({"a": tensor(0, 8, shape=(2**62, 2**62))}, EIGHT),
    "more axes than NumPy has": layout({"a": tensor(0, 4, shape=(1,) * 100)}, EIGHT[:4]),
    "dtype unknown": layout({"a": tensor(0, 8, "F99")}, EIGHT),
    "dtype of 8-bit floats": layout({"a": tensor(0, 2, "F8_E4M3")}, EIGHT[:2]),
    "dtype complex": layout({"a": tensor(0, 16, "C64")}, bytes(16)),
}


@pytest.mark.parametrize("contents", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_gives_one_line_that_names_it(contents: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(contents)
    with pytest.raises(UserError) as error:
        read_arrays(path)
    one_line(error, path)


def test_the_layout_by_hand_is_one_that_reads(tmp_path: Path) -> None:
    """So that the files above are refused for what is wrong with them and for nothing else."""
    path = tmp_path / "a.safetensors"
    header = {"__metadata__": {"k": "v"}, "b": tensor(8, 16), "a": tensor(0, 8), "c": tensor(16, 16, shape=(3, 0))}
    path.write_bytes(layout(header, np.arange(4, dtype="<f4").tobytes()))
    arrays, metadata = read_arrays(path)
    assert metadata == {"k": "v"}
    assert arrays["a"].tolist() == [0, 1] and arrays["b"].tolist() == [2, 3] and arrays["c"].shape == (3, 0)


VALID = layout(
    {"x": tensor(0, 24, shape=(2, 3)), "half": tensor(24, 28, "BF16"), "ids": tensor(28, 44, "I64")},
    np.arange(11, dtype="<f4").tobytes(),
)


def reads_or_refuses(path: Path, contents: bytes) -> bool:
    """Whether `contents` give arrays; whatever else they give must be a UserError of one line."""
    path.write_bytes(contents)
    try:
        arrays, _ = read_arrays(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return False
    assert sum(array.size for array in arrays.values()) <= len(contents)
    return True


def test_every_truncation_is_refused_and_every_flipped_bit_is_borne(tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    assert reads_or_refuses(path, VALID)
    assert not any(reads_or_refuses(path, VALID[:length]) for length in range(len(VALID)))
    data = len(VALID) - 44
    for bit in range(8 * len(VALID)):
        damaged = bytearray(VALID)
        damaged[bit // 8] ^= 1 << bit % 8
        assert reads_or_refuses(path, damaged) or bit < 8 * data  # any bits are numbers


PAST_THE_LENGTH = st.integers(8, len(VALID) - 1)  # which alone would spoil most of them
TELLING = st.sampled_from(b'0129-"{}[],:FIBUe\x00\xff')


@given(changes=st.lists(st.tuples(PAST_THE_LENGTH, TELLING), min_size=2))
def test_many_changed_bytes_give_a_user_error_or_arrays(changes: list[tuple[int, int]], tmp_path_factory: Any) -> None:
    damaged = bytearray(VALID)
    for place, byte in changes:
        damaged[place] = byte
    reads_or_refuses(tmp_path_factory.getbasetemp() / "damaged.safetensors", bytes(damaged))


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?", ">f4", ">i8"])
def test_every_dtype_comes_back(dtype: str, tmp_path: Path) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    strided, scalar = values.transpose(2, 0, 1)[::2], values[1, 1, 1].reshape(())
    arrays = {"plain": values, "strided": strided, "scalar": scalar, "none": values[:0]}
    write_arrays(tmp_path / "a.safetensors", arrays, {"step": "7"})
    read, metadata = read_arrays(tmp_path / "a.safetensors")
    assert metadata == {"step": "7"}
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        expected = np.float32 if dtype == "f2" else array.dtype.newbyteorder("=")
        assert read[name].dtype == expected and read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array.astype(expected))


def test_bfloat16_is_the_upper_half_of_float32(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3.0e38, 0.0, np.inf, np.nan, 1e-40, -0.0], np.float32)
    upper = (values.view(np.uint32) >> 16).astype("<u2")
    path = tmp_path / "a.safetensors"
    path.write_bytes(layout({"a": tensor(0, 16, "BF16", (8,))}, upper.tobytes()))
    array = read_arrays(path)[0]["a"]
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array.view(np.uint32) >> 16, upper)
    np.testing.assert_allclose(array[:2], values[:2], rtol=0)  # these need no more than 8 bits
    assert np.isnan(array[5]) and np.isinf(array[4])


def test_arrays_read_are_their_own(tmp_path: Path) -> None:
    """Not a view of the file: it may be replaced, and weights are trained in place."""
    path = tmp_path / "a.safetensors"
    write_arrays(path, {"a": np.ones(3, np.float32)})
    array = read_arrays(path)[0]["a"]
    write_arrays(path, {"a": np.zeros(3, np.float32)})
    array += 1
    assert array.tolist() == [2, 2, 2]


def test_objects_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a \(object\)"):
        write_arrays(tmp_path / "a.safetensors", {"a": np.array([print])})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- folders


def small_arrays() -> dict[str, np.ndarray]:
    return {WORDS: np.arange(44, dtype=np.float32).reshape(11, 4), "cls.predictions.bias": np.ones(11, np.float32)}


def test_a_folder_comes_back(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n")
    folder = tmp_path / "deep" / "model"
    write_folder(folder, SMALL, small_arrays(), [vocabulary], architecture="BertForMaskedLM")
    read = read_folder(folder)
    assert read.config == SMALL
    np.testing.assert_equal(read.arrays, small_arrays())
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]
    about = json.loads((folder / "config.json").read_text())
    assert (about["architectures"], about["model_type"], about["dtype"]) == (["BertForMaskedLM"], "bert", "float32")
    assert read_arrays(folder / "model.safetensors")[1] == {"format": "pt"}
    write_folder(folder, SMALL, small_arrays(), [folder / "vocab.txt"])  # onto itself
    assert (folder / "vocab.txt").read_text() == "[PAD]\n"


def test_tied_duplicates_are_not_written_and_untied_ones_are(tmp_path: Path) -> None:
    arrays = {**small_arrays(), DECODER: np.zeros((11, 4), np.float32)}
    write_folder(tmp_path, SMALL, arrays)
    assert read_folder(tmp_path).arrays.keys() == small_arrays().keys()
    write_folder(tmp_path, replace(SMALL, tie_word_embeddings=False), arrays)
    assert read_folder(tmp_path).arrays.keys() == {*arrays, DECODER_BIAS}


def test_shards_are_put_together(tmp_path: Path) -> None:
    write_folder(tmp_path, SMALL, small_arrays())
    (tmp_path / "model.safetensors").unlink()
    where = {}
    for i, (name, array) in enumerate(small_arrays().items()):
        where[name] = f"model-{i}.safetensors"
        write_arrays(tmp_path / where[name], {name: array})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    np.testing.assert_equal(read_folder(tmp_path).arrays, small_arrays())


@pytest.mark.parametrize(
    ("index", "word"),
    [
        ({}, "weight_map"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": {"a": 3}}, "weight_map"),
        ({"weight_map": {"a": "../one.safetensors"}}, "plain name"),
        ({"weight_map": {"a": "absent.safetensors"}}, "absent.safetensors"),
        ({"weight_map": {"lost": "one.safetensors"}}, "lost"),
        ([], "JSON object"),
    ],
)
def test_a_bad_index_is_refused(index: Any, word: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_folder(folder, SMALL, {})
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "one.safetensors").replace(tmp_path / "one.safetensors")
    write_arrays(folder / "one.safetensors", {"a": np.ones(1)})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as error:
        read_folder(folder)
    one_line(error, word, folder)


def test_what_is_not_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_folder(tmp_path / "absent")
    one_line(error, tmp_path / "absent", "config.json")
    with pytest.raises(UserError) as error:
        read_folder(tmp_path)
    one_line(error, tmp_path, "no config.json")
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_dict()))
    with pytest.raises(UserError) as error:
        read_folder(tmp_path)
    one_line(error, tmp_path, "no model.safetensors")


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    """This one would leave a mark if it were."""
    mark = tmp_path / "mark"
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_dict()))
    pickled = b"cos\nmkdir\n(V" + str(mark).encode() + b"\ntR."
    (tmp_path / "pytorch_model.bin").write_bytes(pickled)
    with pytest.raises(UserError) as error:
        read_folder(tmp_path)
    one_line(error, "pytorch_model.bin", "never loaded", "save_pretrained")
    (tmp_path / "model.safetensors").write_bytes(pickled)
    with pytest.raises(UserError):
        read_folder(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[1]", "JSON object"),
        (b"[" * 100_000, "JSON"),
        (b'{"hidden_act": "\xe9"}', "JSON"),
        (b'{"hidden_size": 10, "num_attention_heads": 4}', "multiple of num_attention_heads (4), got 10"),
        (b'{"layer_norm_eps": "1e-12"}', "layer_norm_eps to be float, got str '1e-12'"),
    ],
)
def test_a_bad_config_file_is_named(text: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError) as error:
        read_folder(tmp_path)
    one_line(error, tmp_path / "config.json", word)


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(SMALL.to_dict()).encode())
    assert read_config(tmp_path) == SMALL


def test_google_s_name_of_a_config_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "bert_config.json").write_text("{}")
    with pytest.raises(UserError) as error:
        read_config(tmp_path)
    one_line(error, "no config.json", "bert_config.json", "rename")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model-00001-of-00002.bin", ["a pickle", "save_pretrained"]),
        ("epoch=3.ckpt", ["a pickle"]),
        ("tf_model.h5", ["TensorFlow", "transformers 4"]),
        ("flax_model.msgpack", ["Flax", "transformers 4"]),
        ("bert_model.ckpt.index", ["TensorFlow"]),
        ("model-00001-of-00002.safetensors", ["model.safetensors.index.json"]),
        ("pytorch_model.safetensors", ["name it model.safetensors"]),
    ],
)
def test_weights_in_other_files_are_named_with_what_to_do(file: str, words: list[str], tmp_path: Path) -> None:
    assert not has_weights(tmp_path)
    (tmp_path / file).write_bytes(b"")
    for read in (has_weights, read_weights):
        with pytest.raises(UserError) as error:
            read(tmp_path)
        one_line(error, file, tmp_path, *words)


# -------------------------------------------------------------------------------------------------------- atomicity


def failing_write(*args: Any, **kwargs: Any) -> None:
    Path(args[1]).write_bytes(b"half of")
    raise OSError(28, "No space left on device")


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, SMALL, small_arrays())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", failing_write)
        with pytest.raises(UserError) as error:
            write_folder(tmp_path, SMALL, {name: array + 1 for name, array in small_arrays().items()})
    one_line(error, tmp_path / "model.safetensors", "No space left")
    np.testing.assert_equal(read_folder(tmp_path).arrays, small_arrays())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "a.safetensors"
    write_arrays(path, {"a": np.ones(2)})
    before = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", interrupted)
        write_arrays(path, {"a": np.zeros(2)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_new_file_is_on_the_disk_before_it_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("rename"), rename(old, new)))
    write_arrays(tmp_path / "a.safetensors", {"a": np.ones(2)})
    assert events[:2] == ["sync", "rename"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        write_folder(tmp_path / "file", SMALL, small_arrays())
    one_line(error, tmp_path / "file")
    with pytest.raises(UserError) as error:
        write_folder(tmp_path / "model", SMALL, small_arrays(), [tmp_path / "absent.txt"])
    one_line(error, "absent.txt")
    with pytest.raises(UserError) as error:
        write_arrays(tmp_path / "absent" / "a.safetensors", {"a": np.ones(1)})
    one_line(error, tmp_path / "absent")


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000])
def test_a_name_that_is_too_long_is_said_in_a_line(name: str) -> None:
    """As a damaged modules.json gives one."""
    with pytest.raises(UserError, match=r"expected a folder with a checkpoint, but x.* is too long") as refused:
        read_config(name)
    assert len(str(refused.value)) < 200 and "\n" not in str(refused.value)
