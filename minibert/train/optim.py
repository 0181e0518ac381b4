"""AdamW on flat memory, clipping by global norm, and the learning-rate schedule of BERT."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from minibert.backends.base import NARROW
from minibert.errors import UserError
from minibert.kernels.adamw import adamw, adamw_shadow, clip_scale, square_norm
from minibert.kernels.elementwise import add
from minibert.kernels.op import Array
from minibert.model.nn import Module, Parameter
from minibert.train.config import OptimizationConfig


@dataclass
class ParameterGroup:
    """Parameters that share a weight decay, laid one after the other in flat arrays.

    Where they are stored in 16 bits, `master` is the same in float32: it is what is updated, and `param` follows it.
    """

    params: list[Parameter]
    weight_decay: float
    lr_scale: float = 1.0  # of the optimiser's learning rate
    offsets: list[int] = field(default_factory=list)
    buffers: list[Any] = field(default_factory=list)  # each parameter's part of `grad`
    param: Array = None
    master: Array = None
    grad: Array = None
    exp_avg: Array = None
    exp_avg_sq: Array = None

    def flatten(self) -> None:
        """Move the parameters into one flat array, and have their gradients written into another."""
        first = self.params[0]
        self.offsets = np.cumsum([0, *(p.data.size for p in self.params)]).tolist()
        narrow = first.dtype.name in NARROW
        flat = np.empty(self.offsets[-1], first.dtype)
        zeros = np.zeros(flat.shape, np.float32 if narrow else first.dtype)
        self.param, self.grad, self.exp_avg, self.exp_avg_sq = (
            first.backend.asarray(values) for values in (flat, flat.copy(), zeros, zeros.copy())
        )
        for p, start, stop in zip(self.params, self.offsets, self.offsets[1:], strict=False):
            p.move(self.param[start:stop].reshape(p.declared_shape))
            p.grad_buffer = self.grad[start:stop].reshape(p.declared_shape)
            self.buffers.append(p.grad_buffer)
        if narrow:
            self.master = first.backend.asarray(self.param, dtype=np.float32)
            for p, start, stop in zip(self.params, self.offsets, self.offsets[1:], strict=False):
                p.master = self.master[start:stop].reshape(p.declared_shape)

    @property
    def kept(self) -> tuple[str, ...]:
        """What a run must save to go on from."""
        return ("exp_avg", "exp_avg_sq") if self.master is None else ("exp_avg", "exp_avg_sq", "master")

    def spans(self) -> list[slice]:
        """Where there are gradients, as long slices: usually one. A parameter without a gradient is left alone."""
        found: list[slice] = []
        for p, buffer, start, stop in zip(self.params, self.buffers, self.offsets, self.offsets[1:], strict=False):
            if p.grad_buffer is not buffer:
                raise UserError("AdamW: another optimiser was made for these parameters since; step that one")
            if p.grad is None:
                continue
            if p.grad is not buffer:  # set by hand, or before this optimiser was made
                self.grad[start:stop] = p.grad.reshape(-1)
                p.grad = buffer
            if found and found[-1].stop == start:
                found[-1] = slice(found[-1].start, stop)
            else:
                found.append(slice(start, stop))
        return found


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), one op call for each group.

    `params` is a list of parameters, or of mappings {"params": [...], "weight_decay": ...} as in torch; such a group
    may have an `lr_scale`, a factor of the learning rate. `max_grad_norm` clips by the global norm of all gradients
    (Pascanu et al. 2013). Parameters that are frozen by now (`requires_grad` is False) are left out, and take no memory
    here. Raises UserError for a list that is empty, has repetitions, or holds nothing but frozen parameters.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.01, max_grad_norm: float | None = None,
    ) -> None:  # fmt: skip
        numbers: dict[str, Any] = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
        for key, number in numbers.items():
            if not isinstance(number, Real) and not (key == "max_grad_norm" and number is None):
                raise UserError(f"AdamW: expected {key} to be a number, got {reprlib.repr(number)}")
        if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(isinstance(b, int | float) for b in betas):
            raise UserError(f"AdamW: expected betas to be two numbers, got {reprlib.repr(betas)}")
        given = _parameters(params)
        groups: list[Any] = given if given and isinstance(given[0], Mapping) else [{"params": given}]
        for name, value, valid in (
            ("lr", lr, lr >= 0), ("betas", betas, all(0 <= b < 1 for b in betas)), ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("max_grad_norm", max_grad_norm, max_grad_norm is None or max_grad_norm > 0),
        ):  # fmt: skip
            if not valid:
                raise UserError(
                    f"AdamW: {name} {value} is out of range: betas lie in [0, 1), max_grad_norm > 0, all else >= 0"
                )
        unknown = {key for group in groups for key in group} - {"params", "weight_decay", "lr_scale"}
        if unknown:
            raise UserError(
                f"AdamW: a group holds params, weight_decay and lr_scale, got {', '.join(sorted(unknown))} as well"
            )
        made = [
            ParameterGroup(
                _parameters(g.get("params", ())),
                float(g.get("weight_decay", weight_decay)),
                float(g.get("lr_scale", 1)),
            )
            for g in groups
        ]
        if any(group.weight_decay < 0 or group.lr_scale < 0 for group in made):
            raise UserError("AdamW: expected a weight_decay and an lr_scale of 0 or more in every group")
        everything = [p for group in made for p in group.params]
        if not everything or len(set(map(id, everything))) != len(everything):
            raise UserError(f"AdamW: expected each parameter once, got {len(everything)} with repetitions, or none")
        if any(p.data.dtype.kind == "i" for p in everything):
            raise UserError("AdamW: weights in int8 are not trained: take the model in floats that they were made of")
        for group in made:
            group.params = [p for p in group.params if p.requires_grad]
        self.groups = [group for group in made if group.params]
        if not self.groups:
            raise UserError("AdamW: every parameter is frozen: set requires_grad of those that are to be trained")
        self.lr, self.betas, self.eps, self.max_grad_norm = lr, betas, eps, max_grad_norm
        self.step_count = 0
        self.grad_norm: float | None = None  # of the last step, before clipping; only known where it is clipped
        for group in self.groups:
            group.flatten()
        self.groups[0].params[0].backend.release_memory()  # the arrays that the parameters had before

    @classmethod
    def of(cls, config: OptimizationConfig, groups: list[dict[str, Any]]) -> AdamW:
        """The optimiser that a run's config describes."""
        betas = config.adam_beta1, config.adam_beta2
        return cls(groups, config.learning_rate, betas, config.adam_epsilon, max_grad_norm=config.max_grad_norm)

    @property
    def clip_factor(self) -> float:
        """By what the gradients of the last step, which stay as they were, were multiplied: 1 if not clipped."""
        if self.max_grad_norm is None or self.grad_norm is None:
            return 1.0
        return min(1.0, self.max_grad_norm / (self.grad_norm + 1e-6))

    def zero_grad(self) -> None:
        """Forget every gradient."""
        for group in self.groups:
            for p in group.params:
                p.grad = None

    def square_norm(self) -> Array:
        """The sum of squares of all gradients, on the backend; None where there is no gradient."""
        backend = self.groups[0].params[0].backend
        total: Array = None
        for group in self.groups:
            for span in group.spans():
                part = backend.run(square_norm, group.grad[span])
                total = part if total is None else backend.run(add, total, part)
        return total

    def clip_scale(self, square_norm: Array) -> Array:
        """The factor of every gradient, a 0-d array: below 1 where their norm is above `max_grad_norm`."""
        first = self.groups[0].params[0]
        if self.max_grad_norm is None:
            wide = "float32" if first.dtype.name in NARROW else first.dtype
            return first.backend.asarray(1.0, dtype=wide)
        return first.backend.run(clip_scale, square_norm, max_norm=self.max_grad_norm)

    def check_norm(self, square_norm: Array) -> None:
        """Note the norm of the gradients. Raises FloatingPointError where it is not finite."""
        self.grad_norm = float(self.groups[0].params[0].backend.numpy(square_norm)) ** 0.5
        if not math.isfinite(self.grad_norm):
            raise FloatingPointError(f"AdamW: the gradient norm is {self.grad_norm}; nothing was updated")

    def step(self) -> None:
        """Update every parameter that has a gradient.

        Raises FloatingPointError, with nothing updated, where the gradients are clipped and their norm is not finite.
        """
        total = None
        if self.max_grad_norm is not None:
            total = self.square_norm()
            if total is None:  # nothing had a gradient
                self.grad_norm = 0.0
            else:
                self.check_norm(total)
        if any(group.spans() for group in self.groups):
            self.step_count += 1
            self.update(self.clip_scale(total), self.lr, self.step_count)

    def update(self, grad_scale: Array, lr: float, step: int) -> None:
        """Queue the update alone: nothing is looked at, so that it can be part of a captured graph."""
        for group in self.groups:
            backend = group.params[0].backend
            rate = lr if group.lr_scale == 1 else lr * group.lr_scale  # in a graph `lr` is live: a product is a number
            for span in group.spans():
                state: tuple[Array, ...] = (group.param, group.grad, group.exp_avg, group.exp_avg_sq)
                op = adamw
                if group.master is not None:
                    op, state = adamw_shadow, (group.param, group.master, *state[1:])
                backend.run(
                    op, *(array[span] for array in state), grad_scale,
                    lr=rate, step=step, beta1=self.betas[0], beta2=self.betas[1], eps=self.eps,
                    weight_decay=group.weight_decay,
                )  # fmt: skip
            for p in group.params:
                if p.grad is not None:
                    p.wrote()

    def state_dict(self) -> dict[str, np.ndarray]:
        """Both moments of every group, flat, its float32 weights where it has some, and the number of steps."""
        state = {"step_count": np.asarray(self.step_count)}
        for i, group in enumerate(self.groups):
            for name in group.kept:
                state[f"groups.{i}.{name}"] = np.array(group.params[0].backend.numpy(getattr(group, name)))
        return state

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take the moments of an optimiser over the same parameters. Raises UserError where they do not fit."""
        expected = {name: values.shape for name, values in self.state_dict().items()}
        given = {name: np.shape(values) for name, values in state.items()}
        if expected != given:
            name = min(n for n in expected.keys() | given.keys() if expected.get(n) != given.get(n))
            raise UserError(
                f"optimiser state: expected {name} of shape {expected.get(name)}, got {given.get(name)}; "
                "was it saved from another model?"
            )
        self.step_count = int(state["step_count"])
        for i, group in enumerate(self.groups):
            for name in group.kept:
                getattr(group, name)[...] = group.params[0].backend.asarray(state[f"groups.{i}.{name}"])


def _parameters(given: Any) -> list[Any]:
    """Parameters, or mappings that hold some, as a list."""
    mend = "model.parameters(), or a list of groups such as parameter_groups(model, weight_decay)"
    if isinstance(given, Parameter):
        raise UserError(f"AdamW: expected a list of parameters, got one: put it into a list, or give {mend}")
    if not isinstance(given, Iterable) or isinstance(given, Mapping | Module):
        raise UserError(f"AdamW: expected parameters, got {type(given).__name__}: give {mend}")
    listed = list(given)
    for one in listed:
        if not isinstance(one, Parameter | Mapping):
            raise UserError(f"AdamW: expected parameters, got {type(one).__name__} among them: give {mend}")
    return listed


def parameter_groups(model: Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: decay on matrices, none on biases and layer norms (Devlin et al. 2019, appendix A.2)."""
    decayed: list[Parameter] = []
    rest: list[Parameter] = []
    for _, parameter in model.named_parameters():
        (decayed if len(parameter.declared_shape) > 1 else rest).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def linear_schedule(step: int, warmup_steps: int, total_steps: int) -> float:
    """The factor of the learning rate at 0-based `step`: linear up over the warm-up, then linear down to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
