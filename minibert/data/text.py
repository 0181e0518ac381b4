"""Plain text files to documents of sentences.

UTF-8. Every file begins a new document; what separates the documents within one is a `document_separator`:

    two-blank-lines  one blank line separates paragraphs, and a line break within them is a space (the default)
    blank-line       a sentence a line, as Google's BERT takes its text
    line             a document a line
    file             nothing does: each file is one document
    any other text   a line that reads so, as <|endoftext|>; between them as for two-blank-lines

Where lines are not sentences, sentences are found; none crosses a paragraph's end.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path

from minibert.errors import UserError

Document = list[str]  # its sentences, in order
AnyPath = str | PathLike[str]

SHIPPED_TEXT = Path(__file__).resolve().parent.parent / "assets" / "state_of_the_union.txt"

PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n\s*")  # a blank line, or more
TWO_BLANK_LINES, BLANK_LINE = "two-blank-lines", "blank-line"
SEPARATORS: dict[str, Callable[[str], list[str]]] = {
    TWO_BLANK_LINES: re.compile(r"\n[^\S\n]*\n[^\S\n]*\n\s*").split,
    BLANK_LINE: PARAGRAPH_END.split,
    "line": lambda text: text.split("\n"),
    "file": lambda text: [text],
}
# A run of marks is entered at its first and never in part: else a line of dots takes the square of its length.
SENTENCE_END = re.compile(
    r"""(?P<mark>(?<![.!?])[.!?]++)["'”’)\]]*\s+(?=["'“‘(\[]*(?P<next>[^\W_]))"""  # a mark, a space, a first letter
    r"""|[。！？]+[”’」』）]*"""  # Chinese and Japanese put no space
)
# A full stop after these, or after a single letter (J. Smith, the U.S. Senate), is not taken for the end of a sentence.
ABBREVIATION = re.compile(
    "Mr|Mrs|Ms|Messrs|Dr|Prof|Hon|Rev|Gen|Col|Capt|Lt|Maj|Sgt|Adm|Gov|Sen|Rep|St|Mt|Ft|Jr|Sr|No|Nos|Art|Sec|vs|viz|cf|"
    "Jan|Feb|Mar|Apr|Aug|Sept|Oct|Nov|Dec|[^\\W\\d_]"
)
LAST_WORD = re.compile(r"[^\W\d_]+$")
WORD = re.compile(r"[^\W_]")

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


def read_documents(paths: AnyPath | Iterable[AnyPath], document_separator: str = TWO_BLANK_LINES) -> list[Document]:
    """The documents of one or several text files, each a list of sentences.

    Warns of a file without a word. Raises UserError for one that is missing, a folder, unreadable or not plain UTF-8,
    where no file has a word, and where no line reads as a `document_separator` that is to be a line.
    """
    paths = [paths] if isinstance(paths, str | PathLike) else list(paths)
    documents: list[Document] = []
    wordless: list[AnyPath] = []
    separated = document_separator in SEPARATORS
    for path in paths:
        text = read_text(path)
        found = list(documents_of(text, document_separator))
        documents += found
        wordless += [] if found else [path]
        separated = separated or separator_line(document_separator).search(text) is not None
    if paths and not documents:
        raise UserError(f"{named(paths)} has no words in it: expected plain text")
    if not separated:
        raise UserError(
            f"no line of {named(paths)} reads {document_separator!r}: expected {', '.join(SEPARATORS)}, or what the "
            "line between two documents reads"
        )
    for path in wordless:
        warnings.warn(f"{path} has no words in it: passed over", stacklevel=2)
    return documents


def named(paths: list[AnyPath]) -> str:
    return ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def separator_line(reads: str) -> re.Pattern[str]:
    """A line that reads so, spaces around it aside. Raises UserError where that is no line or a blank one."""
    if not reads.strip() or "\n" in reads:
        raise UserError(f"document separator: expected {', '.join(SEPARATORS)}, or what a line reads, got {reads!r}")
    return re.compile(rf"^[^\S\n]*{re.escape(reads.strip())}[^\S\n]*$", re.MULTILINE)


def read_text(path: AnyPath) -> str:
    """One file's text, line ends made `\\n`, byte order marks left out: where files were joined they stand within."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"expected a text file, but {path} is a folder: name the files in it")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no text file {path}: check the path") from None
    except OSError as error:
        raise UserError(f"cannot read the text file {path}: {error.strerror}") from None
    for beginning, what in NOT_TEXT.items():
        if content.startswith(beginning):
            raise UserError(f"expected plain text, but {path} is {what}")
    text = decode(content, path)
    if "\0" in text:  # UTF-16 without a byte order mark decodes as UTF-8, every other character a NUL
        raise not_utf8(path, f"byte {content.index(0)} is NUL")
    return text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")


def decode(content: bytes, path: Path) -> str:
    """UTF-8, a byte order mark dropped. Raises UserError naming the first byte that is not."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + 3 * content.startswith(b"\xef\xbb\xbf")  # the codec does not count a byte order mark
        raise not_utf8(path, f"byte {offset} (0x{content[offset]:02x}) is not") from None


def not_utf8(path: Path, what: str) -> UserError:
    return UserError(f"expected UTF-8 in {path}, but {what}: convert it, iconv -f ENCODING -t UTF-8 {path} > new.txt")


def documents_of(text: str, separator: str = TWO_BLANK_LINES) -> Iterator[Document]:
    """The documents of one text; those without a word are passed over."""
    cut = SEPARATORS[separator] if separator in SEPARATORS else separator_line(separator).split
    for document in cut(text):
        if separator == BLANK_LINE:
            sentences = [" ".join(line.split()) for line in document.split("\n") if WORD.search(line)]
        else:
            sentences = [s for paragraph in PARAGRAPH_END.split(document) for s in split_sentences(paragraph)]
        if sentences:
            yield sentences


def split_sentences(paragraph: str) -> list[str]:
    """Cut after . ! ? where a space and no lower-case letter follow, abbreviations and initials excepted.

    Rough by design: a wrong cut costs a sequence a little context, nothing else.
    """
    paragraph = " ".join(paragraph.split())
    sentences, start = [], 0
    for match in SENTENCE_END.finditer(paragraph):
        if match["mark"] and (match["next"].islower() or is_abbreviation(paragraph, match)):
            continue
        sentences.append(paragraph[start : match.end()].strip())
        start = match.end()
    sentences.append(paragraph[start:].strip())
    return [s for s in sentences if WORD.search(s)]


def is_abbreviation(text: str, match: re.Match[str]) -> bool:
    """Whether the full stop at `match` belongs to the word before it."""
    word = LAST_WORD.search(text, max(0, match.start() - 16), match.start())
    return match["mark"] == "." and word is not None and ABBREVIATION.fullmatch(word[0]) is not None
