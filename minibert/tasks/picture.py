"""The confusion matrix as a picture; and what any picture needs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minibert.data.lines import AnyPath
from minibert.errors import UserError, pip_install

NUMBERED = 30  # classes; the counts of more would be too small to read
LONGEST_NAME = 24  # characters


def figure_library() -> Any:
    """matplotlib. Raises UserError where it is missing."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise UserError(f"a picture needs matplotlib: {pip_install('[tasks]')}") from error
    return matplotlib


def draw_confusion_matrix(matrix: np.ndarray, names: Sequence[str], path: AnyPath) -> None:
    """Draw (K, K) counts, true classes by predicted ones, into a .png, .svg or .pdf file.

    A cell's colour is its share of its row, so that rare classes show as frequent ones do. Raises UserError where
    matplotlib is missing, or the file cannot be written.
    """
    matplotlib = figure_library()
    classes = len(names)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 2.5 + (0.45 if classes <= NUMBERED else 0.18) * classes  # inches
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names may be in any script
        figure = matplotlib.figure.Figure(figsize=(side, side), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        label_axes(axes, [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in names])
        if classes <= NUMBERED:
            for row, column in zip(*np.nonzero(matrix), strict=True):
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8)
        figure.colorbar(image, ax=axes, shrink=0.6, label="share of the true class")
        save(figure, Path(path))


def label_axes(axes: Any, names: Sequence[str]) -> None:
    size = 9 if len(names) <= NUMBERED else 6
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")


def save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:  # matplotlib's way to say that it cannot write this kind of file
        raise UserError(f"cannot draw into {path}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
