"""python -m tests.torture TRIAL [OPTIONS]: each module beside this one that has a `main` is a trial."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

os.environ |= {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # processes are forked: no threads


def main() -> int:
    """Run a trial; its exit code."""
    paths = [p for p in sorted(Path(__file__).parent.glob("[a-z]*.py")) if not p.stem.startswith("test_")]
    trials = [p.stem for p in paths if "\ndef main(" in p.read_text(encoding="utf-8")]
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    if asked in trials:
        return int(import_module(f"tests.torture.{asked}").main(sys.argv[2:]))
    if asked in ("-h", "--help"):
        print("python -m tests.torture TRIAL [OPTIONS]; TRIAL --help shows its options\n")
        for trial in trials:
            print(f"{trial}: {(import_module(f'tests.torture.{trial}').__doc__ or '').splitlines()[0]}")
        return 0
    print(f"expected one of {', '.join(trials)}, as in python -m tests.torture {trials[0]} --help", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
