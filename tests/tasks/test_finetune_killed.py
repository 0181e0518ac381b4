"""A run of fine-tuning that dies at any call of a save: the best model is never mixed with another step's, or lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.errors import UserError, pip_install
from minibert.model.checkpoint import read_arrays
from minibert.tasks.finetune import FineTuningConfig
from minibert.train.checkpoint import checkpoints, read_state
from tests.stopped_calls import Killed, stopping_at
from tests.toy_tasks import Scripted, scripted, state_file, the_log, weights

pytest.importorskip("sklearn.metrics", reason=f"needs scikit-learn: {pip_install('[tasks]')}")

SCRIPT = [(0.5, 1), (0.8, 1), (0.6, 1), (0.7, 1), (0.9, 1)]


def begin(toys: Path, folder: Path) -> Scripted:
    return scripted(toys, folder, SCRIPT, save_steps=1, save_total_limit=1)


def result(folder: Path) -> tuple[Any, ...]:
    arrays = [read_arrays(state_file(folder))[0], weights(folder), weights(checkpoints(folder)[0])]
    return the_log(folder), [{name: array.tobytes() for name, array in each.items()} for each in arrays]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("part", range(4))
def test_a_process_may_die_at_any_call(toys: Path, tmp_path: Path, part: int) -> None:
    with stopping_at(10**9, Killed()) as calls:
        whole = begin(toys, tmp_path / "whole")
        at_step = {r["step"]: whole.model.state_dict() for kind, r in whole.run() if kind == "eval"}
    straight = result(tmp_path / "whole")
    for number in range(1 + 3 * part, len(calls) + 1, 12):
        folder = tmp_path / str(number)
        with stopping_at(number, Killed()), pytest.raises(Killed):
            list(begin(toys, folder).run())
        run = begin(toys, folder)
        try:
            state = read_state(folder, FineTuningConfig)
        except UserError as error:
            assert "nothing to resume" in str(error), error
        else:
            run.resume(state)
            best = at_step[state.progress["best"]["step"]]
            assert all(np.array_equal(best[name], array) for name, array in weights(state.folder).items())
        list(run.run())
        assert result(folder) == straight, number
