"""Runs of training that are killed (`kill -9`), or whose calls of the system fail: each must end as one left alone.

python -m tests.torture kills --count 500

Half of the kills come at random moments, again and again until the run is through. The others come at calls that
change the disk (write, fsync, rename, unlink, ...): each call is the last one of a process, which leaves its file torn,
and then a call of the process that resumes is. Each call is also made to fail, with ENOSPC from then on, and with EIO
once. After every life of a run all its checkpoints are read, and the model at the top is loaded.

A life is a fork of this process, which has read text and compiled all there is: no two lives share anything but files.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import select
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from minibert.errors import UserError, WriteError
from minibert.model.bert import BertForMaskedLM
from minibert.model.heads import BertForSequenceClassification
from minibert.tasks.finetune import FineTuningConfig
from minibert.train.checkpoint import checkpoints, fault, read_state, step_of
from minibert.train.config import OptimizationConfig, TrainingConfig
from minibert.train.loop import Loop
from tests.stopped_calls import stopping_at
from tests.tiny_runs import result, tiny_data, trainer
from tests.toy_tasks import make, scripted

SAVE_STEPS = 2
MOST_LOST = 2 * SAVE_STEPS  # a checkpoint is written while the steps to the next one are done
PATIENCE = 120.0  # seconds for a life
SCRIPT = [(0.5, 1.0), (0.8, 1.0), (0.6, 1.0), (0.7, 1.0), (0.9, 1.0), (0.1, 1.0)]  # accuracy and loss by epoch


class Kind(NamedTuple):
    """A kind of run: how one is made in a folder, its config, and what loads the model at the top."""

    begin: Callable[[Path], Loop]
    config: type[OptimizationConfig]
    model: Any


class Life(NamedTuple):
    """What came of a process: its exit code, negative for a signal; the steps that it did; calls that it counted."""

    code: int
    steps: list[int]
    calls: int


@dataclass
class Tally:
    """What was tried, and what was found."""

    at_random: int = 0
    at_calls: int = 0
    failed_calls: int = 0
    runs: int = 0
    most_lost: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.at_random + self.at_calls


def kinds(folder: Path) -> dict[str, Kind]:
    """Pretraining, with passes summed; fine-tuning, whose best model is not the last. Dropout is on in both."""
    data = tiny_data()
    settings: dict[str, Any] = {"save_steps": SAVE_STEPS, "save_total_limit": 2}
    more = {"max_steps": 7, "eval_steps": 3, "gradient_accumulation_steps": 2}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        toys = make(folder, patch)
    return {
        "pretrain": Kind(lambda output: trainer(data, output, **settings, **more), TrainingConfig, BertForMaskedLM),
        "finetune": Kind(
            lambda output: scripted(toys, output, SCRIPT, **settings), FineTuningConfig, BertForSequenceClassification
        ),
    }


# -------------------------------------------------------------------------------------------------------------- a life


def lived(kind: Kind, folder: Path, stop: Any, tell: Callable[[str], Any]) -> int:
    """As the command line does: resume what is there, else begin. The exit code."""
    run = kind.begin(folder)
    try:
        run.resume(read_state(folder, kind.config))
    except UserError as error:
        if "nothing to resume" not in str(error):
            raise
    try:
        with stop as calls:
            for event, record in run.run():
                if event == "step":
                    tell(f"step {record['step']}\n")
        tell(f"calls {len(calls or ())}\n")
    except WriteError:
        return 1
    except UserError:
        if folder.exists():
            raise
        return 1  # it could not even be made: another one is to be named
    return 0


def life(kind: Kind, folder: Path, stop: Any = None, moment: float | None = None) -> Life:
    """Fork a process that runs until it is through, its calls stopped or not; kill it after `moment` seconds."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        code = 70
        try:
            warnings.simplefilter("ignore")
            code = lived(kind, folder, stop or nullcontext(), lambda text: os.write(theirs, text.encode()))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(theirs)
    until, said = time.monotonic() + (PATIENCE if moment is None else moment), b""
    while select.select([ours], [], [], max(0.0, until - time.monotonic()))[0]:
        if not (more := os.read(ours, 65536)):
            break
        said += more
    else:
        os.kill(pid, signal.SIGKILL)
        while more := os.read(ours, 65536):
            said += more
    os.close(ours)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if moment is None and time.monotonic() >= until:
        code = 71  # it hung
    found = [line.split() for line in said.decode().splitlines()]
    steps = [int(number) for name, number in found if name == "step"]
    return Life(code, steps, max([int(number) for name, number in found if name == "calls"], default=0))


class Trial:
    """The lives of runs of one kind, each in a folder of its own."""

    def __init__(self, name: str, kind: Kind, folder: Path, tally: Tally) -> None:
        self.name, self.kind, self.folder, self.tally = name, kind, folder, tally
        kind.begin(folder / "warm").forward_backward()  # what is made once is made now
        began = time.monotonic()
        whole = life(kind, folder / "straight", stopping_at(10**9, OSError()))
        self.seconds = time.monotonic() - began
        assert whole.code == 0, f"a run that is left alone ended with {whole.code}"
        self.straight, self.calls = result(folder / "straight", kind.config), whole.calls

    def run(self, what: str, lives: Iterator[dict[str, Any]]) -> None:
        """Lives one after the other, then one that is left alone, unless one of them came through."""
        self.tally.runs += 1
        folder, reached = self.folder / "run", 0
        shutil.rmtree(folder, ignore_errors=True)
        for options in [*lives, {}]:
            found = life(self.kind, folder, **options)
            reached = max([reached, *found.steps])
            killed = found.code == -signal.SIGKILL and bool(options)
            self.tally.at_random += killed and "moment" in options
            self.tally.at_calls += killed and "moment" not in options
            self.look(folder, what, found, killed, reached)
            if found.code == 0:
                break
        if found.code != 0:
            self.tally.faults.append(f"{self.name}, {what}: left alone at last, it ended with {found.code}")

    def look(self, folder: Path, what: str, found: Life, killed: bool, reached: int) -> None:
        """Note all that is not as it is promised to be."""
        wrong = []
        if not killed and found.code not in (0, 1):
            wrong.append(f"it ended with {found.code}")
        wrong += [f"{path.name}: {why}" for path in checkpoints(folder) if (why := fault(path))]
        saved = [step_of(path) for path in checkpoints(folder)[:1]]
        if saved and killed:  # where the disk is full, nothing is saved, and the run ends with the next line of its log
            lost = reached - saved[0]
            self.tally.most_lost = max(self.tally.most_lost, lost)
            if lost > MOST_LOST:
                wrong.append(f"{lost} steps are lost")
        elif reached and not saved:
            wrong.append("steps were done, and there is no checkpoint")
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            try:
                self.kind.model.from_pretrained(folder, backend="numpy")
            except UserError as error:
                wrong.append(f"the model at the top: {error}")
        if found.code == 0 and result(folder, self.kind.config) != self.straight:
            wrong.append("it ended well, and is not what a run is that was left alone")
        self.tally.faults += [f"{self.name}, {what}: {each}" for each in wrong]

    # ------------------------------------------------------------------------------------------------ what is tried

    def at_random(self, rng: random.Random) -> None:
        """Kills at any moment, until a life comes through."""
        moments = [rng.uniform(0, 1.2 * self.seconds) for _ in range(20)]
        self.run(f"killed after {moments[0]:.4f} s", ({"moment": moment} for moment in moments))

    def at_call(self, number: int, rng: random.Random) -> None:
        """A kill at this call, and one at a call of the life that follows."""
        second = rng.randint(1, self.calls)
        stops = [{"stop": stopping_at(each, die)} for each in (number, second)]
        self.run(f"killed at call {number}, then at call {second}", iter(stops))

    def failing(self, number: int) -> None:
        """This call fails: with ENOSPC, as all later ones; in another run with EIO, and none else."""
        for code, lasting in ((errno.ENOSPC, True), (errno.EIO, False)):
            self.tally.failed_calls += 1
            stop = stopping_at(number, OSError(code, os.strerror(code)), lasting)
            self.run(f"{errno.errorcode[code]} at call {number}", iter([{"stop": stop}]))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def spread(count: int, among: int) -> list[int]:
    """At most so many of the numbers 1 to `among`, evenly."""
    return sorted({1 + round(i * (among - 1) / max(1, count - 1)) for i in range(min(count, among))})


def main(arguments: list[str]) -> int:
    """Try, print what was found; 1 where anything was."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture kills", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=500, help="kills, half of them at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(arguments)
    began, tally, points = time.monotonic(), Tally(), 0
    with tempfile.TemporaryDirectory() as folder:
        toys = Path(folder, "toys")
        toys.mkdir()
        found = kinds(toys)
        for name, kind in found.items():
            rng = random.Random(options.seed)
            trial = Trial(name, kind, Path(folder, name), tally)
            points += trial.calls
            share, before = options.count / len(found), tally.kills
            for number in spread(int(share / 4) + 1, trial.calls):
                trial.at_call(number, rng)
            for number in spread(int(share / 4) + 1, trial.calls):
                trial.failing(number)
            while tally.kills - before < share:
                trial.at_random(rng)
    print(
        *tally.faults,
        f"{tally.kills} kills in {tally.runs} runs: {tally.at_random} at random moments, {tally.at_calls} at calls "
        f"that change the disk, of which a run has {points / len(found):.0f}; {tally.failed_calls} more calls failed\n"
        f"steps lost at most: {tally.most_lost}, of {MOST_LOST} that a checkpoint every {SAVE_STEPS} steps may lose\n"
        f"faults: {len(tally.faults)}; {time.monotonic() - began:.0f} s",
        sep="\n",
    )
    return 1 if tally.faults else 0
