"""`--jobs`: every part is done once, by whichever process; what goes wrong in another is told as if it were here."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from minibert.cli import main
from minibert.cli.jobs import in_jobs
from minibert.errors import UserError


def by_whom(part: int) -> list[tuple[int, int]]:
    time.sleep(0.02)
    return [(part, os.getpid())]


def one_at_a_time(part: int) -> Iterator[tuple[int, int]]:
    time.sleep(0.2)
    yield part, os.getpid()


def mistaken(part: int) -> list[tuple[int, int]]:
    raise UserError(f"part {part} is wrong")


def killed(part: int) -> list[tuple[int, int]]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def test_each_part_is_done_once_and_other_processes_do_some() -> None:
    found = list(in_jobs(range(40), one_at_a_time, by_whom, jobs=2))
    assert Counter(part for part, _ in found) == Counter(range(40))
    here, there = ({part for part, who in found if (who == os.getpid()) == mine} for mine in (True, False))
    assert there  # from the end
    assert max(here) < min(there)


def test_one_job_is_this_process() -> None:
    found = list(in_jobs(range(3), one_at_a_time, killed, jobs=1))
    assert found == [(part, os.getpid()) for part in range(3)]


def test_a_mistake_in_another_process_is_told() -> None:
    with pytest.raises(UserError, match="part 9 is wrong"):
        list(in_jobs(range(10), one_at_a_time, mistaken, jobs=2))


def test_a_process_that_is_killed_is_told() -> None:
    with pytest.raises(UserError, match="--jobs 1"):
        list(in_jobs(range(10), one_at_a_time, killed, jobs=2))


def test_a_check_in_jobs_tells_what_one_process_tells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    for jobs in ("1", "2"):
        monkeypatch.setattr(
            "sys.argv", ["minibert", "check", "relu", "scale", "--backend", "numpy,numba", "--jobs", jobs]
        )
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]


def test_jobs_go_with_no_kernel_of_ones_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["minibert", "check", "--kernel", "mine.py:f=relu", "--jobs", "2"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "--jobs" in capsys.readouterr().err
