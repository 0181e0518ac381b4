"""What every test shares: the repository's folder, repeatable hypothesis runs, and the reason parity tests skip."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent

# The same inputs on every run; no deadline, since the first call of a kernel compiles it.
hypothesis.settings.register_profile("minibert", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("minibert")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture(scope="module")
def smaller_tiny() -> Iterator[None]:
    """For tests that run commands in this process: see `tests.small_steps`."""
    from tests import small_steps

    with small_steps.smaller_tiny():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip parity tests, with the reason and the remedy, where their libraries are not installed."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if not missing:
        return
    skip = pytest.mark.skip(reason=f"needs {' and '.join(missing)}: pip install 'minibert[parity]'")
    for item in items:
        if item.get_closest_marker("parity"):
            item.add_marker(skip)
