"""Where compiled code is kept: in a folder of the user's own, into which nobody else may write, for it is run."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

DIGEST = hashlib.sha256().digest_size


def cache_base() -> Path:
    """`$MINIBERT_CACHE_DIR`, else `minibert` in the user's cache directory. RuntimeError: there is no home."""
    if named := os.environ.get("MINIBERT_CACHE_DIR"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minibert"


def own_folder(folder: Path) -> Path:
    """Make a folder in `cache_base()`, for the user alone.

    Raises OSError where it cannot be made, belongs to another, or others may write into it or into the base.
    """
    base = cache_base()
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    demand_own(base)
    folder.mkdir(mode=0o700, exist_ok=True)
    demand_own(folder)
    if os.name == "posix" and folder.stat().st_mode & 0o077:  # made by an earlier version
        folder.chmod(0o700)
    return folder


def demand_own(folder: Path) -> None:
    """Raises PermissionError for a folder of another user, or into which others may write."""
    if os.name != "posix":
        return
    about = folder.stat()
    if about.st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to another user, number {about.st_uid}")
    if about.st_mode & 0o022:
        raise PermissionError(f"others may write into {folder}: chmod go-w {folder}")


def is_own(file: BinaryIO | Path) -> bool:
    """Whether a file that is open, or is there, belongs to the user: another's may hold anything."""
    if os.name != "posix":
        return True
    about = file.lstat() if isinstance(file, Path) else os.fstat(file.fileno())
    return about.st_uid == os.geteuid()


def sealed(content: bytes) -> bytes:
    """The content behind its SHA-256."""
    return hashlib.sha256(content).digest() + content


def read_sealed(path: Path) -> bytes:
    """What `sealed` was given.

    Raises OSError where the file cannot be read, ValueError where it is damaged or another user's.
    """
    with open(path, "rb") as file:
        if not is_own(file):
            raise ValueError(f"{path} belongs to another user")
        whole = file.read()
    if hashlib.sha256(whole[DIGEST:]).digest() != whole[:DIGEST]:
        raise ValueError(f"{path} is damaged")
    return whole[DIGEST:]
