"""The trial of long texts says what it measured, and fails where a text takes too much."""

from __future__ import annotations

import pytest

from tests.torture import texts


def test_a_table_of_each_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(texts, "KINDS", {"one word": "a"})
    assert texts.main(["--megabytes", "0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| 0.2 MB of text |") and [line.split(" | ")[1] for line in lines[2:]] == list(
        texts.WORKS
    )
    # its peak may be that of what was loaded before
    monkeypatch.setattr(texts, "LEAST", -1.0)
    monkeypatch.setattr(texts, "MOST", -1)
    assert texts.main(["--megabytes", "0.2"]) == 1
