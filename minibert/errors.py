"""What is the user's to mend (the command line prints an error in one line, exit code 2), to know of, or to install."""

import errno
import os
import sys
import warnings
from pathlib import Path
from shlex import quote
from typing import Any

DISTRIBUTION = "minibert-lab"  # on the package index `minibert` is somebody else's package


class UserError(ValueError):
    """Bad input. The message says what was expected, what came and what to do."""

    exit_code = 2  # of a command that it ends


class WriteError(UserError):
    """Something could not be written: no mistake of who asked."""

    exit_code = 1


class Interrupted(BaseException):
    """A signal asked this process to end: raised where there is nothing to finish first, and caught by nobody else."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As shells have it."""
        return 128 + self.number


def path_of(given: Any, expected: str) -> Path:
    """A path that was given. Raises UserError for what is none, or longer than the system can look up."""
    if not isinstance(given, str | os.PathLike):
        raise UserError(f"expected {expected}, got {type(given).__name__}: give its path")
    path = Path(given)
    try:
        path.exists()
    except OSError as error:  # what is only not there raises nothing
        said = f"{str(path)[:60]}... is too long" if error.errno == errno.ENAMETOOLONG else f"{path}: {error.strerror}"
        raise UserError(f"expected {expected}, but {said}: check the path") from None
    return path


def warn(message: str) -> None:
    """A UserWarning at the line outside this package that called into it, however deep in here it is raised."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "minibert":
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=depth + 1)


def pip_install(*what: str) -> str:
    """The command that installs extras of this package, as in `pip_install("[report]")`, or other packages.

    Whatever advises to install something takes its words from here.
    """
    return " ".join(["pip install", *(quote(f"{DISTRIBUTION}{one}" if one.startswith("[") else one) for one in what)])
