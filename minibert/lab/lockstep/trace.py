"""One training step, every call of an op as it was: what it was given, what it gave, and where in the model it stands.

`Training.step` shows each call to whoever looks on. `record` keeps them all in a `Recording`, which `save` writes to a
file (a trace) that another machine can compare with: safetensors, the calls as JSON in its metadata. A trace holds the
outputs of every call and hashes of every input. Most inputs are outputs of earlier calls, and so are there as well; of
the gradients that an optimiser reads the trace holds a copy. Weights, batch and moments it does not hold: whoever reads
it makes them from the same seed and text, and the hashes tell whether they are the same.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from minibert.backends.base import Backend, Kernel, dtype_of
from minibert.data.batching import PackedBatch
from minibert.errors import UserError
from minibert.kernels import OPS
from minibert.kernels.op import Array, Op, input_name, outputs
from minibert.model.checkpoint import read_arrays, write_arrays
from minibert.model.tensor import current_place
from minibert.train.optim import AdamW, parameter_groups

FORMAT = "minibert trace 1"
IN_MEMORY = 1 << 30  # bytes of recorded arrays that are kept in memory; what comes after them goes to a temporary file

PHASES = ("forward", "backward", "optimiser")

MakeModel = Callable[[Backend, str], Any]  # backend, dtype -> model


@dataclass(frozen=True)
class Side:
    """A backend as one side of a comparison: with these kernels swapped in, in this dtype, on this many threads."""

    backend: Backend
    dtype: str = "float32"
    kernels: Mapping[Op, Kernel] = field(default_factory=dict)
    threads: int | None = None  # None: as many as it has

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def products(self) -> str:
        return self.backend.product_mode

    def describe(self) -> str:
        own = f", own {', '.join(op.name for op in self.kernels)}" if self.kernels else ""
        with self.working():
            return f"{self.backend.describe()}, {self.dtype}{own}"

    def anew(self) -> Side:
        """The same with its kernels as they are when they are loaded, where they know how that is (`anew`)."""
        kernels = {op: kernel.anew() if hasattr(kernel, "anew") else kernel for op, kernel in self.kernels.items()}
        return replace(self, kernels=kernels)

    @contextmanager
    def working(self) -> Iterator[Backend]:
        """A block in which the backend is this side."""
        before = self.backend.num_threads()
        with self.backend.using(dict(self.kernels)):
            if self.threads is not None:
                self.backend.set_num_threads(self.threads)
            try:
                yield self.backend
            finally:
                if self.threads is not None:
                    self.backend.set_num_threads(before)


class Key(NamedTuple):
    """What an array holds, in few bytes."""

    digest: str
    shape: tuple[int, ...]
    dtype: str


class Seen(NamedTuple):
    """One call of an op. An input of which only the key is known is None."""

    op: Op
    phase: str  # of PHASES
    place: str  # the module, as `bert.encoder.layer.0.attention.self`; "" outside of modules
    params: Mapping[str, Any]
    inputs: Sequence[np.ndarray | None]  # as they were before the call
    keys: Sequence[Key] | None  # of the inputs, where they come from a recording
    outputs: Sequence[np.ndarray]
    problem: str  # what the op did that no op may: raise, or change an input; else empty


Look = Callable[[Seen], None]


class Training:
    """A model on one side and its optimiser, step by step over batches: `batch_of(0)` is the first step's.

    A step is forward, backward, clipping and AdamW, with dropout. `state` is all that the next one depends on, so that
    a run can be gone through again from any step, bit by bit, or be put where another side's stands.
    """

    def __init__(
        self, side: Side, make_model: MakeModel, batch_of: Callable[[int], PackedBatch], learning_rate: float = 1e-4
    ) -> None:
        self.side, self.batch_of, self.taken = side, batch_of, 0
        with side.working() as backend:
            self.model = make_model(backend, side.dtype).train()
            self.optimiser = AdamW(parameter_groups(self.model, 0.01), lr=learning_rate, max_grad_norm=1.0)

    def step(self, look: Look | None = None, phases: Sequence[str] = PHASES) -> float:
        """Run the next step, and show every call of these phases to `look`; returns the loss.

        Raises FloatingPointError where the gradients are not finite, and what a kernel raises.
        """
        batch = self.batch_of(self.taken)
        with self.side.working() as backend:

            def seen(phase: str) -> AbstractContextManager[Any]:
                if look is None or phase not in phases:
                    return nullcontext()
                return backend.watched_by(_watcher(backend, phase, look))

            self.optimiser.zero_grad()
            with seen("forward"):
                loss = batch.loss(self.model)
            with seen("backward"):
                loss.backward()
            value = float(loss.item())
            with seen("optimiser"):
                self.optimiser.step()
        self.taken += 1
        return value

    def state(self) -> dict[str, np.ndarray]:
        """Weights, moments, and the number of steps taken, as copies."""
        with self.side.working():
            weights = {f"model.{name}": np.array(values) for name, values in self.model.state_dict().items()}
            moments = {f"optimizer.{name}": values for name, values in self.optimiser.state_dict().items()}
        return {**weights, **moments, "taken": np.asarray(self.taken)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a state, of this side or of another over the same model."""
        parts: dict[str, dict[str, np.ndarray]] = {"model": {}, "optimizer": {}}
        for name, values in state.items():
            if name != "taken":
                kind, _, rest = name.partition(".")
                parts[kind][rest] = values
        with self.side.working():
            self.model.load_state_dict(parts["model"])
            self.optimiser.load_state_dict(parts["optimizer"])
        self.taken = self.model.step = int(state["taken"])  # the model's names its dropout masks


def _watcher(backend: Backend, phase: str, look: Look) -> Any:
    def watch(op: Op, arrays: tuple[Array, ...], params: Mapping[str, Any], call: Callable[[], Any]) -> Any:
        given = [copied(backend, a) for a in arrays]
        try:
            result = call()
            got = [copied(backend, r) for r in outputs(result)]
        except Exception as error:  # whatever a kernel does is for the comparison to say
            look(Seen(op, phase, current_place(), params, given, None, [], raised(error)))
            raise
        kept = [i for i in range(len(arrays)) if i not in op.writes]
        changed = [i for i in kept if not same_bits(given[i], copied(backend, arrays[i]))]
        problem = f"input {input_name(op, changed[0])} was changed" if changed else ""
        look(Seen(op, phase, current_place(), params, given, None, got, problem))
        return result

    return watch


def copied(backend: Backend, array: Array) -> np.ndarray:
    """The values as a NumPy array of its own, row after row."""
    return np.array(backend.numpy(array), order="C")


def raised(error: Exception) -> str:
    """What an op raised, in one line."""
    said = " ".join(str(error).split())
    return said if isinstance(error, UserError) else f"raised {type(error).__name__}: {said}"


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(_bytes(a), _bytes(b))


def key_of(array: np.ndarray) -> Key:
    return Key(hashlib.blake2b(_bytes(array).data, digest_size=16).hexdigest(), array.shape, array.dtype.name)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, order="C").reshape(-1).view(np.uint8)


class Store:
    """Arrays by what they hold, each once: the first `limit` bytes in memory, the rest in a temporary file."""

    def __init__(self, limit: int = IN_MEMORY) -> None:
        self.limit, self.held, self.size = limit, 0, 0
        self.arrays: dict[Key, np.ndarray] = {}
        self.places: dict[Key, int] = {}  # where in the file
        self.file: Any = None

    def keep(self, array: np.ndarray) -> Key:
        key = key_of(array)
        if key in self:
            return key
        if self.held + array.nbytes <= self.limit:
            self.arrays[key] = array
            self.held += array.nbytes
            return key
        if self.file is None:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115  goes with the store
        self.file.seek(self.size)
        self.file.write(_bytes(array))
        self.places[key] = self.size
        self.size += array.nbytes
        return key

    def __contains__(self, key: Key) -> bool:
        return key in self.arrays or key in self.places

    def get(self, key: Key) -> np.ndarray | None:
        """The array, or None where it was not kept."""
        if key not in self.places:
            return self.arrays.get(key)
        dtype = dtype_of(key.dtype)
        self.file.seek(self.places[key])
        count = int(np.prod(key.shape, dtype=np.int64)) * dtype.itemsize
        return np.frombuffer(self.file.read(count), dtype).reshape(key.shape)


class Call(NamedTuple):
    """One call of an op in a recording."""

    op: str
    phase: str
    place: str
    params: str  # as `described` says them
    inputs: tuple[Key, ...]
    outputs: tuple[Key, ...]
    problem: str


@dataclass
class Recording:
    """Every call of one training step, in order."""

    name: str
    what: str  # the backend's description of itself
    dtype: str
    products: str
    calls: list[Call] = field(default_factory=list)
    params: list[Mapping[str, Any]] = field(default_factory=list)  # of each call; none where a file was read
    store: Store = field(default_factory=Store)
    loss: float | None = None  # None where the step broke down before it
    error: str = ""  # what broke the step, where something did
    facts: Mapping[str, Any] = field(default_factory=dict)  # machine, settings: what a trace says of its making

    def seen(self, number: int, params: Mapping[str, Any]) -> Seen:
        """Call `number`, from 0, with parameters that `Call.params` says as text."""
        call = self.calls[number]
        given = [self.store.get(key) for key in call.inputs]
        got = [array for key in call.outputs if (array := self.store.get(key)) is not None]
        return Seen(OPS[call.op], call.phase, call.place, params, given, call.inputs, got, call.problem)


def record(
    side: Side, make_model: MakeModel, batch: PackedBatch, step: int = 1, learning_rate: float = 1e-4,
    limit: int = IN_MEMORY,
) -> Recording:  # fmt: skip
    """Run the `step`-th step of a new model on one batch and keep every call; the steps before it run unseen."""
    training = Training(side, make_model, lambda number: batch, learning_rate)
    for _ in range(step - 1):
        training.step()
    return record_step(training, limit)


def record_step(training: Training, limit: int = IN_MEMORY) -> Recording:
    """Run the next step and keep every call. What breaks the step is in `error`."""
    side = training.side
    made = Recording(side.name, side.describe(), side.dtype, side.products, store=Store(limit))

    def look(seen: Seen) -> None:
        given, got = (tuple(made.store.keep(np.asarray(a)) for a in arrays) for arrays in (seen.inputs, seen.outputs))
        text = described(seen.params)
        made.params.append(seen.params)
        made.calls.append(Call(seen.op.name, seen.phase, seen.place, text, given, got, seen.problem))

    try:
        made.loss = training.step(look)
    except MemoryError:
        raise
    except Exception as error:  # whatever a wrong kernel leads to
        if not made.calls:
            raise
        made.error = raised(error)
    return made


def described(params: Mapping[str, Any]) -> str:
    """Parameters as text that is the same on every machine."""
    return ", ".join(f"{k}={_plain(v)}" for k, v in sorted(params.items()))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def save(recording: Recording, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a trace. `facts`: machine, versions, and the settings from which weights and batch can be made again.

    Raises UserError where the step broke down, or the file cannot be written.
    """
    if recording.error:
        raise UserError(f"--record: the step broke down, so there is nothing to record: {recording.error}")
    wanted = {key for call in recording.calls for key in (*call.outputs, *_read_by_the_optimiser(call))}
    arrays = {key.digest + _suffix(key): recording.store.get(key) for key in wanted}
    about = {
        "format": FORMAT,
        "name": recording.name,
        "what": recording.what,
        "dtype": recording.dtype,
        "products": recording.products,
        "loss": repr(recording.loss),
        "facts": json.dumps(dict(facts)),
        "calls": json.dumps(recording.calls),
    }
    write_arrays(path, {name: array for name, array in arrays.items() if array is not None}, about)


def _read_by_the_optimiser(call: Call) -> Iterable[Key]:
    """Gradients, which lie in one flat array that no op gave."""
    written = OPS[call.op].writes
    return [key for i, key in enumerate(call.inputs) if i not in written] if call.phase == "optimiser" else []


def _suffix(key: Key) -> str:
    """The same bytes may be arrays of several shapes."""
    return f".{key.dtype}.{'x'.join(map(str, key.shape))}"


def is_trace(path: Path) -> bool:
    """Whether a file is what `--record` writes."""
    try:
        with safe_open(path, framework="numpy") as opened:
            return (opened.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def load(path: Path) -> Recording:
    """Read a trace. Raises UserError for a file that is none, or that names ops which do not exist here."""
    arrays, about = read_arrays(path)
    if about.get("format") != FORMAT:
        raise UserError(f"{path}: expected what `minibert diff A --record FILE` writes, got another safetensors file")
    try:
        return recording_of(path, arrays, about)
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path} is a damaged trace ({' '.join(str(error).split())}): record it anew") from None


def recording_of(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, str]) -> Recording:
    """What a trace's arrays and metadata say. Raises whatever follows from metadata that are not as `save` writes."""
    made = Recording(
        f"{path.name}: {about['name']}", about["what"], about["dtype"], about["products"],
        loss=float(about["loss"]), facts=json.loads(about["facts"]),
    )  # fmt: skip
    for op, phase, place, params, *both, problem in json.loads(about["calls"]):
        if op not in OPS:
            raise UserError(f"{path}: this minibert has no op {op!r}: compare with the version that recorded it")
        given, got = (tuple(Key(d, tuple(map(index, shape)), dtype) for d, shape, dtype in keys) for keys in both)
        texts = (place, params, problem, *(text for key in (*given, *got) for text in (key.digest, key.dtype)))
        if phase not in PHASES or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"a call of {op} that no step makes")
        made.calls.append(Call(op, phase, place, params, given, got, problem))
        for key in (*given, *got):
            name = key.digest + _suffix(key)
            if name in arrays and key not in made.store:
                made.store.arrays[key] = arrays[name].astype(dtype_of(key.dtype), copy=False)
        if any(key not in made.store for key in got):
            raise UserError(f"{path}: an output of {op} is missing: record it anew")
    return made
