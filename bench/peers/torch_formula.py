"""The formula of an op evaluated by PyTorch, operation by operation: who `bench.ops --vs torch` compares with.

torch brings NumPy's functions on its own tensors along (`torch._numpy`, by which torch.compile runs NumPy code), and a
formula asks for nothing but an array module: no op is named here. This is PyTorch on the same math, not PyTorch's own
fused softmax or attention; those are in `bench.step --vs torch`. Formulas that draw random numbers are refused by
torch, which lacks most of uint64: they are left out, with torch's reason.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from bench.peers.torch_bert import missing
from minibert.backends import BackendUnavailable
from minibert.backends.base import with_integers
from minibert.errors import pip_install
from minibert.kernels import Op
from minibert.kernels.op import Array


class TorchModule:
    """torch's NumPy functions, with the things that formulas need and NumPy lacks."""

    def __init__(self) -> None:
        self.torch, self.functions = import_module("torch"), import_module("torch._numpy")

    def erf(self, x: Array) -> Array:
        return self.functions.asarray(self.torch.erf(x.tensor))

    @staticmethod
    def stored(x: Array) -> Array:
        return x

    @staticmethod
    def as_floats(whole: Array, like: Array) -> Array:
        return whole.astype(like.dtype)

    @staticmethod
    def integer_matmul(a: Array, b: Array) -> Array:
        """In float64, as NumPy's: torch multiplies integers without its library."""
        return (a.astype("float64") @ b.astype("float64")).astype("int64")

    def segment_sum(self, rows: Array, ids: Array, count: int) -> Array:
        """out[i] = sum of rows[k] over ids[k] == i; rows (N, ...) -> (count, ...)."""
        out = self.torch.zeros((count, *rows.shape[1:]), dtype=rows.tensor.dtype)
        return self.functions.asarray(out.index_add_(0, self.functions.asarray(ids).tensor, rows.tensor))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.functions, name)


class TorchFormula:
    """Runs ops by their formula on PyTorch's tensors; it has as much of a backend as `op_timing` asks for."""

    name = "torch"
    emulated = False

    def __init__(self, threads: int) -> None:
        """Raises BackendUnavailable where torch is not installed."""
        if missing():
            raise BackendUnavailable(f"--vs torch: {missing()}; {pip_install('torch')}, or leave it out")
        self.xp = TorchModule()
        self.xp.torch.set_num_threads(threads)

    def by(self, op: Op) -> str:
        return "formula"

    def asarray(self, x: np.ndarray) -> Array:
        """On the same memory. Integers too: NumPy's would be compared with torch's arrays element by element."""
        return self.xp.functions.asarray(self.xp.torch.from_numpy(x))

    def run(self, op: Op, *arrays: Array, **params: Any) -> Any:
        with self.xp.torch.inference_mode():
            return with_integers(op, op.formula(self.xp, *arrays, **params))

    def numpy(self, x: Array) -> np.ndarray:
        return np.asarray(x.tensor.numpy() if hasattr(x, "tensor") else x)

    def synchronize(self) -> None:
        """Nothing to wait for on a CPU."""
