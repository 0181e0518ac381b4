"""Was the machine quiet while something was timed, and how far may a ratio of two times be trusted.

Sides that are compared take turns, so their times come in pairs and a slow minute falls on both. "N times as fast" is
therefore the median of the pairs' ratios, and stands nowhere without its 20th and 80th percentile. It is not the ratio
of the medians: on a busy machine those may come from different minutes, and can lie outside the pairs' percentiles.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MOST_SPREAD = 0.25  # of the median: of the sides in bench/results, of a machine left alone, nine in ten are below 0.14
MOST_SIDES = 0.1  # that spread further: among many, one is no sign of others' work
# Cores beyond those that the work leaves free. A parallel kernel waits for the slowest of its threads, so what others
# take of one core all of them lose: a quarter of one can cost the quarter of the time that MOST_SPREAD allows.
MOST_OTHERS = 0.25
# The load average forgets within a minute: a busy process that began 40 s ago counts half. Work of one's own that has
# just ended counts as well, so it is a reason only where the system does not say what others' work took.
MOST_LOAD = 0.5
SHORTEST = 1.0  # seconds: Linux counts the processors' time in hundredths
PROC_STAT = Path("/proc/stat")
BUSY = (1, 2, 3, 6, 7, 8)  # its columns: user, nice, system, irq, softirq, steal; the rest is idle or counted there


class Spread(NamedTuple):
    """Of several values: the median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @property
    def relative(self) -> float:
        """From p20 to p80, over the median."""
        return (self.p80 - self.p20) / self.median


def spread(values: Sequence[float]) -> Spread:
    """Raises IndexError where there is no value."""
    p20, median, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return Spread(median, p20, p80)


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread | None:
    """How many times as fast as they we are, from the seconds of turns taken in pairs; None where no time was seen."""
    pairs = list(zip(theirs, ours, strict=True))
    if not pairs or not all(a > 0 and b > 0 for a, b in pairs):
        return None
    return spread([a / b for a, b in pairs])


class Load:
    """What the machine does beside this process, from the moment that a Load is made."""

    def __init__(self) -> None:
        self.average = load_average()
        self._began = _clocks()

    def others(self) -> float | None:
        """Cores that other programs have kept busy since then; None where that is not known, or not yet."""
        now = _clocks()
        if self._began is None or now is None:
            return None
        passed, busy, own = (after - before for before, after in zip(self._began, now, strict=True))
        return max(0.0, busy - own) / passed if passed >= SHORTEST else None

    def disturbance(self, threads: int, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """What of the machine belongs to a figure: `load`, `others`, `cores`, and `why` it was not quiet.

        `threads`: of the work that was timed; `seconds`: what each side took, turn by turn.
        """
        others, cores = self.others(), os.cpu_count() or 1
        free = max(0, cores - threads)
        why = []
        if others is not None and others > free + MOST_OTHERS:
            why.append(f"other programs kept {others:.2f} of {cores} cores busy")
        if others is None and self.average is not None and self.average > free + MOST_LOAD:
            why.append(f"the load of the minute before was {self.average:.2f} on {cores} cores")
        spreads = {name: s.relative for name, taken in seconds.items() if taken and (s := spread(taken)).median > 0}
        far = [name for name, relative in spreads.items() if relative > MOST_SPREAD]
        if len(far) > MOST_SIDES * len(spreads):
            worst = max(far, key=spreads.__getitem__)
            more = f", and {len(far) - 1} more of {len(spreads)} by over {MOST_SPREAD:.0%}" if len(far) > 1 else ""
            why.append(f"p20 to p80 of {worst} is {spreads[worst]:.0%} of its median{more}")
        return {"load": self.average, "others": others, "cores": cores, "why": why}


def load_average() -> float | None:
    """Programs that ran or waited for a core, in the minute before; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def load_words(disturbance: Mapping[str, Any]) -> str:
    """The load beside a figure: "load 0.31 on 2 cores, 0.02 of them busy with other programs"."""
    load, others = disturbance.get("load"), disturbance.get("others")
    said = "load not known" if load is None else f"load {load:.2f} on {disturbance.get('cores')} cores"
    return said if others is None else f"{said}, {others:.2f} of them busy with other programs"


def warning(disturbance: Mapping[str, Any]) -> str:
    """One line where the machine was not quiet, else empty."""
    why = "; ".join(map(str, disturbance.get("why") or ()))
    return f"the machine was not quiet: {why}. Measure again when it is: these times may be far off" if why else ""


def _clocks() -> tuple[float, float, float] | None:
    """Seconds: of the clock, that all processors were busy, and that this process and its ended children took."""
    try:
        columns = PROC_STAT.read_text().split("\n", 1)[0].split()
        busy = sum(int(columns[i]) for i in BUSY) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
    return time.perf_counter(), busy, sum(os.times()[:4])
