"""What several commands share: how a list of backends and a number of threads are given, and where output goes."""

from __future__ import annotations

from rich.console import Console

from minibert import backends
from minibert.backends import Backend
from minibert.errors import UserError

console = Console()
notes = Console(stderr=True)  # progress and notes: standard output holds the result alone


def chosen_backends(names: str | None, threads: int | None) -> list[Backend]:
    """The backends of `a,b`, or every one that runs here. Raises UserError and BackendUnavailable."""
    if threads is not None:
        backends.set_num_threads(threads)
    if names is None:
        return [status.backend for status in backends.available() if status.backend is not None]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted or len(set(wanted)) != len(wanted):
        raise UserError(f"--backends: expected names such as numpy,numba, each once, got {names!r}")
    return [backends.get(name) for name in wanted]
