"""One look at a kernel, for `minibert watch`: `python -m minibert.cli.look BACKEND OPS DTYPES PEAKS [SPEC ...]`.

OPS and DTYPES by commas (no dtype: the usual ones), PEAKS as JSON (null: measure them), SPECs as of --kernel. Prints
JSON: the peaks (of a CPU; of another device null), then a line for each op.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import numpy as np

from minibert import backends
from minibert.lab.conform.check import find_op
from minibert.lab.conform.own_kernels import load_kernels
from minibert.lab.measure.peaks import Peaks, measure_peaks
from minibert.lab.measure.watching import look


def main() -> None:
    name, ops, dtypes, known, *specs = sys.argv[1:]
    backend = backends.get(name)
    peaks = None
    if isinstance(backend.asarray(np.zeros(1, np.float32)), np.ndarray):
        peaks = Peaks(**json.loads(known)) if json.loads(known) else measure_peaks()
    print(json.dumps(peaks and peaks._asdict()), flush=True)
    with np.errstate(all="ignore"), backend.using(dict(load_kernels(specs))):
        for op in ops.split(","):
            print(
                json.dumps(asdict(look(find_op(op), backend, peaks, dtypes.split(",") if dtypes else None))), flush=True
            )


if __name__ == "__main__":
    main()
