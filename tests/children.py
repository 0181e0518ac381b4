"""Processes that tests start and send signals to."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def child(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process, with its output as text, in a group of its own, which is killed at the end: after ten minutes at most.

    It takes interrupts, even where the tests run in the background of a shell that has SIGINT ignored there: a signal
    that is ignored stays so in a child, one that is handled does not.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, text=True, start_new_session=True, **options)
    finally:
        signal.signal(signal.SIGINT, before)

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    limit = threading.Timer(600, kill)
    limit.start()
    try:
        with process:
            try:
                yield process
            finally:
                kill()
    finally:
        limit.cancel()
