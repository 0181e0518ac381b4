"""Inference, ours and others' in turn: `python -m bench.infer --config minilm --batch 8 --vs torch,onnxruntime`.

No dropout and no gradient; the same weights and ids. The result is the last hidden state, or with `--logits` the
vocabulary's logits on every position. Two measures, kept apart:

dense    every sequence has T tokens
packed   real text of real lengths: ours packs it, the others pad to the longest of each batch, with its attention mask

The outputs of the real tokens are compared before the timing and, on inputs not seen, after it; where they differ
nothing is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import typer

from bench.peers import onnx_bert as onnx_peer
from bench.peers import torch_bert as torch_peer
from bench.timing import frame, harness
from bench.timing.batches import Batch, work
from minibert import backends
from minibert.backends import Backend
from minibert.errors import UserError
from minibert.kernels.cpu.tiles import byte_instructions
from minibert.model.config import BertConfig
from minibert.model.quantized import make_int8
from minibert.model.tensor import no_grad
from minibert.tasks.quantize import groups_of

MEASURES = {
    "dense": "dense: every sequence has all its tokens",
    "packed": "packed: real text; ours packs it, the others pad it to the longest of each batch",
}
OPPONENTS = ("torch", "torch.bf16", "torch.compile", "onnxruntime", "onnxruntime.int8", "numba.float32")
SHORTEST = 0.05  # seconds that one turn lasts: quick passes are repeated in it
SAME = 1e-3  # of the largest output: outputs further apart are not those of the same model
NEAR = 0.3  # of it, where one of the two computes in fewer bits; those of another model are 1 apart


@dataclass(frozen=True)
class Task(frame.Task):
    """What is to be measured."""

    logits: bool = False
    int8: bool = False


@dataclass(frozen=True)
class Options(frame.Options):
    """The options that inference alone has."""

    logits: Annotated[bool, typer.Option(help="The vocabulary's logits on every position.")] = False
    int8: Annotated[bool, typer.Option("--int8", help="Ours with the encoder's linear layers in int8.")] = False


class OurInference(frame.Ours):
    """minibert's model on one backend."""

    def __init__(
        self, config: BertConfig, weights: torch_peer.Weights, backend: Backend, logits: bool, int8: bool = False,
        dtype: str = "float32",
    ) -> None:  # fmt: skip
        super().__init__(config, weights, backend, dtype)
        self.logits = logits
        if int8:
            layers = [name for group in groups_of(self.model).values() for name in group]
            make_int8(self.model, layers, values=True)
            self.library += f", {len(layers)} linear layers in int8 ({byte_instructions()})"
        self.model.eval().prepack()

    def prepare(self, batch: Batch) -> Any:
        return batch.packed._replace(labels=None, predicted=None, targets=None)

    def run(self, packed: Any) -> np.ndarray:
        with no_grad():
            if self.logits:
                return np.asarray(self.model(packed).logits.numpy())
            return self.model.bert(packed).last_hidden_state.numpy()

    def rows(self, output: Any, batch: Batch) -> np.ndarray:
        """The outputs of the real tokens: (N, C) or (N, V)."""
        return np.asarray(output)


def side(name: str, task: Task, weights: torch_peer.Weights, example: Batch) -> Any:
    """The side of this name: a backend of ours, or another library. Raises whatever that library raises."""
    if name.startswith("onnxruntime"):
        if onnx_peer.missing():
            raise UserError(onnx_peer.missing())
        return onnx_peer.OnnxInference(task.config, weights, task.threads, task.logits, example, name.endswith("int8"))
    if name.endswith(frame.IN_FLOAT32):
        ours = OurInference(task.config, weights, backends.get(name.removesuffix(frame.IN_FLOAT32)), task.logits)
        ours.name = name
        return ours
    if name in OPPONENTS:
        return torch_peer.TorchInference(
            task.config, weights, task.threads, task.logits, compiled=name.endswith("compile"),
            bfloat16=name.endswith("bf16"),
        )  # fmt: skip
    return OurInference(task.config, weights, backends.get(name), task.logits, task.int8, task.dtype)


def turn(one: Any, prepared: Any) -> None:
    one.run(prepared)


def flops(task: Task, batch: Batch, theirs: bool) -> int:
    """Of a pass."""
    return work(task.config, batch, theirs, "every" if task.logits else "no")


def found(one: Any, batch: Batch, timed: bool) -> np.ndarray:
    """The outputs of the real tokens."""
    return one.rows(one.run(one.prepare(batch)), batch).astype(np.float64)


def judge(facts: dict[str, Any], each: Mapping[str, np.ndarray], timed: bool) -> None:
    """How far outputs are from the first side's: the largest distance, over the largest output."""
    (first_name, first), *others = each.items()
    largest = float(np.abs(first).max())
    apart = {name: float(np.abs(rows - first).max()) / largest for name, rows in others}
    facts.setdefault("apart", {})["after" if timed else "before"] = apart
    few = facts["fewer_bits"] = frame.in_fewer_bits(facts)
    facts["refused"] = refusal(apart, {name: NEAR if {name, first_name} & {*few} else SAME for name in apart})


def refusal(apart: Mapping[str, float], allowed: Mapping[str, float]) -> str:
    """Why the sides do not compute the same; empty where they do."""
    for name, distance in apart.items():
        if not distance <= allowed[name]:
            return f"the outputs of {name} are {distance:.2g} of the largest away: it does not compute the same"
    return ""


BENCH = frame.Bench(
    "infer", "Time inference against others'.", MEASURES, OPPONENTS, Task, side, turn, flops, found, judge,
    worker="bench.infer:one_pass", shortest=SHORTEST,
)  # fmt: skip
measure, one_pass = partial(frame.measure, BENCH), partial(frame.peak, BENCH)
bench = frame.command(BENCH, Options)

if __name__ == "__main__":
    harness.run_main(bench)
