"""Code of a user's own, named as FILE.py:NAME or package.module:NAME: backends, and kernels on trial."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from minibert.backends.base import Backend, BackendUnavailable
from minibert.errors import UserError


def module_name(place: str) -> str:
    """What `mypkg.backends` or `folder/mine.py` is called once it is imported: a file takes no library's name."""
    return f"own_{Path(place).stem}" if place.endswith(".py") else place


def own_module(place: str) -> ModuleType:
    """Import a module, or run a file (each time anew) as one; both are looked for from the current folder.

    Raises FileNotFoundError for a file that is not there, and whatever that code raises.
    """
    if not place.endswith(".py"):
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
        return importlib.import_module(place)
    path = Path(place).resolve()
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    spec = importlib.util.spec_from_file_location(module_name(place), path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def defined_in(module: ModuleType) -> str:
    """The public functions and classes that a module defines itself, for a message."""
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
    return ", ".join(name for name in own if not name.startswith("_") and callable(getattr(module, name))) or "none"


def described(error: BaseException) -> str:
    """What another's code raised, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def own_backend(spec: str) -> Backend:
    """The backend that FILE.py:NAME or package.module:NAME names: an instance, or what gives one when it is called.

    Raises UserError where there is none, and BackendUnavailable where it says that it cannot run here.
    """
    place, _, attribute = spec.rpartition(":")
    try:
        module = own_module(place)
        if not hasattr(module, attribute):
            raise UserError(f"backend {spec}: {place} has no {attribute!r}; it defines {defined_in(module)}")
        found = getattr(module, attribute)
        if callable(found) and not isinstance(found, Backend):
            place = f"{attribute}()"
            found = found()
    except (UserError, BackendUnavailable):
        raise
    except (Exception, SystemExit) as error:  # whatever another's code does: it is theirs to mend
        did = "raised" if place.endswith("()") else "cannot be imported:"
        raise UserError(f"backend {spec}: {place} {did} {described(error)}") from error
    if not isinstance(found, Backend):
        raise UserError(f"backend {spec}: expected a minibert.backends.Backend, got {type(found).__name__}")
    return found
