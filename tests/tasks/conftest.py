"""What the tests of tasks share: the toys, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.toy_tasks import make


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as cli:
        return make(tmp_path_factory.mktemp("toys"), cli)
