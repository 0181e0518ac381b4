"""Modules under the names that they had before they had rooms: kernels and scripts written then go on working.

`import minibert.kernels.cpu_jit` is `minibert.kernels.cpu.jit`, the same module, with a DeprecationWarning.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

ROOMS = {  # room -> the modules that stood one floor higher
    "model": "tensor nn bert config outputs packing recompute pretrained checkpoint",
    "train": "optim guard graphed",
    "lab.conform": "judge gradcheck check suite empty",
    "lab.lockstep": "assess trace drift bisect reproduce",
    "lab.measure": "peaks energy prices growth scaling watching",
    "lab.compare": "compare",
}
MOVED = {f"minibert.{name}": f"minibert.{room}.{name}" for room, names in ROOMS.items() for name in names.split()} | {
    "minibert.training_config": "minibert.train.config",
    "minibert.lockstep": "minibert.lab.lockstep.diff",
    "minibert.compare_facts": "minibert.lab.compare.facts",
    "minibert.kernels.gpu_launch": "minibert.kernels.gpu.launch",
}
TOOLS = "arrays jit math microkernel product team threads vectors"
MOVED |= {f"minibert.kernels.cpu_{name}": f"minibert.kernels.cpu.{name}" for name in TOOLS.split()}


class Former(MetaPathFinder, Loader):
    """Asked last, after every finder that looks for files."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        warnings.warn(f"{name} is {MOVED[name]} now", DeprecationWarning, stacklevel=2)
        sys.modules[name] = importlib.import_module(MOVED[name])


sys.meta_path.append(Former())
