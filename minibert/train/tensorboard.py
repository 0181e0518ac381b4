"""A run's log as TensorBoard reads it: event files, written without it.

A file is a row of records: length (uint64), its checksum, an Event, its checksum, all little-endian. A checksum is
CRC-32C (Castagnoli), rotated and shifted. (tensorflow/core/lib/io/record_writer.h; the messages are Protocol Buffers:
tensorflow/core/util/event.proto, tensorflow/core/framework/summary.proto.)
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

PREFIX = "events.out.tfevents."  # by which TensorBoard knows its files
VERSION = b"brain.Event:2"
SESSION_START = b"\x08\x01"  # SessionLog {status: START}
POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
numbers = itertools.count()  # of the files of this process


class EventFile:
    """A file in `folder` for a run that goes on with `step`: points of that step and later in older files are void."""

    def __init__(self, folder: Path, step: int) -> None:
        # TensorBoard reads files by name: the newest last, whatever the clock says.
        earlier = [path.name.removeprefix(PREFIX).partition(".")[0] for path in folder.glob(f"{PREFIX}*")]
        seconds = max([int(time.time()), *(int(stamp) + 1 for stamp in earlier if stamp.isdecimal())])
        name = f"{PREFIX}{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{next(numbers)}"
        self.path = folder / name
        self.add(0, message(3, VERSION))
        self.add(step, message(7, SESSION_START))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """A point for each number, under the names that transformers' Trainer gives: "train/loss", "eval/loss"."""
        points = [
            message(1, message(1, name.encode()) + b"\x15" + float32(value))
            for name, value in numbers_in(values).items()
        ]
        self.add(step, message(5, b"".join(points)))

    def add(self, step: int, content: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + b"\x10" + varint(step) + content
        length = struct.pack("<Q", len(event))
        with open(self.path, "ab") as file:
            file.write(length + checksum(length) + event + checksum(event))


def numbers_in(record: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of a record of the log, "loss" as "train/loss" and "eval_loss" as "eval/loss"."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }


@np.errstate(over="ignore")
def float32(value: float) -> bytes:
    return np.asarray(value, "<f4").tobytes()


def message(field: int, content: bytes) -> bytes:
    """A field of Protocol Buffers that holds bytes: a message or a text."""
    return varint(field << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    """A whole number from 0, seven bits a byte, the lowest first."""
    more = []
    while value > 127:
        more.append(value & 127 | 128)
        value >>= 7
    return bytes([*more, value])


def checksum(content: bytes) -> bytes:
    crc = crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(content: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in content:
        crc = TABLE[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _table_entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
    return value


TABLE = [_table_entry(byte) for byte in range(256)]
