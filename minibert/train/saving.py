"""Checkpoints of a run, written by another thread while training goes on: never more than one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minibert.errors import UserError, WriteError, warn
from minibert.model.checkpoint import Write, sync, write_arrays, write_atomically
from minibert.train.checkpoint import STATE, checkpoints, keep_only, megabytes, publish, step_of, write_checkpoint
from minibert.train.log import LOG


class Copied(NamedTuple):
    """What makes a checkpoint, as it was between two steps."""

    step: int
    arrays: Mapping[str, np.ndarray]  # of the state
    about: str  # JSON beside them
    files: Mapping[str, Write]  # of the model, by name
    log_size: int  # bytes of the log, which grows
    keep: int  # how many checkpoints there may be then


class CheckpointWriter:
    """Of the run in the folder `output`. A checkpoint needs so many bytes as `room` says."""

    def __init__(self, output: Path, room: Callable[[], int]) -> None:
        self.output, self.room = output, room
        self.pool: ThreadPoolExecutor | None = None  # of one thread; whoever sets it waits for it
        self.saved: Path | None = None  # where the run was last written, or resumed from
        self.broken: tuple[str, ...] = ()  # checkpoints that were passed over then
        self.unwritten: Mapping[str, Write] = {}  # of the model in a checkpoint that could not be written
        self._flying: tuple[int, Mapping[str, Write], Future[Path]] | None = None

    @property
    def step(self) -> int | None:
        """That of the last checkpoint, written or in flight; None if there is none."""
        if self._flying is not None:
            return self._flying[0]
        return step_of(self.saved) if self.saved else None

    @contextmanager
    def telling(self, step: int) -> Iterator[None]:
        """Tell what cannot be written in one line, with the room that is needed and what is safe."""
        try:
            yield
        except (OSError, UserError) as error:
            whole = [path for path in checkpoints(self.output) if path.name not in self.broken]
            last = f"{whole[0].name} is whole: --resume goes on from there" if whole else "there is no checkpoint"
            raise WriteError(
                f"step {step}: cannot write into {self.output}: {error}; a checkpoint needs {megabytes(self.room())} "
                f"of room; {last}"
            ) from None

    def begin(self, copy: Callable[[], Copied], step: int) -> None:
        """Copy it, and have it written; `settle` first, which tells of a copy that fails too."""
        assert self.pool is not None and self._flying is None
        files: Mapping[str, Write] = {}
        try:
            with self.telling(step):
                copied = copy()
            files = copied.files
            future = self.pool.submit(self._write, copied)
        except WriteError as error:
            future = Future()
            future.set_exception(error)
        self._flying = step, files, future

    def settle_if_done(self, fatal: bool) -> None:
        """`settle`, where nothing is to be waited for."""
        if self._flying is not None and self._flying[2].done():
            self.settle(fatal)

    def settle(self, fatal: bool) -> None:
        """Wait for the checkpoint in flight. One that failed is a warning, or raises WriteError where that is fatal."""
        if self._flying is None:
            return
        (_, files, future), self._flying = self._flying, None
        try:
            self.saved = future.result()
            self.broken, self.unwritten = (), {}
        except WriteError as error:
            self.unwritten = files or self.unwritten
            if fatal:
                raise
            warn(f"{error}; the run goes on, and saves again (--save-errors fatal ends it)")

    def _write(self, copied: Copied) -> Path:
        """In the other thread: write it, make the top of the folder agree, and remove checkpoints that are too many."""

        def fill(folder: Path) -> None:
            write_arrays(folder / STATE, copied.arrays, {"trainer_state": copied.about})
            sync(self.output / LOG)
            with open(self.output / LOG, "rb") as log:
                (folder / LOG).write_bytes(log.read(copied.log_size))
            for name, write in copied.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / name, write)

        with self.telling(copied.step):
            saved = write_checkpoint(self.output, copied.step, fill)
            publish(saved, self.output, but=(LOG,))
            (self.output / STATE).unlink(missing_ok=True)  # of a run from before there were checkpoints
            keep_only(self.output, saved, copied.keep)
        return saved
