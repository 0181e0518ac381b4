"""What `python -m tests.torture` offers is there, and nothing else is taken for a trial."""

from __future__ import annotations

import sys

import pytest

from tests.torture.__main__ import main


def test_help_names_trials_that_have_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["torture", "--help"])
    assert main() == 0
    trials = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert {"files", "kills", "texts"} <= set(trials)
    for trial in trials:
        monkeypatch.setattr(sys, "argv", ["torture", trial, "--help"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0 and "usage: " in capsys.readouterr().out, trial


@pytest.mark.parametrize("trial", [[], ["corpus"], ["__main__"], ["nothing"]])
def test_what_is_no_trial_is_told(
    trial: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["torture", *trial])
    assert main() == 2
    assert capsys.readouterr().err.startswith("expected one of files, kills, texts")
