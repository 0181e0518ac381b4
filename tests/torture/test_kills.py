"""A part of the trials, in processes of their own: what forks must have no threads."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PLANTED = """
import sys
from minibert.train.optim import AdamW
AdamW.load_state_dict = lambda self, state: None
from tests.torture.kills import main
sys.exit(main(["--count", "2"]))
"""


def run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True, timeout=900)


def test_runs_that_are_killed_end_as_those_left_alone(root: Path) -> None:
    done = run(root, "-m", "tests.torture", "kills", "--count", "40")
    assert done.returncode == 0, done.stdout + done.stderr
    kills = re.search(r"^(\d+) kills in \d+ runs", done.stdout, re.MULTILINE)
    assert kills and int(kills[1]) >= 40 and "faults: 0;" in done.stdout


def test_moments_that_are_lost_are_seen(root: Path) -> None:
    done = run(root, "-c", PLANTED)
    assert done.returncode == 1, done.stderr
    assert "it ended well, and is not what a run is that was left alone" in done.stdout


def test_a_trial_that_is_none_is_refused(root: Path) -> None:
    done = run(root, "-m", "tests.torture", "fire")
    assert done.returncode == 2 and re.match(
        r"expected one of .*\bkills\b.*, as in python -m tests\.torture ", done.stderr
    )
