"""What memory a run will take, told from shapes before anything is allocated; and what the machine has.

A run holds weights, gradients and two moments. On top of these comes the greatest of what its phases take, one after
the other: the layers' backward pass, the head's products, the optimiser, and writing a checkpoint; one that is written
while training goes on adds to them. What each holds was counted with `tracemalloc`, or on a device in the blocks that
live at the peak; `tests/train/test_memory.py` compares with whole runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from minibert.backends import Backend
from minibert.backends.base import NARROW
from minibert.model.bert import HEAD_ROWS
from minibert.model.config import BertConfig
from minibert.train.checkpoint import megabytes

CGROUP = (  # files with the limit of a container and what it has taken, in the two versions of the system's interface
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


class Costs(NamedTuple):
    """What a backend makes beside what backward reads, in arrays of a kind."""

    hidden: float  # (N, I) in a layer
    channels: float  # (N, C) there, of a backward pass
    logits: float  # (M, V) in the head
    least: float  # (N, C) of a backward pass there, however few I are
    weights: float  # of the trained parameters' size, where the optimiser is made, resumed or at work
    gradients: float = 0  # of the largest weight's size, on the way to where gradients lie
    device: bool = False  # it has memory of its own, where passes are in 16 bits too and no checkpoint is copied to


CUDA = Costs(2, 1, 2, 4, 1, gradients=1, device=True)  # whatever plays the device
COSTS = {"numba": Costs(2, 1.75, 1.1, 0, 0), "numpy": Costs(4, 2, 5.2, 10, 6), "cupy": CUDA, "emulator": CUDA}
IN_16_BITS = {**COSTS, "numpy": Costs(5, 2, 5.2, 10, 8)}  # with copies in 32, which it computes on


class Passes(NamedTuple):
    """The shape of a step's passes, each of which is freed before the next one."""

    tokens: int  # of the longest
    accumulated: int = 1
    predicted: int = 0  # masked positions, of which a language model's head makes logits
    recompute: bool = False  # layers are computed again in backward
    evaluated: int = 0  # tokens of a pass in evaluation
    saving: bool = False  # there are steps while a checkpoint is written
    graphed: bool = False  # steps are captured: their blocks serve nothing else, and each shape first runs without

    def halved(self) -> Passes:
        """Twice as many of half the size."""
        tokens, accumulated = -(-self.tokens // 2), 2 * self.accumulated
        return self._replace(tokens=tokens, accumulated=accumulated, predicted=-(-self.predicted // 2))


class Memory(NamedTuple):
    """Bytes by what they are for: a row of the table each."""

    weights: int
    gradients_and_moments: int
    kept_for_backward: int
    passing: int  # the most that a phase takes beyond that
    checkpoint_in_writing: int  # copies, while training goes on

    @property
    def total(self) -> int:
        return sum(self)

    def __add__(self, other: Any) -> Memory:
        return Memory(*(a + b for a, b in zip(self, other, strict=True)))

    def rows(self) -> list[tuple[str, str]]:
        """What is shown, in MB."""
        named = zip((name.replace("_", " ") for name in self._fields), self, strict=True)
        return [(name, megabytes(size)) for name, size in (*named, ("together", self.total))]


def predict(
    config: BertConfig, passes: Passes, backend: str, dtype: str, parameters: int, trained: int | None = None
) -> Memory | None:
    """What a run takes where the backend's arrays lie, beside the program; None for backends that nobody has counted.

    `trained` is how many of the parameters are: all, where it is not given.
    """
    if backend not in COSTS:
        return None
    narrow, wide = dtype in NARROW, 8 if dtype == "float64" else 4
    costs = (IN_16_BITS if narrow else COSTS)[backend]
    width = 2 if narrow else wide  # of what is kept
    passing = width if costs.device else wide
    trained = parameters if trained is None else trained
    n, m = passes.tokens, passes.predicted if passes.graphed else min(passes.predicted, HEAD_ROWS)
    c, i, layers, v = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
    of_layer = n * (i + 6 * c)
    kept = width * (3 * n * c + layers * (n * c if passes.recompute else of_layer))
    backward = passing * n * max(costs.hidden * i + costs.channels * c, costs.least * c)
    backward += passing * costs.gradients * c * max(i, 3 * c)
    if passes.recompute:
        backward += width * (of_layer + 3 * n * c)
    head = passing * (m * (costs.logits * v + 7 * c) + (costs.gradients * v * config.embedding_size if m else 0))
    evaluation = passing * passes.evaluated * (costs.hidden * i + (costs.channels + 1) * c)
    copied = 0 if costs.device else 2 * wide * (parameters + trained)  # of the model for itself, and with its moments
    beside = copied if passes.saving else 0
    step = kept + max(backward, head)
    most = max(2 * step if passes.graphed else step, passing * costs.weights * trained, evaluation, copied - beside)
    weights = width * parameters + (wide * trained if narrow else 0)  # which are updated in float32
    return Memory(weights, (width + 2 * wide) * trained, *map(int, (kept, most - kept, beside)))


def parameters_of(config: BertConfig) -> int:
    """How many parameters a masked language model of this config has, before there is one: to about 1 %."""
    c, i, e, v = config.hidden_size, config.intermediate_size, config.embedding_size, config.vocab_size
    embeddings = (v + config.max_position_embeddings + config.type_vocab_size + 2) * e + (c * e if c != e else 0)
    layers = config.num_hidden_layers * (4 * c * c + 2 * c * i + 9 * c + i)
    return embeddings + layers + c * e + v + 3 * e


def smaller(passes: Passes, least: int, fits: Callable[[Passes], bool]) -> Passes | None:
    """Passes of the same step that fit: shorter ones first, which cost little time; then with recomputation too."""
    for recompute in dict.fromkeys((passes.recompute, True)):
        tried = passes._replace(recompute=recompute)
        while tried.tokens >= least:
            if fits(tried):
                return tried
            tried = tried.halved()
    return None


def available(place: Backend) -> int | None:
    """Bytes that a run there may take, with what is there of it already; None where neither device nor system says."""
    host, device = available_to_process(), place.device_memory()
    if device is None:
        return host
    return min(device, host) if place.emulated and host is not None else device  # whose memory is the host's


def available_to_process() -> int | None:
    """Bytes that this process may still take; None where the system does not say (it is not Linux)."""
    try:
        import resource  # where there is one, as on Linux

        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found = [1024 * int(lines["MemAvailable"].split()[0])]
        group = Path("/sys/fs/cgroup")
        for limit, used in CGROUP:
            if (group / limit).is_file() and (most := (group / limit).read_text().strip()) != "max":
                found.append(int(most) - int((group / used).read_text()))
        most_addresses = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most_addresses != resource.RLIM_INFINITY:
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            found.append(most_addresses - taken)
    except (ImportError, OSError, KeyError, ValueError):
        return None
    return max(0, min(found))
