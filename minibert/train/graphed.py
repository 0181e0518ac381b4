"""Steps of training as captured graphs: recorded once for each shape of batch, then queued again in one call each.

A batch is filled up to one of few shapes (`model.packing.in_fixed_shape`). A shape that is new runs op by op; when
it comes again the step is captured, in two graphs: gradients and their norm, then, if that is finite, the update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minibert.backends.cuda.graph import Capture, LiveFloat, LiveInt
from minibert.errors import UserError
from minibert.kernels.op import Array
from minibert.model.bert import BertForMaskedLM
from minibert.model.packing import FixedShape, Packed, in_fixed_shape
from minibert.train.optim import AdamW


@dataclass
class Recorded:
    """The graphs of one shape, and what changes from replay to replay."""

    gradients: Capture
    update: Capture
    number: LiveInt  # of the step: names the dropout masks
    learning_rate: LiveFloat
    step_count: LiveInt
    loss: Array
    square_norm: Array
    grad_scale: Array  # goes from the one graph to the other


class GraphedSteps:
    """The steps of one model and optimiser. Raises UserError for a backend that captures no graphs."""

    def __init__(self, model: BertForMaskedLM, optimizer: AdamW, tokens_per_batch: int) -> None:
        self.backend: Any = model.backend
        if not hasattr(self.backend, "capturing"):
            raise UserError(f"--graph: backend {self.backend.name} has no graphs; expected cupy or emulator")
        self.model, self.optimizer, self.tokens = model, optimizer, tokens_per_batch
        model.head_in_parts = False  # the labels of a part would be uploaded, and its weight be fixed, within a graph
        self.recorded: dict[FixedShape, Recorded | None] = {}  # None: seen once
        self.ahead: tuple[Packed, Packed, FixedShape, Any] | None = None  # see `prepare`
        self.replays = 0

    def gradients(self, packed: Packed, number: int) -> tuple[Array, Array, Recorded | None]:
        """Loss and square norm of the gradients, on the device; and the recording that `update` replays."""
        if self.ahead is None or self.ahead[0] is not packed:
            self.prepare(packed)
        assert self.ahead is not None
        _, packed, shape, staged = self.ahead
        if shape not in self.recorded:
            self.recorded[shape] = None
            return *self._run(packed, number), None
        recorded = self.recorded[shape]
        if recorded is None:
            recorded = self.recorded[shape] = self._record(packed, number)
        recorded.number.current = number
        recorded.gradients.replay(packed._asdict() if staged is None else staged)
        self.replays += 1
        return recorded.loss, recorded.square_norm, recorded

    def prepare(self, packed: Packed) -> None:
        """Make the host's part of a step ready, while the device may still be at the one before."""
        pad_id = self.model.config.pad_token_id
        filled, shape = in_fixed_shape(packed, self.tokens, 0 if pad_id is None else pad_id)
        recorded = self.recorded.get(shape)
        staged = None if recorded is None else recorded.gradients.stage(filled._asdict())
        self.ahead = packed, filled, shape, staged

    def _run(self, packed: Packed, number: int) -> tuple[Array, Array]:
        self.optimizer.zero_grad()
        self.model.step = number
        loss = self.model(packed, return_dict=True).loss
        loss.backward()
        return loss.data, self.optimizer.square_norm()

    def _record(self, packed: Packed, number: int) -> Recorded:
        with self.backend.capturing() as gradients:
            live_number = self.backend.live_int(number)
            loss, square_norm = self._run(packed, live_number)
            scale = self.optimizer.clip_scale(square_norm)
        gradients.bind(packed._asdict())
        with self.backend.capturing() as update:
            learning_rate, step_count = LiveFloat(self.optimizer.lr), self.backend.live_int(1)
            self.optimizer.update(scale, learning_rate, step_count)
        update.bind({})
        return Recorded(gradients, update, live_number, learning_rate, step_count, loss, square_norm, scale)

    def update(self, recorded: Recorded | None, square_norm: Array) -> None:
        """Update the parameters from the gradients of the last call."""
        optimizer = self.optimizer
        optimizer.step_count += 1
        if recorded is None:
            optimizer.update(optimizer.clip_scale(square_norm), optimizer.lr, optimizer.step_count)
            return
        recorded.learning_rate.current = optimizer.lr
        recorded.step_count.current = optimizer.step_count
        recorded.update.replay({})
        for group in optimizer.groups:
            for p in group.params:
                p.wrote()
