"""Checkpoints of a run: folders `checkpoint-N` in its output, N the step, each of them whole or not there.

A checkpoint holds all that belongs together after a step: the state to resume from, the log so far, and the files that
stand at the top of the output. It is written into a hidden folder beside, each file forced to the disk, the manifest
last (size and SHA-256 of each file), and only then given its name. After that the files at the top are made to agree
with it, one by one, each replaced whole: so a process that is killed at any instruction leaves the checkpoint before or
this one, and whoever resumes takes everything from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minibert.errors import UserError, WriteError, warn
from minibert.model.checkpoint import read_arrays, read_json, sync, write_atomically
from minibert.train.config import OptimizationConfig, TrainingConfig
from minibert.train.lock import locked, refuse_without_locks
from minibert.train.log import LOG
from minibert.train.parts import PARTS
from minibert.train.tensorboard import PREFIX

STATE = "trainer_state.safetensors"
MANIFEST = "manifest.json"
LOCK = ".lock"
FORMAT = 1  # of a checkpoint
NAME = re.compile(r"checkpoint-(\d{1,18})")
PARTIAL = ".partial"  # ends the name of a checkpoint that is being written, or removed
MODEL_FILES = ("*.safetensors", "*config*.json", "modules.json", "tokenizer.json", "vocab.txt")


class State(NamedTuple):
    """A run as it was saved: its config, what else was asked for (`options`), how far it came, weights and moments."""

    config: Any  # of the kind that was asked for
    options: dict[str, Any]
    progress: dict[str, Any]
    arrays: dict[str, np.ndarray]
    folder: Path  # the checkpoint; of a run from before there were any, its output
    broken: tuple[str, ...] = ()  # newer checkpoints that cannot be read


# -------------------------------------------------------------------------------------------------------------- reading


def read_state(folder: str | Path, kind: type[OptimizationConfig] = TrainingConfig) -> State:
    """The newest state of the run in the output `folder`, which has such a config.

    It is that of the newest checkpoint that is whole: a warning names each newer one, and what is wrong with it. Runs
    from before there were checkpoints have one state, at the top. Raises UserError where none can be read.
    """
    folder = Path(folder)
    broken: dict[str, str] = {}
    for checkpoint in checkpoints(folder):
        if (wrong := fault(checkpoint)) is None:
            for name, why in broken.items():
                warn(f"{folder / name} is broken, so it is {checkpoint.name} that is resumed: {why}")
            return state_in(checkpoint, kind)._replace(broken=tuple(broken))
        broken[checkpoint.name] = wrong
    if broken:
        told = "; ".join(f"{name}: {why}" for name, why in broken.items())
        raise UserError(f"no checkpoint in {folder} is whole: {told}. Begin a new run")
    if (folder / STATE).is_file():
        return state_in(folder, kind)
    if (folder / LOCK).is_file() and is_unbegun(folder):
        raise UserError(
            f"nothing to resume in {folder}: its run was stopped before the first checkpoint; begin it again, without "
            "--resume"
        )
    raise UserError(f"nothing to resume in {folder}: expected a checkpoint-N, as a run writes it into its --output")


def state_in(folder: Path, kind: type[OptimizationConfig]) -> State:
    """The state in one folder."""
    path = folder / STATE
    arrays, metadata = read_arrays(path)
    try:
        about = json.loads(metadata["trainer_state"])
        config = about["config"]
        strange = config.keys() - {field.name for field in fields(kind)}
        if strange:
            raise TypeError(f"its setting {min(strange)} is another command's or another version's")
        if "format" not in about and config["warmup_steps"] == 0:
            config["warmup_steps"] = None  # before there was a format, 0 said "not given"
        return State(kind(**config), dict(about["options"]), checked_progress(about["progress"]), arrays, folder)
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no state of such a run ({error}): begin a new run") from None


def checked_progress(progress: dict[str, Any]) -> dict[str, Any]:
    """The same. Raises KeyError, TypeError or ValueError where it lacks a number that each run goes on with."""
    best = progress.get("best") or {}  # of fine-tuning, its figures or None for one that is not defined
    later = [progress[name] for name in ("save_seconds", PARTS, "evaluations_since") if name in progress]
    figures = [value for value in best.values() if value is not None]
    needed = [progress[name] for name in ("step", "tokens", "seconds", "fingerprint")]
    for number in (*needed, *later, *progress["since"].values(), *figures):
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= abs(number) < float("inf"):
            raise ValueError(f"its progress has {number!r} for a number")
    if index(progress["step"]) < 0 or index(progress["fingerprint"]) < 0 or index(best.get("step", 0)) < 0:
        raise ValueError("its step or its fingerprint is negative")
    if index(progress.get(PARTS, 1)) < 1:
        raise ValueError(f"its progress has {progress[PARTS]} {PARTS}")
    return progress


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first, whole or not."""
    found = [path for path in output.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def is_resumable(output: Path) -> bool:
    """Whether there is a checkpoint, or the state of an older run."""
    return bool(checkpoints(output)) or (output / STATE).is_file()


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None where every file is as its manifest says."""
    try:
        files = manifest(checkpoint)
        for name, (size, digest) in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes, not {size:,}"
            if digest_of(path) != digest:
                return f"{name} is damaged: its SHA-256 is not that of {MANIFEST}"
    except (OSError, UserError) as error:
        return str(error)
    return None if STATE in files else f"{MANIFEST} lists no {STATE}"


def manifest(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file of a checkpoint. Raises UserError where there is no such list."""
    content = read_json(checkpoint / MANIFEST)
    if content.get("format") != FORMAT:
        raise UserError(f"{MANIFEST} has the format {content.get('format')}, and {FORMAT} is known here")
    try:
        files = {str(name): (int(about["size"]), str(about["sha256"])) for name, about in content["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{MANIFEST} is no list of files") from None
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{MANIFEST} names the file {name!r}, which is outside")
    return files


def model_files(folder: Path) -> list[str]:
    """What a checkpoint holds for the top of the output, the log aside; of an older run what is there."""
    if (folder / MANIFEST).is_file():
        return [name for name in manifest(folder) if name not in (STATE, LOG)]
    found = {path.relative_to(folder) for pattern in MODEL_FILES for path in folder.rglob(pattern)}
    return sorted(path.as_posix() for path in found if path.name != STATE and path.parts[0] != "wandb")


def digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------------------------------------------------- writing


def write_checkpoint(output: Path, step: int, fill: Callable[[Path], Any]) -> Path:
    """Let `fill` write the files of a step into a folder, and give it the name once all of them are on the disk.

    Raises OSError, or UserError, where something cannot be written; then nothing has changed.
    """
    final = output / f"checkpoint-{step}"
    if final.exists() and fault(final) is None:  # what follows a step is always the same
        return final
    partial = output / f".{final.name}{PARTIAL}"
    remove(partial)
    os.mkdir(partial)
    try:
        fill(partial)
        files = {}
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            sync(path)
            about = {"size": path.stat().st_size, "sha256": digest_of(path)}
            files[path.relative_to(partial).as_posix()] = about
        text = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=2) + "\n"
        write_atomically(partial / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))
        for path in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
            sync(path)
        remove(final)  # a broken one
        os.rename(partial, final)
        sync(output)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk has its room again
        raise
    return final


def publish(checkpoint: Path, output: Path, but: Sequence[str] = ()) -> None:
    """Make the files at the top of the output, `but` some, those of a checkpoint: each is replaced whole, if at all."""
    for name, (size, digest) in manifest(checkpoint).items():
        target = output / name
        same = target.is_file() and target.stat().st_size == size and digest_of(target) == digest
        if name in (STATE, *but) or same:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, lambda path, name=name: shutil.copyfile(checkpoint / name, path))  # type: ignore[misc]


def keep_only(output: Path, newest: Path, count: int) -> None:
    """Remove all checkpoints but `newest` and those before it, `count` in all. Those after it were broken."""
    before = [path for path in checkpoints(output) if step_of(path) <= step_of(newest)]
    for path in checkpoints(output):
        if path not in before[:count]:
            remove(path)


def remove(folder: Path) -> None:
    """Remove a checkpoint: it loses its name first, so that no part of one is taken for one."""
    if folder.name.endswith(PARTIAL):
        if folder.exists():
            shutil.rmtree(folder)
    elif folder.exists():
        hidden = folder.with_name(f".{folder.name}.removed{PARTIAL}")
        remove(hidden)
        os.rename(folder, hidden)
        remove(hidden)


def remove_partial(output: Path) -> None:
    """Remove what a process left that was killed while it wrote."""
    for path in output.glob(f".*{PARTIAL}"):
        remove(path) if path.is_dir() else path.unlink()


# ----------------------------------------------------------------------------------------------------------- the output


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """No other run writes into the folder meanwhile. Raises UserError where one does."""
    try:
        lock = locked(output / LOCK, wait=False)
    except OSError as error:
        raise WriteError(f"cannot write into {output}: {error}; choose another --output") from None
    if lock is None:
        raise UserError(f"another run is writing into {output}: wait until it has ended, or name another --output")
    try:
        yield
    finally:
        os.close(lock)


def refuse_to_overwrite(output: Path) -> None:
    """Raise UserError for a folder that holds something already: a run begins in one of its own.

    Raises WriteError where it could not be written into, which would show only once the text has been read.
    """
    refuse_without_locks()
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: name a folder for the output")
    if output.is_dir() and not is_unbegun(output):
        resumable = is_resumable(output)
        mend = "go on with the run in it by --resume (Trainer.resume), or name another" if resumable else "name another"
        raise UserError(f"the output folder {output} is not empty: {mend}")
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"cannot write into {output}: {there} is a file; choose another --output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise WriteError(f"cannot write into {output}: {there} is read-only for you; choose another --output")


def is_unbegun(output: Path) -> bool:
    """Whether there is nothing but what a run writes before its first checkpoint."""
    names = {path.name for path in output.iterdir()}
    return not names or (
        LOCK in names
        and all(name in (LOCK, LOG) or name.startswith(PREFIX) or name.endswith(PARTIAL) for name in names)
    )


def require_room(output: Path, size: int) -> None:
    """Raises WriteError where fewer than `size` bytes are free for the checkpoints of a run."""
    free = shutil.disk_usage(output).free
    if free < size:
        raise WriteError(
            f"{output}: the checkpoints of this run need {megabytes(size)}, and {megabytes(free)} are free: make room, "
            "or name another --output"
        )


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
