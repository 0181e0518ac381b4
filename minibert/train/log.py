"""The log of a run: a JSON object a line, added as it comes; the record, of which other forms are views."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minibert.errors import UserError
from minibert.model.checkpoint import write_atomically

LOG = "training_log.jsonl"
Record = dict[str, Any]


def add_line(folder: Path, record: Record) -> None:
    """Add a record to the log in `folder`.

    JSON has no NaN and no infinity: such a number is null, and "nonfinite" is true.
    """
    try:
        line = json.dumps(record, allow_nan=False)
    except ValueError:
        line = json.dumps({**finite(record), "nonfinite": True}, allow_nan=False)
    with open(folder / LOG, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def finite(value: Any) -> Any:
    """The same, with None for each number that is not finite."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(folder: str | Path) -> list[Record]:
    """The records of the log in `folder`, each with its "step". A last line that was cut short is left out.

    Raises UserError, naming the line, for any other that is no record.
    """
    return [record for _, record in lines(Path(folder) / LOG)]


def forget_after(folder: Path, step: int) -> None:
    """Drop lines of steps that will be done again, and one that was cut short. Raises UserError as `read_log`."""
    path = folder / LOG
    if path.is_file():
        kept = b"".join(line for line, record in lines(path) if record["step"] <= step)
        if kept != path.read_bytes():
            write_atomically(path, lambda file: file.write_bytes(kept))


def lines(path: Path) -> Iterator[tuple[bytes, Record]]:
    """The whole lines of a log, and what each says."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    whole = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(keepends=True), 1):
        try:
            record = json.loads(line.decode("utf-8"))
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise UserError(
                f"{path}, line {number} is no record of a step: mend or remove it, or move the file away"
            ) from None
        yield line, record
