"""The op set: what each op means, and the loops written for it by hand."""

import sys
from types import ModuleType


class _BareName(ModuleType):
    """What `import kernels` gives in the repository's folder: a module that refuses every use.

    The import itself must pass: transformers looks for a library called `kernels` and imports what it finds, to ask for
    its version. Loading this folder under that name would make a second registry of ops.
    """

    def __getattr__(self, name: str) -> None:
        if name in ("__version__", "__file__"):
            raise AttributeError(name)
        raise ImportError("this folder is the package `minibert.kernels`: import it by that name")


if __name__ == "minibert.kernels":
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
else:
    sys.modules[__name__] = _BareName(__name__)
    sys.modules[__name__].__spec__ = __spec__

__all__ = [
    "OPS", "Array", "Op", "Sample", "activation", "adamw", "attention", "cross_entropy", "dropout", "elementwise",
    "embedding", "layer_norm", "linear", "reduction", "softmax", "view",
]  # fmt: skip
