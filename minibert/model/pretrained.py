"""What every model has: a place, a seed, and a folder to come from and to go to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Self

import numpy as np

from minibert import backends
from minibert.backends.base import Backend, dtype_of
from minibert.errors import UserError
from minibert.model import checkpoint
from minibert.model.config import BertConfig
from minibert.model.nn import Module, Parameter, Place


class PreTrained(Module):
    """A model on a backend. Dropout is off until `train()`."""

    config: BertConfig
    place: Place
    seed: int

    def begin(self, config: BertConfig, backend: str | Backend, dtype: str, seed: int) -> Place:
        if not isinstance(config, BertConfig):
            raise UserError(f"config: expected a BertConfig, got {type(config).__name__}; see BertConfig.from_dict")
        if not isinstance(backend, str | Backend):
            raise UserError(f"backend: expected a name such as 'numba' or a Backend, got {backend!r}")
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise UserError(f"seed: expected a whole number from 0 to {2**32 - 1}, got {seed!r}")
        self.config, self.seed = config, seed
        found = backends.get(backend) if isinstance(backend, str) else backend
        if dtype not in found.dtypes:
            raise UserError(f"dtype: expected one of {', '.join(found.dtypes)} on {found.name}, got {dtype!r}")
        dtype_of(dtype)  # says what to install where NumPy lacks it
        self.place = Place(found, dtype)
        return self.place

    @property
    def backend(self) -> Backend:
        return self.place.backend

    def initialise(self, only: set[str] | None = None) -> None:
        """Draw first values for every parameter, or for those named: by seed and name alone."""
        for name, parameter in self.named_parameters():
            if only is None or name in only:
                parameter.initialise(self.seed, name.removeprefix("bert."), self.config.initializer_range)

    def state_dict(self) -> dict[str, np.ndarray]:
        """A copy of every parameter, as NumPy, by Hugging Face's name."""
        return {name: np.array(self.backend.numpy(p.data)) for name, p in self.named_parameters()}

    def load_state_dict(self, arrays: dict[str, np.ndarray], strict: bool = True) -> checkpoint.LoadReport:
        """Take values by name; UserError for a wrong shape and, if `strict`, for a missing or unexpected name."""
        parameters: dict[str, Parameter] = dict(self.named_parameters())
        matched, report = checkpoint.match(arrays, {name: p.declared_shape for name, p in parameters.items()})
        if strict and (report.missing or report.unexpected):
            raise UserError(f"the weights do not fit the model: {report}")
        for name, values in matched.items():
            parameters[name].assign(values)
        return report

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, backend: str | Backend = "numba", dtype: str = "float32", seed: int = 0
    ) -> Self:
        """Load config.json and model.safetensors from a folder, with dropout off.

        Parameters that the file lacks are drawn from `seed`, and a warning names them. Raises UserError for a folder
        that is not a checkpoint, and for weights of the wrong shape.
        """
        read = checkpoint.read_folder(folder)
        model: Any = cls(read.config, backend, dtype, seed, initialise=False)  # type: ignore[call-arg]
        report = model.load_state_dict(read.arrays, strict=False)
        if report.missing:
            warnings.warn(f"{folder}: {report}; the missing ones are newly initialised", stacklevel=2)
            model.initialise(set(report.missing))
        return model.eval()

    def save_pretrained(self, folder: str | Path, tokenizer_files: Any = None) -> None:
        """Write config.json and model.safetensors as transformers reads them; `tokenizer_files` are copied there."""
        checkpoint.write_folder(
            folder, self.config, self.state_dict(), tokenizer_files, architecture=type(self).__name__
        )
