"""Plain text files to documents of sentences.

The convention: UTF-8; two or more blank lines separate documents, one blank line separates paragraphs, a single line
break is a space. Every file begins a new document. A sentence never crosses a paragraph's end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path

from minibert.errors import UserError

Document = list[str]  # its sentences, in order
AnyPath = str | PathLike[str]

SHIPPED_TEXT = Path(__file__).resolve().parent.parent / "assets" / "state_of_the_union.txt"

DOCUMENT_END = re.compile(r"\n[^\S\n]*\n[^\S\n]*\n\s*")  # two blank lines or more
PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n\s*")  # one
SENTENCE_END = re.compile(
    r"""(?P<mark>[.!?]+)["'”’)\]]*\s+(?=["'“‘(\[]*(?P<next>[^\W_]))"""  # a mark, a space, a first letter
    r"""|[。！？]+[”’」』）]*"""  # Chinese and Japanese put no space
)
# A full stop after these, or after a single letter (J. Smith, the U.S. Senate), is not taken for the end of a sentence.
ABBREVIATION = re.compile(
    "Mr|Mrs|Ms|Messrs|Dr|Prof|Hon|Rev|Gen|Col|Capt|Lt|Maj|Sgt|Adm|Gov|Sen|Rep|St|Mt|Ft|Jr|Sr|No|Nos|Art|Sec|vs|viz|cf|"
    "Jan|Feb|Mar|Apr|Aug|Sept|Oct|Nov|Dec|[^\\W\\d_]"
)
LAST_WORD = re.compile(r"[^\W\d_]+$")


def read_documents(paths: AnyPath | Iterable[AnyPath]) -> list[Document]:
    """The documents of one or several text files, each a list of sentences.

    Raises UserError for a file that is missing, a folder, unreadable, not UTF-8 or without a word in it.
    """
    if isinstance(paths, str | PathLike):
        paths = [paths]
    return [document for path in paths for document in documents_of(read_text(path))]


def read_text(path: AnyPath) -> str:
    """One file's text, line ends made `\\n`."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"expected a text file, but {path} is a folder: name the files in it")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no text file {path}: check the path") from None
    except OSError as error:
        raise UserError(f"cannot read the text file {path}: {error.strerror}") from None
    text = decode(content, path)
    if "\0" in text:  # UTF-16 without a byte order mark decodes as UTF-8, every other character a NUL
        raise not_utf8(path, f"byte {content.index(0)} is NUL")
    if not re.search(r"[^\W_]", text):
        raise UserError(f"the text file {path} has no words in it: expected plain text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decode(content: bytes, path: Path) -> str:
    """UTF-8, a byte order mark dropped. Raises UserError naming the first byte that is not."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + 3 * content.startswith(b"\xef\xbb\xbf")  # the codec does not count a byte order mark
        raise not_utf8(path, f"byte {offset} (0x{content[offset]:02x}) is not") from None


def not_utf8(path: Path, what: str) -> UserError:
    return UserError(f"expected UTF-8 in {path}, but {what}: convert it, iconv -f ENCODING -t UTF-8 {path} > new.txt")


def documents_of(text: str) -> Iterator[Document]:
    """The documents of one text; those without a word are passed over."""
    for document in DOCUMENT_END.split(text):
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
    return [s for s in sentences if re.search(r"[^\W_]", s)]


def is_abbreviation(text: str, match: re.Match[str]) -> bool:
    """Whether the full stop at `match` belongs to the word before it."""
    word = LAST_WORD.search(text, max(0, match.start() - 16), match.start())
    return match["mark"] == "." and word is not None and ABBREVIATION.fullmatch(word[0]) is not None
