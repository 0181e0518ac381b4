"""Tables of every format and habit, and what is wrong with a file, by file and line."""

from __future__ import annotations

import gc
import io
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minibert.data.lines import text_lines
from minibert.errors import UserError
from minibert.tasks.tables import open_table

EXPECTED = ["good, really", 'he said "no"\nand left', "naïve 国家"]

GOOD = {
    "plain.csv": 'text,label\n"good, really",1\n"he said ""no""\nand left",0\nnaïve 国家,1\n',
    "windows.csv": '\ufefftext,label\r\n"good, really",1\r\n"he said ""no""\r\nand left",0\r\n\r\nnaïve 国家,1\r\n',
    "semicolons.CSV": '\n\ntext;label\ngood, really;1\n"he said ""no""\nand left";0\nnaïve 国家;1',
    "tabs.csv": 'text\tlabel\ngood, really\t1\n"he said ""no""\nand left"\t0\nnaïve 国家\t1\n',
    "bars.csv": '"text, or more"|label\n"good, really"|1\n"he said ""no""\nand left"|0\nnaïve 国家|1\n',
    "lines.jsonl": '{"text": "good, really", "label": 1}\n\n{"text": "he said \\"no\\"\\nand left", "label": 0}\n'
    '{"label": 1, "text": "naïve 国家"}\n',
    "array.json": '\n[{"text": "good, really", "label": 1},\n\n {"text": "he said \\"no\\"\\nand left", "label": 0}\n'
    ', {"text": "naïve 国家", "label": 1}]\n',
    "lines.json": '{"text": "good, really"}\n{"text": "he said \\"no\\"\\nand left"}\n{"text": "naïve 国家"}\n',
}  # fmt: skip
LINES = {
    "windows.csv": [2, 3, 6], "semicolons.CSV": [4, 5, 7], "lines.jsonl": [1, 3, 4], "array.json": [2, 4, 5],
    "lines.json": [1, 2, 3],
}  # fmt: skip


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", GOOD)
def test_a_table_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    table = open_table(write(tmp_path, name, GOOD[name]))
    rows = list(table)
    assert [row.values[table.columns[0]] for row in rows] == EXPECTED
    assert [row.line for row in rows] == LINES.get(name, [2, 3, 5])
    if len(table.columns) > 1:
        assert [str(row.values["label"]) for row in rows] == ["1", "0", "1"]


def test_a_stream_is_read_row_by_row_and_left_open() -> None:
    stream = io.BytesIO(b"text\none\ntwo\n")
    table = open_table(stream, "csv")
    assert next(table.rows) == (2, {"text": "one"})
    assert [row.values for row in table] == [{"text": "two"}]
    assert not stream.closed


def test_a_stream_needs_its_format_told() -> None:
    with pytest.raises(UserError, match=r"^the input has no name that tells its format: say which, csv, json, jsonl"):
        open_table(io.BytesIO(b"text\n"))
    with pytest.raises(UserError, match=r"expected a format of csv, json, jsonl, tsv, txt, got 'xls'"):
        open_table(io.BytesIO(b"text\n"), "xls")


def test_a_stray_quote_in_tsv_is_text_and_quoted_fields_are_unquoted(tmp_path: Path) -> None:
    """GLUE's files have the first, pandas writes the second."""
    lines = ["sentence\tlabel", '"Stop" he said\t1', 'the 12" single\t0', '"never closed\t1', '"a ""b"" \t c"\t0', ""]
    rows = list(open_table(write(tmp_path, "a.tsv", "\n".join(lines))))
    assert [row.values["sentence"] for row in rows] == [
        '"Stop" he said',
        'the 12" single',
        '"never closed',
        'a "b" \t c',
    ]
    assert [row.line for row in rows] == [2, 3, 4, 5]


def test_plain_text_is_a_column_and_keeps_blank_lines(tmp_path: Path) -> None:
    rows = list(open_table(write(tmp_path, "a.txt", "one, two\r\n\n three\n")))
    assert [row.values["text"] for row in rows] == ["one, two", "", " three"]


def test_an_index_without_a_name_and_a_long_field(tmp_path: Path) -> None:
    long = "x" * 200_000  # csv's own limit is 131072
    table = open_table(write(tmp_path, "a.csv", f",text\n0,{long}\n"))
    assert table.columns == ["column 1", "text"]
    assert next(table.rows).values == {"column 1": "0", "text": long}


WRONG: list[tuple[str, str | bytes, str]] = [
    ("a.csv", "", "a.csv is empty: expected rows"),
    ("a.csv", "\n \n", "a.csv is empty: expected rows"),
    ("a.jsonl", "\n", "a.jsonl is empty: expected rows"),
    ("a.txt", "", "a.txt is empty: expected text"),
    ("a.json", " [ ] ", "a.json is empty: expected rows"),
    ("a.csv", "text,label\n\n", "a.csv has a header and no row: expected rows below it"),
    ("a.csv", "text,label,text\n1,2,3\n", "a.csv names the column 'text' twice: rename one"),
    (
        "a.csv",
        'text,label\n"two\nlines",1\nx\n',
        "a.csv, line 4: expected 2 columns, as in the header, got 1: quote a field that holds ','",
    ),
    ("a.csv", "text;label\na;b;c\n", "a.csv, line 2: expected 2 columns, as in the header, got 3: quote a field that"),
    ("a.tsv", "text\tlabel\na\tb\nc\n", "a.tsv, line 3: expected 2 columns, as in the header, got 1: a field of TSV"),
    ("a.csv", 'text,label\nx,1\n"open,2\ny,3\n', "a.csv, line 3: the quote that opens a field is never closed: write"),
    ("a.csv", 'text,label\n"a" b,2\n', "a.csv, line 2: text follows a closing quote: write a quote inside a quoted"),
    ("a.csv", 'text,label\n"a\nb",1\nx\0y,2\n', "expected UTF-8 in a.csv, but line 4 has a NUL: convert it, iconv"),
    ("a.csv", b"text,label\nok,1\ncaf\xe9,2\n", "expected UTF-8 in a.csv, but line 3 has the byte 0xe9: convert it"),
    ("a.csv", "text,label\nx,1\n".encode("utf-16"), "expected UTF-8 in a.csv, but line 1 has the byte 0xff: convert"),
    ("a.csv", b"PK\x03\x04 and more", "expected plain text, but a.csv is a zip archive or an office document"),
    ("a.xlsx", "x", "cannot tell the format of a.xlsx: expected a name that ends in .csv, .tsv"),
    ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl, line 2: no JSON: Expecting value, column 1"),
    ("a.jsonl", '{"text": "x"}\n["x"]\n', 'a.jsonl, line 2: expected a JSON object, as {"text": "..."}, got list'),
    ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: no JSON: nested too deeply"),
    ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "a.jsonl, line 1: no JSON: a number of too many digits"),
    ("a.json", '[{"text": "x"},\n{"text" "y"}]', "a.json, line 2: no JSON: Expecting ':' delimiter"),
    ("a.json", '[{"text": "x"}\n{"text": "y"}]', "a.json, line 2: expected ',' or ']' after an object of the array"),
    ("a.json", '[{"text": "x"},\n\n 3]', "a.json, line 3: expected a JSON object"),
    ("a.json", '[{"text": "x"},\n', "a.json, line 2: no JSON: Expecting value"),
]


@pytest.mark.parametrize(("name", "content", "said"), WRONG)
def test_a_wrong_file_is_told_by_file_and_line(
    name: str, content: str | bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, name, content)
    with pytest.raises(UserError) as raised:
        list(open_table(name))
    assert str(raised.value).startswith(said)
    assert "\n" not in str(raised.value)


PIECES = [
    '"',
    ",",
    ";",
    "\t",
    "\n",
    "\r\n",
    "a",
    "{",
    "}",
    "[",
    "]",
    ":",
    '"a"',
    "\\",
    "1",
    "\ufeff",
    "\0",
    "\udce9",
    "é",
]


@given(st.sampled_from(["csv", "tsv", "jsonl", "json", "txt"]), st.lists(st.sampled_from(PIECES), max_size=12))
def test_any_bytes_are_rows_or_one_line_that_says_what_is_wrong(format: str, pieces: list[str]) -> None:
    content = "".join(pieces).encode("utf-8", "surrogateescape")
    try:
        table = open_table(io.BytesIO(content), format)
        lines = [line for line, row in table if list(row) == table.columns or format.startswith("json")]
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert lines == sorted(set(lines)) or format == "json"
        assert lines[0] >= 1
        assert lines[-1] <= 1 + content.count(b"\n") + content.count(b"\r")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no file .*none.csv: check the path"):
        open_table(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"folder.csv is a folder: name a file in it"):
        open_table(tmp_path / "folder.csv")


def test_a_stream_may_be_closed_before_its_reader_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", failed.append)
    stream = io.BytesIO(b"one\ntwo\n")
    lines = text_lines(stream)
    assert next(lines) == "one\n"
    stream.close()
    del lines
    gc.collect()
    assert not failed
