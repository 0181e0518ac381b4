"""Lines of UTF-8 text, as they are read: a file may be longer than memory, or be what another program still writes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from minibert.errors import UserError

AnyPath = str | PathLike[str]
Source = AnyPath | BinaryIO  # a file's path, or a binary stream such as sys.stdin.buffer

NOT_A_BYTE = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is no UTF-8

# What a file begins with that is no text as it stands, and what to do with it.
NOT_TEXT = {
    b"\x1f\x8b": "compressed by gzip: gunzip it first",
    b"BZh91AY&SY": "compressed by bzip2: bunzip2 it first",
    b"\xfd7zXZ\0": "compressed by xz: unxz it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unzstd it first",
    b"PK\x03\x04": "a zip archive or an office document: unpack it, or save it as plain text",
    b"%PDF-": "a PDF: take the text out of it first, as pdftotext does",
    b"PAR1": "Parquet: write its column of text to a plain text file first",
}


def name_of(source: Source) -> str:
    """What a message calls a source: its path, or a stream's name without the brackets of `<stdin>`."""
    if isinstance(source, str | PathLike):
        return str(source)
    return str(getattr(source, "name", "the input")).strip("<>")


def text_lines(source: Source) -> Iterator[str]:
    """The lines of a file, each ending in `\\n` but perhaps the last; a byte order mark is left out.

    Raises UserError for a file that cannot be read, and naming the line that is no UTF-8 or holds a NUL.
    """
    name = name_of(source)
    if not isinstance(source, str | PathLike):
        yield from decoded_lines(source, name)
        return
    path = Path(source)
    if path.is_dir():
        raise UserError(f"expected a file, but {path} is a folder: name a file in it")
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"no file {path}: check the path") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    with stream:
        yield from decoded_lines(stream, name)


def decoded_lines(stream: BinaryIO, name: str) -> Iterator[str]:
    """The lines of a binary stream, which is left open."""
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline=None)
    try:
        for number, line in enumerate(text, 1):
            if number == 1:
                beginning = line[:16].encode("utf-8", "surrogateescape")
                for mark, what in NOT_TEXT.items():
                    if beginning.startswith(mark):
                        raise UserError(f"expected plain text, but {name} is {what}")
                line = line.removeprefix("\ufeff")
            if found := NOT_A_BYTE.search(line):
                raise not_utf8(Path(name), f"line {number} has the byte 0x{ord(found[0]) - 0xDC00:02x}")
            if "\0" in line:  # UTF-16 without a byte order mark reads as UTF-8, every other character a NUL
                raise not_utf8(Path(name), f"line {number} has a NUL")
            yield line
    except IsADirectoryError:
        raise UserError(f"expected a file, but {name} is a folder: name a file in it") from None
    finally:
        if not stream.closed:  # by who gave it, before a reader of its first lines was forgotten
            text.detach()


def decode(content: bytes, path: Path) -> str:
    """UTF-8, a byte order mark dropped. Raises UserError naming the first byte that is not."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + 3 * content.startswith(b"\xef\xbb\xbf")  # the codec does not count a byte order mark
        raise not_utf8(path, f"byte {offset} (0x{content[offset]:02x}) is not") from None


def not_utf8(path: Path, what: str) -> UserError:
    return UserError(f"expected UTF-8 in {path}, but {what}: convert it, iconv -f ENCODING -t UTF-8 {path} > new.txt")
