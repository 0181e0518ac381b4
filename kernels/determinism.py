"""One switch: whether the CPU's results must have the same bits whatever the number of threads."""

from __future__ import annotations

_on = False


def deterministic() -> bool:
    """Whether it is on. `backends.set_deterministic` turns it, since BLAS has to be told as well."""
    return _on


def switch(on: bool) -> None:
    """Turn it, and nothing else."""
    global _on
    _on = bool(on)
