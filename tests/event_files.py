"""A decoder of TensorBoard's event files of its own, and the points that a log holds."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minibert.train import read_log
from minibert.train.tensorboard import PREFIX


def checked(content: bytes, stated: bytes) -> bytes:
    """Bit by bit, as the definition of CRC-32C has it: division by the polynomial 0x1EDC6F41, bits reflected."""
    crc = 0xFFFFFFFF
    for byte in content:
        for bit in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if (crc ^ (byte >> bit)) & 1 else 0)
    crc ^= 0xFFFFFFFF
    rotated = (crc >> 15) | (crc << 17) & 0xFFFFFFFF
    assert struct.pack("<I", (rotated + 0xA282EAD8) % 2**32) == stated
    return content


def number_at(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return value, place


def fields_of(content: bytes) -> dict[int, list[Any]]:
    """The fields of a message, by number: varints, doubles, floats, bytes."""
    found: dict[int, list[Any]] = {}
    place = 0
    while place < len(content):
        key, place = number_at(content, place)
        value: Any
        if key & 7 == 0:
            value, place = number_at(content, place)
        elif key & 7 == 1:
            (value,), place = struct.unpack_from("<d", content, place), place + 8
        elif key & 7 == 5:
            (value,), place = struct.unpack_from("<f", content, place), place + 4
        else:
            assert key & 7 == 2
            size, place = number_at(content, place)
            value, place = content[place : place + size], place + size
        found.setdefault(key >> 3, []).append(value)
    return found


def events_in(path: Path) -> Iterator[dict[int, list[Any]]]:
    content, place = path.read_bytes(), 0
    while place < len(content):
        head, stated = content[place : place + 8], content[place + 8 : place + 12]
        (size,), place = struct.unpack("<Q", checked(head, stated)), place + 12
        yield fields_of(checked(content[place : place + size], content[place + size : place + size + 4]))
        place += size + 4


def points_in(path: Path) -> tuple[int, dict[str, list[tuple[int, float]]]]:
    """The step that a file begins with, and its points."""
    version, start, *rest = events_in(path)
    assert version[3] == [b"brain.Event:2"] and abs(version[1][0] - path.stat().st_mtime) < 600
    assert fields_of(start[7][0]) == {1: [1]}, "SessionLog START"
    points: dict[str, list[tuple[int, float]]] = {}
    for event in rest:
        for value in fields_of(event[5][0])[1]:
            of = fields_of(value)
            points.setdefault(of[1][0].decode(), []).append((event[2][0], of[2][0]))
    return start[2][0], points


def event_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{PREFIX}*"))


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The points that the log in JSON lines holds."""
    points: dict[str, list[tuple[int, float]]] = {}
    for record in read_log(folder):
        for name, value in record.items():
            if name != "step":
                tag = name.replace("eval_", "eval/", 1) if name.startswith("eval_") else f"train/{name}"
                points.setdefault(tag, []).append((record["step"], float(np.float32(value))))
    return points
