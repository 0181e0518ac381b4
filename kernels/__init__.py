"""The op set: what each op means, and the loops and CUDA written for it by hand."""

if __name__ != "minibert.kernels":
    raise ImportError("this folder is the package `minibert.kernels`: import it by that name")

from minibert.kernels import (
    activation,
    adamw,
    attention,
    cross_entropy,
    dropout,
    elementwise,
    embedding,
    layer_norm,
    linear,
    reduction,
    softmax,
    view,
)
from minibert.kernels.op import OPS, Array, Op, Sample

__all__ = [
    "OPS", "Array", "Op", "Sample", "activation", "adamw", "attention", "cross_entropy", "dropout", "elementwise",
    "embedding", "layer_norm", "linear", "reduction", "softmax", "view",
]  # fmt: skip
