"""Names in a file and names in a model: which array is which parameter, and a report of what did not match."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minibert.errors import UserError, warn

Arrays = dict[str, np.ndarray]
Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]  # a parameter, its shape in the file and in the model

# What torch's wrappers, and a module that holds the model, put before every name.
WRAPPERS = re.compile(r"^((module|_orig_mod|model)\.)+")
# TensorFlow's names, in files converted before 2019.
LEGACY = ((re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"), (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"))
# Constants that older files hold; the model computes them.
BUFFERS = re.compile(r"(^|\.)embeddings\.(position_ids|token_type_ids)$")
# The decoder's names, each with the parameter that it is when the embeddings are tied. In transformers the two biases
# part when they are untied, and the decoder's is the one that counts.
WORDS, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
BIAS, DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"
GENERATOR_WORDS, GENERATOR_DECODER = "electra.embeddings.word_embeddings.weight", "generator_lm_head.weight"  # ELECTRA
TIED = {DECODER: WORDS, DECODER_BIAS: BIAS, GENERATOR_DECODER: GENERATOR_WORDS}
ENCODER = re.compile(r"^(bert|electra)\.")
LAYER = re.compile(r"(.*\blayer\.)(\d+)\.(.*)")


@dataclass(frozen=True)
class LoadReport:
    """What did not fit: parameters that the file lacks, names in it that the model has no use for, and shapes.

    It unpacks into the first two, as what torch's `load_state_dict` returns.
    """

    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    mismatched_keys: tuple[Mismatch, ...] = ()

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter((self.missing_keys, self.unexpected_keys))

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def __str__(self) -> str:
        said = {
            "missing": named(self.missing_keys),
            "unexpected": named(self.unexpected_keys),
            "of another shape": _shapes(self.mismatched_keys),
        }
        return "; ".join(f"{label}: {names}" for label, names in said.items() if names) or "every name matched"

    def tell(self, folder: Any) -> None:
        """Warn of what did not match, and say what becomes of it."""
        if self:
            drawn, unused = self.missing_keys or self.mismatched_keys, self.unexpected_keys
            so = ["what is missing or of another shape is newly initialised"] * bool(drawn)
            so += ["what is unexpected is not used"] * bool(unused)
            warn(f"{folder}: {self} ({', '.join(so)})")

    def loading_info(self) -> dict[str, Any]:
        """What `output_loading_info=True` gives in transformers."""
        return {**{name: set(keys) for name, keys in vars(self).items()}, "error_msgs": []}


def named(names: Sequence[str], most: int = 12) -> str:
    """Names in one line; where they are many, one that several layers have stands once, or layers stand as a whole."""
    shown: Sequence[str] = names
    for whole in (False, True):
        if len(shown) > most:
            shown = _merged(names, whole)
    return _few(shown, most)


def _shapes(mismatched: Sequence[Mismatch]) -> str:
    return _few([f"{name} is {found}, expected {expected}" for name, found, expected in mismatched], 3)


def _merged(names: Sequence[str], whole: bool) -> list[str]:
    layers: dict[str, list[int]] = {}
    for name in names:
        found = LAYER.fullmatch(name)
        key = f"{found[1]}#.{'*' if whole else found[3]}" if found else name
        layers.setdefault(key, []).extend([int(found[2])] if found else [])
    return [key.replace("#", _span(sorted(set(numbers)))) if numbers else key for key, numbers in layers.items()]


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return "{" + (f"{numbers[0]}...{numbers[-1]}" if whole else _few([str(n) for n in numbers], 12)) + "}"


def _few(texts: Sequence[str], most: int) -> str:
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def match(
    arrays: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[int, ...]],
    ignore_mismatched_sizes: bool = False,
    integers: Collection[str] = (),
) -> tuple[Arrays, LoadReport]:
    """The arrays under the model's parameter names, and what did not match, under the names it has in the file.

    `expected` gives the model's names and shapes. Accepted are legacy names, the encoder's prefix or its absence, a
    wrapper's prefix, and a tied decoder's second name. Raises UserError where nothing matches, where an array is not of
    floats (but those of `integers`), and where a shape differs, unless that is to be ignored.
    """
    names = _names(arrays)
    source = {target: name for target in expected if (name := _find(names, target))}
    same = _tie(arrays, names, source, expected)
    if not source:
        sample = _few(list(arrays), 3) or "nothing"
        raise UserError(f"no weight of this model among the {len(arrays)} arrays given ({sample}): is it a BERT?")
    matched, wrong = {}, []
    for target, name in source.items():
        array, shape = arrays[name], tuple(expected[target])
        if array.dtype.kind in "iub" and target not in integers:
            raise UserError(f"{name} is of {array.dtype}, expected floats: if it is quantised, save it dequantised")
        if array.dtype != np.int8 and target in integers:
            raise UserError(f"{name} is of {array.dtype}, expected int8, as the layer is that it is for")
        if array.shape == shape:
            matched[target] = array
        else:
            wrong.append((target, array.shape, shape))
    used = {*source.values(), *same, *(name for name in arrays if _is_constant(name, arrays[name]))}
    missing = tuple(name for name in expected if name not in source)
    report = LoadReport(missing, tuple(name for name in arrays if name not in used), tuple(wrong))
    if wrong and not ignore_mismatched_sizes:
        raise UserError(f"weights that do not fit the config: {_shapes(wrong)}")
    return matched, report


def _tie(
    arrays: Mapping[str, np.ndarray], names: Mapping[str, str], source: dict[str, str], expected: Mapping[str, Any]
) -> set[str]:
    """Let a second name that the model lacks serve as its first; those that only repeat the first are returned.

    Of two biases that differ, the decoder's counts, unless its weight is another than the model's and finds no use.
    """
    same = set()
    for second, first in TIED.items():
        if second not in names or second in expected or first not in expected:
            continue
        if first in source and _equal(arrays, source[first], names[second]):
            same.add(names[second])
        elif first not in source or (
            second == DECODER_BIAS and names.get(DECODER, "") in {"", *same, *source.values()}
        ):
            source[first] = names[second]
    return same


def own_decoder(arrays: Mapping[str, np.ndarray]) -> str | None:
    """The name of a decoder in a file that differs from its word embedding, so that the two cannot be tied, if any."""
    names = _names(arrays)
    for decoder, embedding in ((DECODER, WORDS), (GENERATOR_DECODER, GENERATOR_WORDS)):
        words = _find(names, embedding)
        if decoder in names and words is not None and not _equal(arrays, words, names[decoder]):
            return decoder
    return None


def finder(arrays: Mapping[str, np.ndarray]) -> Callable[[str], str | None]:
    """A function from a parameter's name to that of its array, None where there is none."""
    names = _names(arrays)
    return lambda target: _find(names, target)


def _names(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Today's name of each array -> its name in the file; of two that become one, the one that needed no change."""
    names: dict[str, str] = {}
    for name in sorted(arrays, key=lambda name: _modern(name) != name):
        if not _is_constant(name, arrays[name]):
            names.setdefault(_modern(name), name)
    return names


def _modern(name: str) -> str:
    name = WRAPPERS.sub("", name)
    for old, new in LEGACY:
        name = old.sub(new, name)
    return name


def _find(names: Mapping[str, str], target: str) -> str | None:
    """The file's name for a parameter: as it is, without the prefix that a bare encoder lacks, or with it."""
    known_as = (target, ENCODER.sub("", target), f"bert.{target}", f"electra.{target}")
    return next((names[n] for n in known_as if n in names), None)


def _is_constant(name: str, array: np.ndarray) -> bool:
    """Whether it is what the model computes anyway: positions from 0 on, and token types of 0."""
    found = BUFFERS.search(name)
    return found is not None and np.array_equal(array.ravel(), np.arange(array.size) * (found[2] == "position_ids"))


def _equal(arrays: Mapping[str, np.ndarray], first: str, second: str) -> bool:
    return np.array_equal(arrays[first], arrays[second], equal_nan=True)
