"""One look at a kernel, for `minibert watch`: `python -m minibert.cli.look BACKEND OPS DTYPES PEAKS [SPEC ...]`.

OPS and DTYPES by commas (no dtype: the usual ones), PEAKS as JSON (null: measure them), SPECs as of --kernel. Prints
JSON: the peaks (of a CPU; of another device null), then a line for each op.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import numpy as np

from minibert import backends
from minibert.lab.conform.check import find_op
from minibert.lab.conform.own_kernels import given_again, load_kernels
from minibert.lab.measure.watching import look


def main() -> None:
    name, ops, dtypes, known, *specs = sys.argv[1:]
    backend = backends.get(name)
    peaks = _peaks(json.loads(known)) if isinstance(backend.asarray(np.zeros(1, np.float32)), np.ndarray) else None
    print(json.dumps(peaks and peaks._asdict()), flush=True)
    with np.errstate(all="ignore"), backend.using(dict(load_kernels(specs))):
        for op in ops.split(","):
            seen = look(find_op(op), backend, peaks, dtypes.split(",") if dtypes else None, given_again(specs))
            print(json.dumps(asdict(seen)), flush=True)


def _peaks(known: dict[str, Any] | None) -> Any:
    """The CPU's, as they were measured before; None where Numba, which measures them, is not installed."""
    try:
        from minibert.lab.measure.peaks import Peaks, measure_peaks
    except ImportError:
        return None
    return Peaks(**known) if known else measure_peaks()


if __name__ == "__main__":
    main()
