"""Calls of the system that fail, or are the last ones of a process."""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import minibert.model.checkpoint
import minibert.train.checkpoint
import minibert.train.loop
import minibert.train.saving
from minibert.train.log import LOG


class Killed(BaseException):
    """From the moment that a process is killed on nothing is written, by no handler and no `finally` either."""


CALLS = [
    (os, "mkdir"), (os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (io, "open"),
    (shutil, "copyfile"), (minibert.model.checkpoint, "save_file"), (minibert.train.loop, "add_line"),
]  # fmt: skip


@contextmanager
def stopping_at(
    number: int, error: BaseException | Callable[[], Any], lasting: bool = True
) -> Iterator[list[str]]:  # fmt: skip
    """The call of that number that changes the disk ends in an error, or in a call, and leaves a file torn.

    With `lasting` so do all later ones. Yields the names of the calls, as they come.
    """
    calls: list[str] = []
    counting = threading.Lock()  # a run writes by two threads

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **more: Any) -> Any:
            if name == "open" and not set("wax+") & set(str(arguments[1] if len(arguments) > 1 else "r")):
                return call(*arguments, **more)
            with counting:
                calls.append(name)
                here = len(calls)
            if here < number or (here > number and not lasting):
                return call(*arguments, **more)
            if here == number and name in ("copyfile", "save_file"):
                Path(arguments[1]).write_bytes(b"torn")
            if here == number and name == "add_line":
                with open(arguments[0] / LOG, "ab") as log:
                    log.write(b'{"step": 1, "lo')
            if isinstance(error, BaseException):
                raise error
            return error()

        return instead

    with pytest.MonkeyPatch.context() as patch:
        for place, name in CALLS:
            patch.setattr(place, name, counted(name, getattr(place, name)))
        yield calls


def failing(monkeypatch: pytest.MonkeyPatch, *steps: int) -> list[int]:
    """Checkpoints of these steps find the disk full. Returns those that were tried."""
    tried: list[int] = []
    write = minibert.train.checkpoint.write_checkpoint

    def instead(output: Path, step: int, fill: Callable[[Path], Any]) -> Path:
        tried.append(step)
        if step in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(output, step, fill)

    monkeypatch.setattr(minibert.train.saving, "write_checkpoint", instead)
    return tried
