"""Text files: where documents and sentences end, and files that hold no text."""

from __future__ import annotations

import bz2
import gzip
import lzma
import signal
from pathlib import Path

import pytest
from tokenizers import Encoding

from minibert.data import SHIPPED_TEXT, SHIPPED_VOCABULARY, encode, load_tokenizer, read_documents
from minibert.data import sequences as sequences_module
from minibert.data import text as text_module
from minibert.data.text import split_sentences
from minibert.errors import UserError


def test_documents_paragraphs_and_line_breaks(tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_bytes(
        "\ufeffOne line\r\nand its end. Two.\r\n\r\nNo stop\r\n \r\n\t\r\n\r\nNext document!\r\n".encode()
    )
    second.write_text("Third.\n\n\n\n***\n\n\n")
    assert read_documents([first, second]) == [
        ["One line and its end.", "Two.", "No stop"],
        ["Next document!"],
        ["Third."],
    ]
    assert read_documents(str(second)) == [["Third."]]


GOOGLE = """
it has no full stop
Mr. Smith said so. And so it was

***
 a second one\t

\t

a third
"""


@pytest.mark.parametrize(
    ("separator", "text", "expected"),
    [
        ("blank-line", GOOGLE,
         [["it has no full stop", "Mr. Smith said so. And so it was"], ["a second one"], ["a third"]]),
        ("two-blank-lines", GOOGLE,
         [["it has no full stop Mr. Smith said so.", "And so it was", "*** a second one"], ["a third"]]),
        ("line", "One. Two.\n\n \nThree", [["One.", "Two."], ["Three"]]),
        ("file", "One.\n\n\n\nTwo\n= Title =\nmore.", [["One.", "Two = Title = more."]]),
        ("<|endoftext|>", "One\nline.\n\nNext\n\n\npart.\n <|endoftext|>\t\nTwo, <|endoftext|> again\n<|endoftext|>",
         [["One line.", "Next", "part."], ["Two, <|endoftext|> again"]]),
        (" = ", "=\nOne\n=\n==\nTwo\n=\n", [["One"], ["== Two"]]),
    ],
)  # fmt: skip
def test_documents_by_separator(tmp_path: Path, separator: str, text: str, expected: list[list[str]]) -> None:
    path = tmp_path / "text.txt"
    for line_end in ("\n", "\r\n", "\r"):
        path.write_bytes(text.replace("\n", line_end).encode())
        assert read_documents([path, path], separator) == expected * 2


@pytest.mark.parametrize("separator", ["blank_line", "=====", "", "  ", "a\nb"])
def test_a_separator_that_separates_nothing_is_refused(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text("One\n\n======\n\nTwo = ===== =\n")
    with pytest.raises(UserError, match=r"expected two-blank-lines, blank-line, line, file, or what") as caught:
        read_documents(path, separator)
    assert "\n" not in str(caught.value)


def test_files_without_a_word_are_passed_over_with_a_warning(tmp_path: Path) -> None:
    full, *empty = (tmp_path / name for name in ("full.txt", "empty.txt", "lines.txt"))
    full.write_text("One.\n")
    for path, content in zip(empty, ("", "\n \n--\n"), strict=True):
        path.write_text(content)
    with pytest.warns(UserWarning) as told:
        assert read_documents([empty[0], full, empty[1]]) == [["One."]]
    assert [str(path) in str(warning.message) for path, warning in zip(empty, told, strict=True)] == [True, True]
    with pytest.raises(UserError, match=r"empty\.txt, .*lines\.txt has no words"):
        read_documents(empty)


def test_byte_order_marks_of_joined_files_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "joined.txt"
    path.write_bytes("\ufeffOne\n\n\n\ufeff\n=\n\ufeff=\n\ufeffTwo\n".encode())
    assert read_documents(path, "=") == [["One"], ["Two"]]


def test_long_lines_take_time_and_memory_in_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a million dots take 10 ms; where each begins a search of its own, half an hour: of the processor's time."""

    def too_long(*_: object) -> None:
        raise AssertionError("a minute of the processor's time")

    path = tmp_path / "long.txt"
    path.write_text("A table " + "." * 500_000 + ' 12 "' + '."' * 100_000 + "x" * 100_000 + " the end" * 30_000)
    before = signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, 60)
    try:
        [document] = read_documents(path)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert sum(map(len, document)) == path.stat().st_size - len(document) + 1

    tokenizer, longest = load_tokenizer(SHIPPED_VOCABULARY), 0

    class Watched:
        def encode_batch(self, texts: list[str], **options: bool) -> list[Encoding]:
            nonlocal longest
            longest = max(longest, sum(map(len, texts)))
            return tokenizer.encode_batch(texts, **options)

    documents = [*read_documents(SHIPPED_TEXT)[:3], [" ".join(read_documents(SHIPPED_TEXT)[3])]]
    whole = encode(documents, tokenizer)
    monkeypatch.setattr(text_module, "LONGEST_PIECE", 50)
    monkeypatch.setattr(sequences_module, "CHARACTERS_AT_ONCE", 1000)
    pieces = encode(documents, Watched())
    assert longest < 1000 + 2 * 50
    for a, b in zip(whole, pieces, strict=True):
        assert [sentence.tolist() for sentence in a] == [sentence.tolist() for sentence in b]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Mr. Smith met the U.S. Senate. They spoke.", ["Mr. Smith met the U.S. Senate.", "They spoke."]),
        ("It was 3.14 in all. 5 came.", ["It was 3.14 in all.", "5 came."]),
        ('He said "Go." "Why?" Then left.', ['He said "Go."', '"Why?"', "Then left."]),
        ("Wait... what? no split. Yes", ["Wait... what? no split.", "Yes"]),
        ("国家很好。我们走！", ["国家很好。", "我们走！"]),
        ("... !", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert split_sentences(text) == expected


def test_no_character_is_lost_between_sentences() -> None:
    text = SHIPPED_TEXT.read_text(encoding="utf-8")
    kept = "".join(sentence for document in read_documents(SHIPPED_TEXT) for sentence in document)
    assert "".join(kept.split()) == "".join(text.split())
    assert len(read_documents(SHIPPED_TEXT)) == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no words"),
        (b" \n\n ... --\n", "has no words"),
        ("naïve".encode("latin-1"), "line 1 has the byte 0xef.*iconv"),
        (b"\xef\xbb\xbfab\xff", "line 1 has the byte 0xff.*iconv"),
        ("text".encode("utf-16"), "line 1 has the byte 0xff.*iconv"),
        ("text".encode("utf-16-le"), "line 1 has a NUL.*iconv"),
        (gzip.compress(b"text", mtime=0), "gzip: gunzip"),
        (bz2.compress(b"text"), "bzip2: bunzip2"),
        (lzma.compress(b"text"), "xz: unxz"),
        (b"PK\x03\x04\x14", "zip archive"),
        (b"%PDF-1.7\ntext", "PDF: take the text out"),
    ],
)
def test_bad_text_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_documents([path])
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_missing_text_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*absent\.txt"):
        read_documents([tmp_path / "absent.txt"])
    with pytest.raises(UserError, match="is a folder"):
        read_documents([tmp_path])
