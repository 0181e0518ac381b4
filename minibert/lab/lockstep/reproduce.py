"""From a call that left its bound to the smallest that still does, and to a test that fails until it is mended.

The smallest: inputs are cut along axes of equal size together, to a window about the worst element that grows until the
call is wrong again. What the formula does not take (shapes that no longer fit) is not tried on a kernel.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minibert import backends
from minibert.backends import Backend
from minibert.errors import UserError
from minibert.kernels.array_module import numpy_module
from minibert.kernels.op import Op, holds_floats, input_name, outputs
from minibert.kernels.philox import Stream
from minibert.lab.conform.judge import Judgement, expect
from minibert.lab.lockstep.assess import assess
from minibert.lab.lockstep.diff import Evidence
from minibert.lab.lockstep.trace import Side, copied, raised, same_bits

GROWTH = 4  # of the window, from one try to the next
PASSES = 2  # over all axes: a shorter one may let another be shorter
OFFSETS = "cu_seqlens"  # the input that cuts rows into sequences: rows go with their sequence


class Tried(NamedTuple):
    """What a side made of one call."""

    judgement: Judgement
    got: Sequence[np.ndarray]


def run_call(
    side: Side, op: Op, params: Mapping[str, Any], inputs: Sequence[np.ndarray], calls: int = 1
) -> Tried:  # fmt: skip
    """Run one call on copies of its inputs so many times, and judge the last. What a kernel raises is its problem."""
    with side.working() as backend, backend.unwatched(), np.errstate(all="ignore"):
        try:
            for _ in range(calls):
                given = [backend.asarray(x.copy()) for x in inputs]
                result = backend.run(op, *given, **params)
            got = [copied(backend, r) for r in outputs(result)]
            left = [i for i in range(len(inputs)) if i not in op.writes]
            changed = [i for i in left if not same_bits(copied(backend, given[i]), inputs[i])]
        except Exception as error:  # whatever a kernel does is part of the verdict
            return Tried(Judgement(np.inf, np.inf, np.inf, False, None, raised(error), 0), [])
        if changed:
            problem = f"input {input_name(op, changed[0])} was changed"
            return Tried(Judgement(np.inf, np.inf, np.inf, False, None, problem, 0), got)
        return Tried(assess(op, inputs, params, [got], side.products)[0].judgement, got)


def smallest(evidence: Evidence, side: Side) -> Evidence | None:
    """The same call on as little as still goes wrong; None where it does not go wrong again by itself.

    By itself is on kernels that were just loaded, as those of a test are, and at the last of `evidence.calls` calls.
    """
    for one in (_cut_down(evidence, side), evidence):
        if one and not run_call(side.anew(), one.op, one.params, one.inputs, one.calls).judgement.ok:
            return one
    return None


def _cut_down(evidence: Evidence, side: Side) -> Evidence | None:
    """On kernels as they are by now: to load them for each try would take long."""
    op, params = evidence.op, evidence.params
    inputs = list(evidence.inputs)
    tried = run_call(side, op, params, inputs, evidence.calls)
    if tried.judgement.ok:
        return None
    names = [p.name for p in list(inspect.signature(op.formula).parameters.values())[1:]]
    offsets = names.index(OFFSETS) if OFFSETS in names[: len(inputs)] else None
    axes = _axes(inputs, offsets)
    for _ in range(PASSES):
        for cut in _ways(inputs, axes, offsets):
            for fewer in cut(inputs, tried):
                again = _still_wrong(side, evidence, fewer, tried.judgement)
                if again is not None:
                    inputs, tried = fewer, again
                    break
    return evidence._replace(inputs=inputs)


def _still_wrong(side: Side, evidence: Evidence, inputs: Sequence[np.ndarray], before: Judgement) -> Tried | None:
    """The call on these inputs, where the formula takes them and it goes wrong in the same way."""
    try:
        with np.errstate(all="ignore"):
            evidence.op.formula(numpy_module, *[_widened(x) for x in inputs], **evidence.params)
    except Exception:  # shapes or ids that no longer fit
        return None
    tried = run_call(side, evidence.op, evidence.params, inputs)
    alike = bool(tried.judgement.problem) == bool(before.problem)
    return tried if not tried.judgement.ok and alike else None


def _widened(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) if holds_floats(x) else x


Axis = list[tuple[int, int]]  # axes of inputs, as (input, axis), that have one size


def _axes(inputs: Sequence[np.ndarray], offsets: int | None) -> list[Axis]:
    """Axes by size, the longest first; those of tokens and offsets are left to `_sequences`."""
    found: dict[int, Axis] = {}
    for i, x in enumerate(inputs):
        for axis, size in enumerate(x.shape):
            if size > 1:
                found.setdefault(size, []).append((i, axis))
    if offsets is not None:
        for size in (int(inputs[offsets][-1]), inputs[offsets].size):
            found.pop(size, None)
    return [found[size] for size in sorted(found, reverse=True)]


def _ways(inputs: Sequence[np.ndarray], axes: Sequence[Axis], offsets: int | None) -> Iterator[Any]:
    if offsets is not None and inputs[offsets].size > 2:
        yield lambda given, tried: _sequences(given, offsets, tried)
    for axis in axes:
        yield lambda given, tried, axis=axis: _windows(given, axis, tried)


def _windows(inputs: Sequence[np.ndarray], axis: Axis, tried: Tried) -> Iterator[list[np.ndarray]]:
    """Windows of the axis, small ones first: about the worst element, and at either end."""
    size = inputs[axis[0][0]].shape[axis[0][1]]
    worst = tried.judgement.worst
    about = {0, size - 1}
    if worst is not None:
        shape = tried.got[worst.output].shape
        about = {place for place, extent in zip(worst.place, shape, strict=True) if extent == size} | about
    width = 1
    while width < size:
        for middle in sorted(about):
            start = min(max(0, middle - width // 2), size - width)
            yield _cut(inputs, axis, slice(start, start + width))
        width *= GROWTH


def _cut(inputs: Sequence[np.ndarray], axes: Axis, kept: slice) -> list[np.ndarray]:
    made = list(inputs)
    for i, axis in axes:
        made[i] = np.ascontiguousarray(made[i][(slice(None),) * axis + (kept,)])
    return made


def _sequences(inputs: Sequence[np.ndarray], offsets: int, tried: Tried) -> Iterator[list[np.ndarray]]:
    """One sequence alone: the worst element's, else each."""
    ends = inputs[offsets]
    rows = int(ends[-1])
    spans = list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
    worst = tried.judgement.worst
    if worst is not None:
        row = next((p for p, n in zip(worst.place, tried.got[worst.output].shape, strict=True) if n == rows), None)
        spans.sort(key=lambda span: row is not None and not span[0] <= row < span[1])
    for start, stop in spans:
        axes = [(i, a) for i, x in enumerate(inputs) if i != offsets for a, n in enumerate(x.shape) if n == rows]
        made = _cut(inputs, axes, slice(start, stop))
        made[offsets] = np.array([0, stop - start], ends.dtype)
        yield made


# ---------------------------------------------------------------------------------------------------------- the files


@dataclass(frozen=True)
class Case:
    """A call that goes wrong, and how to run it again."""

    evidence: Evidence
    side: Side
    specs: Sequence[str]  # of --kernel, where the side has kernels of one's own
    said: str  # what was found, in a line

    def name(self, folder: Path) -> str:
        """`test_OP_on_BACKEND_` and digits that no other case has, nor the same one in another folder.

        Of two files of one name pytest takes but one, wherever they lie.
        """
        digits = hashlib.blake2b(f"{folder.resolve()}{self._test('', folder)}".encode(), digest_size=4)
        for x in self.evidence.inputs:
            digits.update(_stored(x).tobytes())
        return re.sub(r"\W", "_", f"test_{self.evidence.op.name}_on_{self.side.name}_{digits.hexdigest()}")

    def write(self, folder: Path) -> tuple[Path, Path]:
        """A test and its `.npz`: inputs, what they should give, the bound, what they gave.

        What is there already stays, unless it is the same. Raises UserError where they cannot be written.
        """
        first = self.name(folder)
        names = (first if n == 1 else f"{first}_{n}" for n in count(1))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            test, text = next(
                (path, text)
                for path, text in ((folder / f"{name}.py", self._test(name, folder)) for name in names)
                if not path.exists() or path.read_text() == text
            )
            data = test.with_suffix(".npz")
            np.savez_compressed(data, **self._arrays())  # type: ignore[arg-type]
            test.write_text(text)
        except OSError as error:
            raise UserError(f"cannot write {folder / first}.py: {error.strerror or error}") from None
        return test, data

    def _arrays(self) -> dict[str, np.ndarray]:
        op, params, inputs = self.evidence.op, self.evidence.params, self.evidence.inputs
        dtype = next(x.dtype.name for x in inputs if holds_floats(x))
        with np.errstate(all="ignore"):
            expected = expect(op, inputs, params, dtype, self.side.products)
        found = {f"input_{i}": _stored(x) for i, x in enumerate(inputs)}
        for i, b in enumerate(expected):
            found |= {f"expected_{i}": b.value, f"bound_{i}": b.error}
        got = run_call(self.side.anew(), op, params, inputs, self.evidence.calls).got
        return found | {f"got_{i}": _stored(r) for i, r in enumerate(got) if r.dtype.kind != "O"}

    def _test(self, name: str, folder: Path) -> str:
        evidence, side = self.evidence, self.side
        op, params = evidence.op.name, evidence.params
        specs = [_kernel(spec, folder) for spec in self.specs if spec.endswith(f"={op}")]
        imports = list(IMPORTS)
        sides = ["backend"]
        if specs:
            imports.append("from minibert.lab.conform.own_kernels import load_kernels")
            sides.append(f"kernels=dict(load_kernels([{', '.join(specs)}]))")
        if side.threads:
            sides.append(f"threads={side.threads}")
        if any(isinstance(value, Stream) for value in params.values()):
            imports.append("from minibert.kernels.philox import Stream")
        literals = "".join(f"    {name}={_literal(value)},\n" for name, value in sorted(params.items()))
        return TEST.format(
            said=_for_a_docstring(self.said), test=name, op=op, backend=_found_from(side.backend, folder),
            side=", ".join(sides), dtypes=[x.dtype.name for x in evidence.inputs],
            params=f"dict(\n{literals})" if literals else "{}",
            calls="" if evidence.calls == 1 else f", calls={evidence.calls}",
            products="" if side.products == "float32" else f"    backend.product_mode = {side.products!r}\n",
            imports="\n".join(sorted(imports)),
        )  # fmt: skip


IMPORTS = (
    "from minibert import backends",
    "from minibert.backends.base import dtype_of",
    "from minibert.kernels import OPS",
    "from minibert.lab.lockstep.reproduce import run_call",
    "from minibert.lab.lockstep.trace import Side",
)
TEST = '''"""{said}

Written by `minibert bisect`: it fails until the kernel is mended. The inputs lie in {test}.npz.
"""

from pathlib import Path

import numpy as np

{imports}

HERE = Path(__file__).resolve().parent
DTYPES = {dtypes}
PARAMS = {params}


def {test}():
    with np.load(HERE / "{test}.npz") as case:
        inputs = [case[f"input_{{i}}"].view(dtype_of(dtype)) for i, dtype in enumerate(DTYPES)]
    backend = backends.get({backend})
{products}    side = Side({side})
    judgement = run_call(side, OPS["{op}"], PARAMS, inputs{calls}).judgement
    assert judgement.ok, judgement.problem or str(judgement.worst)
'''


def _for_a_docstring(text: str) -> str:
    return text.replace("\\", "/").replace('"', "'")


def _stored(x: np.ndarray) -> np.ndarray:
    """As NumPy's file format knows it: of bfloat16 the bits."""
    return x.view(np.uint16) if x.dtype.kind == "V" else x


def _literal(value: Any) -> str:
    return repr(value.item() if isinstance(value, np.generic) else value)


def _found_from(backend: Backend, folder: Path) -> str:
    """The backend as the test names it; one of a user's own by its file."""
    spec = backends.spec_of(backend)
    place, _, name = spec.rpartition(":")
    return _relative(place, f":{name}", folder) if place.endswith(".py") else repr(spec)


def _kernel(spec: str, folder: Path) -> str:
    place, _, op = spec.rpartition("=")
    file, _, function = place.rpartition(":")
    return _relative(file, f":{function}={op}", folder) if file.endswith(".py") else repr(spec)


def _relative(file: str, rest: str, folder: Path) -> str:
    """A user's file as the test finds it: from its own folder."""
    return f"str(HERE / {os.path.relpath(Path(file).resolve(), folder.resolve())!r}) + {rest!r}"
