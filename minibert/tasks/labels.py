"""Names of classes and their numbers: in the order of a given id2label, else sorted; data are matched by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from minibert.errors import UserError

SHOWN = 10  # names that a message lists


def sorted_names(names: Iterable[str]) -> list[str]:
    """Distinct names in order: as numbers where all are numbers, else as text."""
    distinct = set(names)
    numbers = {name: number_in(name) for name in distinct}
    if all(number is not None for number in numbers.values()):
        return sorted(distinct, key=lambda name: (numbers[name], name))
    return sorted(distinct)


def number_in(text: str) -> float | None:
    """The finite decimal number that a text is, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def names_of(id2label: Mapping[int, str] | Mapping[str, str]) -> list[str]:
    """The names in the order of their numbers; a config.json has these as text. Raises UserError for a gap."""
    by_number = {int(number): name for number, name in id2label.items()}
    if sorted(by_number) != list(range(len(by_number))):
        raise UserError(f"expected id2label to number its names from 0 without a gap, got {sorted(by_number)}")
    return [by_number[number] for number in range(len(by_number))]


class LabelIds:
    """Numbers of names. Where all names are Hugging Face's LABEL_0, LABEL_1 ..., the bare number means them too."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.ids = {name: number for number, name in enumerate(names)}
        if len(self.ids) < len(names):
            twice = next(name for number, name in enumerate(names) if self.ids[name] != number)
            raise UserError(f"expected label names that differ, got {twice!r} twice")
        if self.names == [f"LABEL_{number}" for number in range(len(names))]:
            self.ids |= {str(number): number for number in range(len(names))}

    def __call__(self, name: str, where: str, line: int) -> int:
        """The number of a name. Raises UserError naming the line of the file for one that is unknown."""
        if name not in self.ids:
            shown = ", ".join(self.names[:SHOWN])
            more = f" and {len(self.names) - SHOWN} more" if len(self.names) > SHOWN else ""
            raise UserError(f"unknown label {name!r} in {where}, line {line}: the model knows {shown}{more}")
        return self.ids[name]


def class_ids(labels: Sequence[str], names: Sequence[str], where: str, lines: Sequence[int]) -> np.ndarray:
    """(S,) int64: the number of each label."""
    ids = LabelIds(names)
    return np.array([ids(name, where, line) for name, line in zip(labels, lines, strict=True)], dtype=np.int64)


def class_sets(labels: Sequence[Sequence[str]], names: Sequence[str], where: str, lines: Sequence[int]) -> np.ndarray:
    """(S, K) float32: 1 where a row has a label, as `multi_label_classification` is trained on."""
    ids = LabelIds(names)
    hot = np.zeros((len(labels), len(names)), dtype=np.float32)
    for row, (several, line) in enumerate(zip(labels, lines, strict=True)):
        hot[row, [ids(name, where, line) for name in several]] = 1
    return hot
