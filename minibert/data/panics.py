"""Panics of the `tokenizers` library, which is written in Rust, as errors in one line."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from minibert.errors import UserError

STANDARD_ERROR = 2  # the file descriptor that Rust writes to
ONE_AT_A_TIME = threading.RLock()  # of two at once the first would give back what the second has taken


@contextmanager
def no_panic(what: str, silent: bool = False) -> Iterator[None]:
    """Raises UserError for a panic, which is no Exception, so that it would pass by who catches errors.

    Rust prints a message of its own before, of sixty lines where RUST_BACKTRACE is set. With `silent` it is not shown:
    whatever the process writes to its standard error meanwhile is held back and comes afterwards, so this is for what
    takes a moment.
    """
    try:
        with held_back() if silent else ExitStack():
            yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise UserError(f"{what}: {' '.join(str(error).split())}; use another tokenizer, or mend its files") from None


def is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


@contextmanager
def held_back() -> Iterator[None]:
    """Standard error goes into a file, and from there to where it went before; after a panic it does not."""
    with ONE_AT_A_TIME, ExitStack() as stack:
        try:
            sys.stderr.flush()
            before = os.dup(STANDARD_ERROR)
            stack.callback(os.close, before)
            held = stack.enter_context(tempfile.TemporaryFile())
            os.dup2(held.fileno(), STANDARD_ERROR)
        except (AttributeError, OSError, ValueError):  # there is no standard error, or no room for a file
            yield
            return
        keep = True
        try:
            yield
        except BaseException as error:
            keep = not is_panic(error)
            raise
        finally:
            sys.stderr.flush()
            os.dup2(before, STANDARD_ERROR)
            held.seek(0)
            if keep:
                os.write(STANDARD_ERROR, held.read())
