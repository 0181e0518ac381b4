"""Where an exception came from in the code of whoever wrote the kernel."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

import minibert
from minibert import backends, kernels
from minibert.errors import UserError

KERNELS = str(Path(str(kernels.__file__)).parent)
OURS = (str(Path(str(minibert.__file__)).parent), str(Path(str(backends.__file__)).parent), KERNELS)
LIBRARIES = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))


def is_writers(filename: str) -> bool:
    """Whether a file is neither of this package nor of a library."""
    return not filename.startswith(OURS) and all(one not in filename for one in LIBRARIES)


def writers_line(error: BaseException) -> traceback.FrameSummary | None:
    """The last line of a user's own that an exception passed, else the last of a kernel's file here; None: neither.

    Of a UserError that tells of another exception, that other's.
    """
    cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if not f.filename.startswith("<")]
    theirs = [f for f in frames if is_writers(f.filename)]
    return next(reversed(theirs or [f for f in frames if f.filename.startswith(KERNELS)]), None)


def raised_at(error: BaseException) -> str:
    """`, at mine.py:7: in softmax`, to go behind what was raised; empty where no such line is known.

    What the emulator finds is known only later, when somebody waits for the device, and has places of its own.
    """
    at = None if hasattr(error, "findings") else writers_line(error)
    return "" if at is None else f", at {os.path.relpath(at.filename)}:{at.lineno}: in {at.name}"


def what_raised(error: BaseException) -> str:
    """What an exception out of a kernel says, and where it came from; a UserError tells both itself."""
    return str(error) if isinstance(error, UserError) else f"raised {type(error).__name__}: {error}{raised_at(error)}"
