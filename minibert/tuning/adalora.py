"""AdaLoRA: low-rank updates as triplets, of which the least important are pruned while training goes on.

Zhang, Chen, Bukharin, He, Cheng, Chen, Zhao, "Adaptive budget allocation for parameter-efficient fine-tuning" (ICLR
2023), with what the authors' code and PEFT do where the paper says otherwise: the regulariser's norms are not squared,
s is divided by the first rank for ever, ties at the threshold are all pruned, and between two prunings what was pruned
may come back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from minibert.errors import UserError
from minibert.model.nn import Parameter, Place
from minibert.model.tensor import Tensor
from minibert.tuning.config import AdaLoraConfig
from minibert.tuning.files import PREFIX, demand_the_same
from minibert.tuning.low_rank import LowRank
from minibert.tuning.peft_model import PeftModel

NAMES = ("lora_A", "lora_B", "lora_E")
STATE = "adalora."  # before the names of what a run needs besides, to go on


class Triplets(LowRank):
    """s B diag(E) A (equation 3): lora_A (r, in), lora_B (out, r), lora_E (r, 1)."""

    def __init__(
        self, layer: str, shape: tuple[int, int], rank: int, scaling: float, rate: float, seed: int, place: Place
    ) -> None:
        super().__init__(layer, shape, rank, scaling, rate, seed, place)
        self.lora_E = Parameter((rank, 1), "zeros", place)

    def initialise(self, how: Any) -> None:
        """A and B normal, of std 0.02, and E 0, so that training begins at the model; False: all normal, of std 1."""
        for name in NAMES:
            values = self.normal(name, 0.02 if how else 1.0)
            getattr(self, name).assign(values * 0 if how and name == "lora_E" else values)

    def a(self) -> Tensor:
        """diag(E) A, (r, in)."""
        return self.lora_A * self.lora_E

    def delta(self) -> np.ndarray:
        """s B diag(E) A, (out, in), in float32 or better."""
        wide = np.result_type(self.lora_A.dtype, np.float32)
        a, b, e = (np.asarray(p.numpy(), wide) for p in (self.lora_A, self.lora_B, self.lora_E))
        return (b @ (a * e)) * np.asarray(self.scaling, wide)

    def keep(self, kept: np.ndarray) -> None:
        """Set E to 0 where `kept` (r,) is False."""
        self.lora_E.assign(np.where(kept[:, None], self.lora_E.numpy(), 0))

    def distances(self) -> list[Tensor]:
        """The squares of ‖P P' - I‖_F for A and for B', as far as P has rows."""
        squares = []
        for p in (self.lora_A, self.lora_B.transpose(1, 0)) if self.rank else ():
            off = p @ p.transpose(1, 0) - np.eye(self.rank)
            squares.append((off * off).sum())
        return squares


class RankAllocator:
    """Which triplets are kept: importance by smoothed sensitivity times its uncertainty, under a falling budget.

    Of a weight w with gradient g: I = |w g|; J = beta1 J + (1 - beta1) I; U = beta2 U + (1 - beta2) |I - J|; s = J U
    (equations 8 to 11). Of a triplet: s of its E plus the means of s over its row of A and column of B (equation 7).
    """

    def __init__(self, layers: Mapping[str, Triplets], config: AdaLoraConfig) -> None:
        self.layers, self.config = layers, config
        shapes = {f"{layer}.{name}": getattr(at, name).shape for layer, at in layers.items() for name in NAMES}
        self.sensitivity = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        self.uncertainty = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        self.kept = {name: np.ones(config.init_r, bool) for name in layers}
        self.updates = 0  # of the averages
        self.pruned = self.final = False  # once; for the last time

    def budget(self, step: int) -> int:
        """How many triplets of all layers are kept after a step (equation 12)."""
        c, count = self.config, len(self.layers)
        first, last = c.init_r * count, c.target_r * count
        if step <= c.tinit:
            return first
        if step > c.total_step - c.tfinal:
            return last
        return int((first - last) * (1 - (step - c.tinit) / (c.total_step - c.tfinal - c.tinit)) ** 3 + last)

    def update_and_allocate(self, step: int, clip_factor: float) -> None:
        """Take note of a step's gradients, and prune where that is due; in the final phase keep what is pruned so."""
        c = self.config
        if step < c.total_step - c.tfinal:
            self._update(clip_factor)
            if step > c.tinit and step % c.deltaT == 0:
                self._prune(self.budget(step))
            return
        if not self.final:
            self._prune(self.budget(step))
            self.final = True
        for name, layer in self.layers.items():
            layer.keep(self.kept[name])

    def _update(self, clip_factor: float) -> None:
        c = self.config
        parameters = {f"{layer}.{name}": getattr(at, name) for layer, at in self.layers.items() for name in NAMES}
        if all(p.grad is None for p in parameters.values()):
            raise UserError("update_and_allocate: expected gradients: call it after step() and before zero_grad()")
        for name, p in parameters.items():
            seen = np.zeros(p.shape, np.float32)  # also of what the loss does not depend on
            if p.grad is not None:
                gradient = np.asarray(p.backend.numpy(p.grad), np.float32) * np.float32(clip_factor)
                seen = np.abs(np.asarray(p.numpy(), np.float32) * gradient)
            smooth, spread = self.sensitivity[name], self.uncertainty[name]
            smooth[...] = c.beta1 * smooth + (1 - c.beta1) * seen
            spread[...] = c.beta2 * spread + (1 - c.beta2) * np.abs(seen - smooth)
        self.updates += 1

    def importance(self, layer: str) -> np.ndarray:
        """(r,) of a layer's triplets."""
        a, b, e = (self.sensitivity[f"{layer}.{name}"] * self.uncertainty[f"{layer}.{name}"] for name in NAMES)
        return e[:, 0] + (a.mean(axis=1) + b.mean(axis=0))

    def _prune(self, budget: int) -> None:
        """Keep the most important triplets; of those that tie with the last that is pruned, none."""
        if not self.updates:
            raise UserError("update_and_allocate: expected to be called after every step, from the first on")
        of = {name: self.importance(name) for name in self.layers}
        every = np.concatenate(list(of.values()))
        threshold = np.sort(every)[len(every) - budget - 1] if budget < len(every) else -np.inf
        for name, layer in self.layers.items():
            self.kept[name] = of[name] > threshold
            layer.keep(self.kept[name])
        self.pruned = True

    def state_dict(self) -> dict[str, np.ndarray]:
        """Averages, what is kept, and how far this came: a run that goes on from it prunes alike."""
        came = np.array([self.updates, self.pruned, self.final], np.float32)
        return {
            "progress": came,
            **{f"sensitivity.{name}": values.copy() for name, values in self.sensitivity.items()},
            **{f"uncertainty.{name}": values.copy() for name, values in self.uncertainty.items()},
            **{f"kept.{name}": np.asarray(kept, np.float32) for name, kept in self.kept.items()},
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take what `state_dict` gave. Raises UserError for what is missing, surplus or of another shape."""
        demand_the_same(state, {name: values.shape for name, values in self.state_dict().items()})
        for name in self.sensitivity:
            self.sensitivity[name][...] = state[f"sensitivity.{name}"]
            self.uncertainty[name][...] = state[f"uncertainty.{name}"]
        self.kept = {name: state[f"kept.{name}"] != 0 for name in self.kept}
        self.updates = int(state["progress"][0])
        self.pruned, self.final = (bool(one) for one in state["progress"][1:])


class AdaLoraModel(PeftModel):
    """A model with triplets, for whose training `before_update` and `update_and_allocate` are due.

    The loss that it puts out is the task's own, in training too: that of PEFT has the regulariser in it, but where
    there is no `task_type`. One that was loaded keeps the ranks it has.
    """

    config_types: ClassVar[tuple[type, ...]] = (AdaLoraConfig,)
    suffix = ""
    layers: dict[str, Triplets]
    peft_config: AdaLoraConfig

    def __init__(self, model: Any, config: AdaLoraConfig, *, loaded: bool = False) -> None:
        if config.rank_pattern and not loaded:
            raise UserError("rank_pattern: with AdaLoRA it comes out of training: leave it out")
        super().__init__(model, config, loaded=loaded)
        strange = sorted(self._kept_of_config().keys() ^ self.layers.keys()) if config.rank_pattern else []
        if strange:
            self.unload()
            raise UserError(f"rank_pattern: expected one entry for each layer that is tuned, but not so {strange[0]!r}")
        self.allocator = None if loaded else RankAllocator(self.layers, config)

    def _kept_of_config(self) -> dict[str, list[bool]]:
        pattern = self.peft_config.rank_pattern
        return {name.removesuffix(".default").removesuffix(".lora_E"): kept for name, kept in pattern.items()}

    def _low_rank(self, name: str) -> Triplets:
        config = self.peft_config
        rank = sum(self._kept_of_config().get(name, [True] * config.init_r))
        outs, ins = self.targets[name].weight.declared_shape
        scaling = config.lora_alpha / (config.init_r + 1e-5)  # the constant of PEFT and of the authors
        layer = Triplets(name, (outs, ins), rank, scaling, config.lora_dropout, self.model.seed, self.model.place)
        layer.initialise(config.init_lora_weights)
        return layer.train(self.model.training)

    def before_update(self) -> float:
        """Add to the gradients those of `orth_reg_weight` times `orthogonality`. Returns that, a part of the loss."""
        if not self.peft_config.orth_reg_weight:
            return 0.0
        regularizer = self.orthogonality() * self.peft_config.orth_reg_weight
        regularizer.backward()
        return regularizer.item()

    def orthogonality(self) -> Tensor:
        """The mean of ‖P P' - I‖_F over all A and B' (equation 4, where it is squared; here it is not)."""
        squares = [square for layer in self.layers.values() for square in layer.distances()]
        share, place = 1 / (2 * len(self.layers)), self.model.place
        total = Tensor(place.backend.asarray(0.0, dtype=place.dtype), place.backend)
        for square in squares:
            # With the norm n as a number, n²/2n + n/2 has the value of n and its gradient.
            norm = square.item() ** 0.5
            if norm > 0:
                total = total + square * (share / (2 * norm)) + share * norm / 2
        return total

    def update_and_allocate(self, global_step: int, clip_factor: float = 1.0) -> None:
        """Take note of importance, and prune. Raises UserError where there are no gradients.

        A model that was loaded has nothing to do.
        """
        if self.allocator is not None:
            self.allocator.update_and_allocate(global_step, clip_factor)

    def ranks(self) -> dict[str, int]:
        """How many triplets of each layer are kept."""
        if self.allocator is None:
            return {name: layer.rank for name, layer in self.layers.items()}
        return {name: int(kept.sum()) for name, kept in self.allocator.kept.items()}

    def state_dict(self) -> dict[str, np.ndarray]:
        """A copy of all that a run needs to go on: what is trained, and the averages by which it is pruned."""
        more = {} if self.allocator is None else self.allocator.state_dict()
        return {**self.values(), **{STATE + name: values for name, values in more.items()}}

    def load_state_dict(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take what `state_dict` gave. Raises UserError for a tensor that is missing, surplus or of another shape."""
        more = {name.removeprefix(STATE): values for name, values in arrays.items() if name.startswith(STATE)}
        if self.allocator is not None:
            self.allocator.load_state_dict(more)
        self.assign({name: values for name, values in arrays.items() if not name.startswith(STATE)})

    def _to_save(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Cut to the triplets whose E is not 0: between two prunings those that came back are a part of the model."""
        config, arrays = super()._to_save()
        if self.allocator is None or not self.allocator.pruned:
            return config, arrays
        pattern = {}
        for layer in self.layers:
            kept = arrays[f"{PREFIX}{layer}.lora_E"][:, 0] != 0
            pattern[f"{layer}.lora_E"] = kept.tolist()
            for name in NAMES:
                key = f"{PREFIX}{layer}.{name}"
                arrays[key] = arrays[key][:, kept] if name == "lora_B" else arrays[key][kept]
        return {**config, "rank_pattern": pattern}, arrays
