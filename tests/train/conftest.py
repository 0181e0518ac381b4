"""What tests of saved runs share."""

from __future__ import annotations

from typing import Any

import pytest

from minibert.train.checkpoint import checkpoints
from minibert.train.trainer import Data
from tests.tiny_runs import result, tiny_data, trainer


@pytest.fixture(scope="module")
def tiny() -> Data:
    return tiny_data()


@pytest.fixture(scope="module")
def straight(tiny: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """What a run leaves that was left alone."""
    folder = tmp_path_factory.mktemp("straight")
    list(trainer(tiny, folder).run())
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-3"]
    return result(folder)
