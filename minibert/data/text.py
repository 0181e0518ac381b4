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
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path

from minibert.data.lines import AnyPath, text_lines
from minibert.errors import UserError

Document = list[str]  # its sentences, in order

SHIPPED_TEXT = Path(__file__).resolve().parent.parent / "assets" / "state_of_the_union.txt"

TWO_BLANK_LINES, BLANK_LINE, LINE = "two-blank-lines", "blank-line", "line"
SEPARATORS = {TWO_BLANK_LINES: 2, BLANK_LINE: 1, LINE: None, "file": None}  # and the blank lines that end a document
LONGEST_PIECE = 2**16  # characters of a text that are cleaned or cut into tokens at once
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
SPACES = re.compile(r"\s+")


def read_documents(paths: AnyPath | Iterable[AnyPath], document_separator: str = TWO_BLANK_LINES) -> list[Document]:
    """The documents of one or several text files, each a list of sentences.

    Warns of a file without a word. Raises UserError for one that is missing, a folder, unreadable or not plain UTF-8,
    where no file has a word, and where no line reads as a `document_separator` that is to be a line.
    """
    paths = [paths] if isinstance(paths, str | PathLike) else list(paths)
    documents: list[Document] = []
    wordless: list[AnyPath] = []
    refuse_no_line(document_separator)
    separated = document_separator in SEPARATORS

    def lines_of(path: AnyPath) -> Iterator[str]:
        nonlocal separated
        for line in text_lines(path):
            line = line.replace("\ufeff", "")  # where files were joined, byte order marks stand within
            separated = separated or line.strip() == document_separator.strip()
            yield line

    for path in paths:
        before = len(documents)
        documents += documents_of(lines_of(path), document_separator)
        wordless += [path] if len(documents) == before else []
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


def refuse_no_line(separator: str) -> None:
    """Raises UserError for a separator that is nothing that a line can read."""
    if not separator.strip() or "\n" in separator:
        raise UserError(
            f"document separator: expected {', '.join(SEPARATORS)}, or what a line reads, got {separator!r}"
        )


def documents_of(lines: Iterable[str], separator: str = TWO_BLANK_LINES) -> Iterator[Document]:
    """The documents of the lines of one text; those without a word are passed over."""
    document: Document = []
    paragraph: list[str] = []
    blank = 0
    for line in lines:
        reads = line.strip()
        blank = 0 if reads else blank + 1
        if separator in SEPARATORS:
            ends_document = separator == LINE or blank == SEPARATORS[separator]
        else:
            ends_document = reads == separator.strip()
        if reads and (separator in SEPARATORS or not ends_document):
            paragraph.append(line)
        if blank or ends_document or separator == BLANK_LINE:
            document += paragraph_sentences(paragraph, separator)
            paragraph = []
        if ends_document:
            if document:
                yield document
            document = []
    document += paragraph_sentences(paragraph, separator)
    if document:
        yield document


def paragraph_sentences(lines: list[str], separator: str) -> Document:
    if separator == BLANK_LINE:
        return [single_spaced(line) for line in lines if WORD.search(line)]
    return split_sentences("".join(lines)) if lines else []


def in_pieces(text: str) -> Iterator[str]:
    """A text cut before spaces, where no token goes on: whole books without a full stop stand in one line.

    Where there is no space for too long the cut is anywhere. A word of so many characters has no token in any case.
    """
    start = 0
    while len(text) - start > 2 * LONGEST_PIECE:
        end = text.find(" ", start + LONGEST_PIECE, start + 2 * LONGEST_PIECE)
        end = start + 2 * LONGEST_PIECE if end < 0 else end
        yield text[start:end]
        start = end
    yield text[start:]


def single_spaced(text: str) -> str:
    """One space for all that is space between two words: in pieces, for a list of all words is longer than the text."""
    return "".join(SPACES.sub(" ", piece) for piece in in_pieces(text)).replace("  ", " ").strip()


def split_sentences(paragraph: str) -> list[str]:
    """Cut after . ! ? where a space and no lower-case letter follow, abbreviations and initials excepted.

    Rough by design: a wrong cut costs a sequence a little context, nothing else.
    """
    paragraph = single_spaced(paragraph)
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
