"""python -m tests.torture TRIAL [OPTIONS]: each module beside this one that has a `main` is a trial."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

os.environ |= {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # processes are forked: no threads


def main() -> int:
    """Run a trial; its exit code."""
    trials = [p.stem for p in sorted(Path(__file__).parent.glob("[a-z]*.py")) if not p.stem.startswith("test_")]
    if len(sys.argv) < 2 or sys.argv[1] not in trials:
        print(f"expected one of {', '.join(trials)}, as in python -m tests.torture {trials[0]} --help", file=sys.stderr)
        return 2
    trial = import_module(f"tests.torture.{sys.argv[1]}")
    return trial.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
