"""Sentences of words with tags, in every format; the text they stand in; lines that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minibert.errors import UserError
from minibert.tasks import read_words, stream_words

CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
. . O O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER


"""
TWEETS = "# id 1\tdomain=en\r\n#\tO\r\n#Paris\tB-LOC\r\n\r\n#\tO\r\nNew  York\tB-LOC\r\n# \tO"
CONLLU = """# global comment
# sent_id = 1
1-2\tdu\t_\t_\t_\t_\t_\t_\t_\t_
1\tde\tde\tADP\tE\t_\t3\tcase\t_\t_
2\tle\tle\tDET\tRD\t_\t3\tdet\t_\t_
3\tchien\tchien\tNOUN\tS\t_\t0\troot\t_\tSpaceAfter=No
3.1\tghost\t_\tVERB\t_\t_\t_\t_\t_\t_
4\t#\t#\tPUNCT\t_\t_\t3\tpunct\t_\t_
"""
PLUS = "# global.columns = ID FORM UPOS NER\n1\tParis\tPROPN\tB-LOC\n2\tsleeps\tVERB\tO\n\n"
JSONL = '{"tokens": ["EU", "rejects"], "ner_tags": ["B-ORG", "O"]}\n\n{"tokens": ["x"], "ner_tags": [3]}\n'


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: str) -> str:
        Path(name).write_text(content, encoding="utf-8", newline="")
        return name

    return write


def test_conll(file: Any) -> None:
    found = read_words(file("a.conll", CONLL))
    assert found.note == "words: column 1, tags: column 4 of 4"
    assert found.words == [["EU", "rejects", "."], ["Peter", "Blackburn"]]
    assert found.tags == [["B-ORG", "O", "O"], ["B-PER", "I-PER"]]
    assert [sentence.lines for sentence in found.sentences] == [[3, 4, 5], [7, 8]]
    assert found.sentences[1].text == "Peter Blackburn"
    assert found.label_names() == ["B-ORG", "B-PER", "I-PER", "O"]
    assert found.targets(["O", "B-ORG", "B-PER", "I-PER"]) == [[1, 0, 0], [2, 3]]
    assert read_words("a.conll", label_column="2").tags[0] == ["NNP", "VBZ", "."]
    assert read_words("a.conll", token_column="4", label_column="1").words[0] == ["B-ORG", "O", "O"]


def test_a_line_with_a_hash_is_a_comment_only_where_it_is_no_word(file: Any) -> None:
    found = read_words(file("wnut.conll", TWEETS))
    assert found.words == [["#", "#Paris"], ["#", "New  York", "#"]]
    assert found.tags == [["O", "B-LOC"], ["O", "B-LOC", "O"]]
    spaced = read_words(file("b.conll", "# newdoc\nParis B-LOC\n\n# O\nis O\n"))
    assert spaced.words == [["Paris"], ["#", "is"]]


def test_conllu(file: Any) -> None:
    found = read_words(file("a.conllu", CONLLU))
    assert found.note == "words: column 'FORM', tags: column 'UPOS'"
    assert found.words == [["de", "le", "chien", "#"]]
    assert found.tags == [["ADP", "DET", "NOUN", "PUNCT"]]
    (sentence,) = found.sentences
    assert (sentence.text, sentence.lines) == ("de le chien#", [4, 5, 6, 8])
    assert [sentence.text[a:b] for a, b in sentence.spans] == sentence.words
    other = read_words("a.conllu", token_column="LEMMA", label_column="DEPREL")
    assert other.tags == [["case", "det", "root", "punct"]]
    assert read_words(file("b.conllu", PLUS), label_column="NER").tags == [["B-LOC", "O"]]


def test_json_lines(file: Any) -> None:
    found = read_words(file("a.jsonl", JSONL))
    assert found.note == "words: column 'tokens', tags: column 'ner_tags'"
    assert (found.words, found.tags) == ([["EU", "rejects"], ["x"]], [["B-ORG", "O"], ["3"]])
    assert [sentence.lines for sentence in found.sentences] == [[1, 1], [3]]


def test_plain_text_is_cut_at_spaces_and_marks(file: Any) -> None:
    text = "Mr. O'Neil visited Aix-en-Provence, 国家!\n\nThe end\n"
    note, sentences = stream_words(file("a.txt", text), labelled=False)
    first, blank, last = sentences
    expected = ["Mr", ".", "O'Neil", "visited", "Aix-en-Provence", ",", "国", "家", "!"]
    assert (note, first.words, first.tags) == ("words: cut at spaces and marks", expected, None)
    assert [first.text[a:b] for a, b in first.spans] == first.words
    assert (blank.words, last.words, last.lines) == ([], ["The", "end"], [3, 3])
    (row,) = read_words(file("a.jsonl", '{"text": "Hi you."}\n'), labelled=False).sentences
    assert (row.words, row.text) == (["Hi", "you", "."], "Hi you.")


def test_without_tags_a_single_column_is_enough(file: Any) -> None:
    found = read_words(file("a.conll", "EU\nrejects\n\n# O\n"), labelled=False)
    assert found.words == [["EU", "rejects"]]
    with pytest.raises(ValueError, match=r"without tags"):
        found.tags  # noqa: B018


WRONG: list[tuple[str, str, dict[str, Any], str]] = [
    ("a.conll", "", {}, "a.conll has no words: expected a word a line, its columns separated by tabs or spaces"),
    ("a.conll", "-DOCSTART- O\n\n", {}, "a.conll has no words"),
    ("a.conll", "EU\nis\n", {}, "a.conll, line 1: expected a word and its tag, got one column: separate them by a tab"),
    ("a.conll", "EU B\n\nis\n", {}, "a.conll, line 3: expected 2 columns, as in line 1, got 1; a blank line separates"),
    ("a.conll", "EU B\n# B c\n", {}, "a.conll, line 2: expected 2 columns, as in line 1, got 3"),
    ("a.conll", "EU B\n", {"label_column": "3"}, "a.conll has 2 columns without names: expected --label-column from 1"),
    ("a.conll", "EU B\n", {"token_column": "w"}, "a.conll has 2 columns without names: expected --token-column from 1"),
    ("a.conllu", "1\tx\n", {}, "a.conllu, line 1: expected 10 columns separated by tabs, got 2"),
    ("a.conllu", CONLLU, {"label_column": "NER"}, "a.conllu has no column 'NER' (--label-column): its columns are 'ID"),
    ("a.conllu", CONLLU, {"label_column": "XPOS"}, "a.conllu, line 8: the word '#' has no XPOS: it is '_'"),
    ("a.conllu", "# only\n\n", {}, "a.conllu has no words: expected sentences"),
    ("a.jsonl", '{"tokens": ["a"]}\n', {}, "a.jsonl has no 'ner_tags', 'tags', 'labels', 'pos_tags', 'upos'; its colu"),
    ("a.jsonl", '{"tokens": ["a"], "tags": ["O"], "labels": ["O"]}', {}, "a.jsonl has 'tags', 'labels'; its columns a"),
    ("a.jsonl", '{"tokens": ["a"], "tags": ["O", "O"]}\n', {}, "a.jsonl, line 1: expected as many tags as words, got "),
    ("a.jsonl", '{"tokens": "a", "tags": ["O"]}\n', {}, "a.jsonl, line 1: expected a list of words in 'tokens', got "),
    ("a.jsonl", '{"tokens": ["a"], "tags": [null]}\n', {}, "a.jsonl, line 1: expected a list of tags in 'tags', got ["),
    ("a.jsonl", '{"tokens": [], "tags": []}\n', {}, "a.jsonl, line 1: 'tokens' has no words: drop the row"),
    ("a.xml", "", {}, "cannot tell the format of a.xml: expected a name that ends in .conll, .txt"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "options", "said"), WRONG)
def test_a_wrong_line_is_told_by_file_and_line(
    name: str, content: str, options: dict[str, Any], said: str, file: Any
) -> None:
    file(name, content)
    with pytest.raises(UserError) as raised:
        read_words(name, **options)
    assert str(raised.value).startswith(said)
    assert "\n" not in str(raised.value)


def test_an_unknown_or_lonely_tag(file: Any) -> None:
    found = read_words(file("a.conll", CONLL))
    with pytest.raises(UserError, match=r"^unknown label 'B-PER' in a.conll, line 7: the model knows O, B-ORG$"):
        found.targets(["O", "B-ORG"])
    with pytest.raises(UserError, match=r"b.conll has only the tag 'O'"):
        read_words(file("b.conll", "x O\n")).label_names()
