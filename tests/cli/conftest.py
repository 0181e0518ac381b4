"""A command that must fail, and its error."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from minibert.cli import main


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail; its one line of error."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["minibert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        err = capsys.readouterr().err
        assert stopped.value.code == 2, f"exit code {stopped.value.code}, stderr {err!r}"
        lines = err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        return lines[0]

    return run
