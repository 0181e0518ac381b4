"""What is the user's to mend (the command line prints an error in one line and exits with 2), or to know of."""

import sys
import warnings


class UserError(ValueError):
    """Bad input. The message says what was expected, what came and what to do."""


def warn(message: str) -> None:
    """A UserWarning at the line outside this package that called into it, however deep in here it is raised."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "minibert":
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=depth + 1)
