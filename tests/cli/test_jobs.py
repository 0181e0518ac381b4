"""`--jobs`: every part is done once, by whichever process; what goes wrong in another is told as if it were here."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from minibert.cli import main
from minibert.cli.jobs import in_jobs
from minibert.errors import UserError


class ByWhom:
    """Each part is done by a process, which says its number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def parts(self) -> Sequence[int]:
        return range(self.count)

    def begin(self) -> None:
        pass

    def here(self, part: int) -> Iterator[tuple[int, int]]:
        time.sleep(0.2)
        yield part, os.getpid()

    def known(self, part: int) -> int:
        return os.getpid()

    def there(self, part: int, known: int) -> list[tuple[int, int]]:
        time.sleep(0.02)
        assert known != os.getpid()
        return [(part, os.getpid())]


class Mistaken(ByWhom):
    def there(self, part: int, known: int) -> list[tuple[int, int]]:
        raise UserError(f"part {part} is wrong")


class Unknown(ByWhom):
    def known(self, part: int) -> int:
        raise UserError(f"nothing is known of part {part}")


class Killed(ByWhom):
    def there(self, part: int, known: int) -> list[tuple[int, int]]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []


class KilledAtOnce(ByWhom):
    def begin(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_each_part_is_done_once_and_other_processes_do_some() -> None:
    found = list(in_jobs(ByWhom(40), jobs=2))
    assert Counter(part for part, _ in found) == Counter(range(40))
    here, there = ({part for part, who in found if (who == os.getpid()) == mine} for mine in (True, False))
    assert there  # from the end
    assert max(here) < min(there)


def test_one_job_is_this_process() -> None:
    found = list(in_jobs(Killed(3), jobs=1))
    assert found == [(part, os.getpid()) for part in range(3)]


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (Mistaken(10), "part 9 is wrong"),
        (Unknown(10), "nothing is known of part 9"),
        (Killed(10), "--jobs 1"),
        (KilledAtOnce(10), "--jobs 1"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_goes_wrong_there_is_told(work: ByWhom, told: str) -> None:
    with pytest.raises(UserError, match=told):
        list(in_jobs(work, jobs=2))


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
