"""Calls of the system that fail, or are the last ones of a process."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import minibert.model.checkpoint
import minibert.train.loop


class Killed(BaseException):
    """From the moment that a process is killed on nothing is written, by no handler and no `finally` either."""


CALLS = [
    (os, "mkdir"), (os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (io, "open"),
    (shutil, "copyfile"), (minibert.model.checkpoint, "save_file"), (minibert.train.loop, "add_line"),
]  # fmt: skip


@contextmanager
def stopping_at(number: int, error: BaseException) -> Iterator[list[str]]:
    """All calls that change the disk, from that number on, end in an error; the first of them leaves a file torn."""
    calls: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **more: Any) -> Any:
            if name == "open" and not set("wax+") & set(str(arguments[1] if len(arguments) > 1 else "r")):
                return call(*arguments, **more)
            calls.append(name)
            if len(calls) < number:
                return call(*arguments, **more)
            if len(calls) == number and name in ("copyfile", "save_file"):
                Path(arguments[1]).write_bytes(b"torn")
            raise error

        return instead

    with pytest.MonkeyPatch.context() as patch:
        for place, name in CALLS:
            patch.setattr(place, name, counted(name, getattr(place, name)))
        yield calls
