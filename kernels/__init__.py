"""The op set: what each op means, and the loops written for it by hand.

A folder is an op family (its `__init__.py` defines the ops) or a toolbox that families share: cpu, gpu, readings. Each
folder that is here is imported: a new family needs no line anywhere else in the code.
"""

import importlib
import pkgutil
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
    from minibert.kernels.op import OPS, Array, Op, Sample

    for _, _name, _is_folder in pkgutil.iter_modules(__path__):
        if _is_folder:  # an op family, which registers its ops, or a toolbox
            importlib.import_module(f"{__name__}.{_name}")
else:
    sys.modules[__name__] = _BareName(__name__)
    sys.modules[__name__].__spec__ = __spec__

__all__ = ["OPS", "Array", "Op", "Sample"]
