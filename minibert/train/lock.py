"""Locks on files, which the system gives free when a process ends in whatever way (Linux, macOS)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from minibert.errors import UserError


def locked(path: Path, wait: bool) -> int | None:
    """A lock on a file, held until the number is closed or the process ends; None where another holds it.

    Raises OSError where the file cannot be made, UserError on a system without such locks.
    """
    refuse_without_locks()
    from fcntl import LOCK_EX, LOCK_NB, flock

    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        flock(file, LOCK_EX if wait else LOCK_EX | LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError:
        os.close(file)
        raise
    return file


def refuse_without_locks() -> None:
    """Raise UserError on a system that has no such locks (Windows): before there is anything that needs them."""
    if importlib.util.find_spec("fcntl") is None:
        raise UserError("this needs file locks, of Linux or macOS: run it on one of them")
