"""Training steps of BERT base, ours and PyTorch's in turn: the same batch, weights, dropout rates and optimiser.

Ours waits for loss and gradient norm in each step, as the trainer does; PyTorch's steps wait for nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from bench.gpu_check import torch_peer
from bench.gpu_check.part import Run
from bench.gpu_check.peaks import MODES, measured, products_in
from bench.timing.batches import PREDICTED, forward_flops, random_weights
from minibert.backends.cuda.pool import Pool
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import BertConfig
from minibert.model.packing import IGNORE, Packed, pack
from minibert.model.tensor import no_grad
from minibert.train.graphed import GraphedSteps
from minibert.train.optim import AdamW, parameter_groups

SHAPES = ((32, 128), (64, 512))  # (B, T)
ORDER = ("bfloat16", "tf32", "float32")  # what matters most comes first, should the time run out
BLOCK_SECONDS, ROUNDS, FEWEST_ROUNDS = 0.1, 11, 5
GROUP_SECONDS = 12.0  # what the groups yet to come are reckoned to take, each, without compiling
FIRST_COMPILE = 45.0  # seconds: a guess until one was measured
SAME_LOSS = 0.01  # relative: further apart, the two do not do the same work
OURS_EAGER, OURS_GRAPH, TORCH_EAGER, TORCH_COMPILED = "ours, eager", "ours, graph", "torch, eager", "torch.compile"


def steps(run: Run) -> None:
    """Each shape in each mode."""
    tiny = run.settings.tiny
    config = BertConfig() if not tiny else BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    shapes = ((2, 8),) if tiny else SHAPES
    modes = ("bfloat16", "tf32") if tiny else ORDER
    peaks = measured(run)
    groups: list[dict[str, Any]] = []
    lacking = torch_peer.missing()
    if lacking:
        run.skip(f"PyTorch: {lacking}")
    run.keep(config=config.to_dict(), groups=groups, predicted=PREDICTED)
    weights = random_weights(config)
    compile_s = FIRST_COMPILE
    todo = len(shapes) * len(modes)
    with run.at_speed():
        for batch, length in shapes:
            for mode in modes:
                todo -= 1
                name = f"B {batch}, T {length}, {mode}"
                if run.left() < GROUP_SECONDS and not tiny:
                    run.skip(f"{name}: {run.left():.0f} s are left")
                    continue
                group = {"batch": batch, "length": length, "mode": mode, "flops": flops(config, batch, length)}
                groups.append(group)
                spare = run.left() - GROUP_SECONDS * (todo + 1)
                one = Group(run, group, config, weights, None if lacking else "cpu" if run.emulated else "cuda")
                try:
                    one.measure(None if peaks is None else peaks.tflops[mode])
                    if lacking:
                        continue
                    if run.emulated or spare < 1.3 * compile_s:
                        why = "not on a CPU" if run.emulated else f"{spare:.0f} s to spare, it takes {compile_s:.0f} s"
                        run.skip(f"torch.compile of {name}: {why}")
                        continue
                    compile_s = one.add_compiled()
                    one.measure(None if peaks is None else peaks.tflops[mode])
                finally:
                    one.close()


# -------------------------------------------------------------------------------------------------------------- a group


class Group:
    """The contestants of one shape in one mode. What one of them raises is noted; the others go on."""

    def __init__(
        self, run: Run, facts: dict[str, Any], config: BertConfig, weights: torch_peer.Weights, torch_device: str | None
    ) -> None:
        self.run, self.facts, self.backend = run, facts, run.backend
        self.name = f"B {facts['batch']}, T {facts['length']}, {facts['mode']}"
        self.contestants: dict[str, Callable[[], Any]] = {}
        self.synchronize: dict[str, Callable[[], None]] = {}
        self.ours: Ours | None = None
        self.torch: torch_peer.TorchSteps | None = None
        facts["results"] = {}
        packed = random_batch(config, facts["batch"], facts["length"])
        facts["predicted"] = 0 if packed.predicted is None else len(packed.predicted)
        quiet: list[float | None] = [self._try("ours", lambda: self._ours(config, weights, packed))]
        if torch_device is not None:
            quiet.append(self._try("torch", lambda: self._torch(config, weights, packed, torch_device)))
        facts["loss_without_dropout"] = quiet
        known = [loss for loss in quiet if loss is not None]
        if len(known) == 2 and not abs(known[0] - known[1]) <= SAME_LOSS * abs(known[0]):
            facts["refused"] = f"without dropout the losses are {quiet}: they do not do the same work"

    def _ours(self, config: BertConfig, weights: torch_peer.Weights, packed: Packed) -> float:
        self.ours = Ours(self.backend, config, weights, packed, self.facts["mode"])
        loss = self.ours.quiet_loss()
        self._add(OURS_EAGER, self.ours.eager, self.backend.synchronize, self.ours.peak)
        self._add(OURS_GRAPH, self.ours.graph, self.backend.synchronize, self.ours.graph_peak)
        return loss

    def _torch(self, config: BertConfig, weights: torch_peer.Weights, packed: Packed, device: str) -> float:
        torch = torch_peer.TorchSteps(config, weights, packed, self.facts["length"], self.facts["mode"], device)
        self.torch, eager = torch, torch.loss_of
        self.facts["torch"] = torch.library
        loss = torch.quiet_loss()
        self._add(TORCH_EAGER, lambda: torch.step(eager), torch.synchronize, torch.peak)
        return loss

    def add_compiled(self) -> float:
        """torch.compile as one more contestant; the seconds that compiling took."""
        began = time.monotonic()
        self.run.say(f"{self.name}: torch.compile", always=True)
        torch = self.torch
        if torch is not None:
            torch.compile()
            compiled = torch.loss_of
            self._add(TORCH_COMPILED, lambda: torch.step(compiled), torch.synchronize, torch.peak)
        taken = time.monotonic() - began
        self.facts["compile_s"] = taken
        return taken

    def _add(
        self, name: str, step: Callable[[], Any], synchronize: Callable[[], None], peak: Callable[..., Any]
    ) -> None:
        """Warm it up: its first steps compile, allocate and capture."""
        self.run.say(f"{self.name}: {name}")

        def warm() -> float:
            peak(reset=True)
            for _ in range(3):
                loss = step()
            synchronize()
            self.facts["results"][name] = {"peak_memory": peak(), "loss": float(loss)}
            self.contestants[name], self.synchronize[name] = step, synchronize
            return 0.0

        self._try(name, warm)

    def _try(self, name: str, call: Callable[[], float]) -> float | None:
        try:
            return call()
        except Exception as error:
            gc.collect()
            self.facts["results"].setdefault(name, {})["error"] = f"{type(error).__name__}: {error}"[:500]
            self.run.skip(f"{name} of {self.name}: {type(error).__name__}: {error}"[:300])
            return None

    def measure(self, peak_tflops: float | None) -> None:
        """All in turn, round by round: what slows the machine down slows each of them."""
        calls = {name: max(1, int(self._block_seconds() / self._once(name))) for name in list(self.contestants)}
        taken: dict[str, list[float]] = {name: [] for name in self.contestants}
        began, tiny = time.monotonic(), self.run.settings.tiny
        for number in range(3 if tiny else ROUNDS):
            if number >= FEWEST_ROUNDS and time.monotonic() - began > GROUP_SECONDS / 2:
                break
            for name in list(self.contestants):
                self.run.say(f"{self.name}: round {number + 1}, {name}")
                seconds = self._try(name, partial(self._seconds, name, calls[name]))
                if seconds is None:
                    del self.contestants[name]
                else:
                    taken[name].append(seconds)
        for name in self.contestants:
            self.facts["results"][name].update(self._figures(taken[name], calls[name], peak_tflops))
        self._ratios()
        self.run.write()

    def _block_seconds(self) -> float:
        return 0.0 if self.run.settings.tiny else BLOCK_SECONDS

    def _once(self, name: str) -> float:
        return self._try(name, lambda: self._seconds(name, 1)) or 1.0

    def _seconds(self, name: str, calls: int) -> float:
        self.synchronize[name]()
        began = time.perf_counter()
        for _ in range(calls):
            self.contestants[name]()
        self.synchronize[name]()
        return (time.perf_counter() - began) / calls

    def _figures(self, taken: list[float], calls: int, peak_tflops: float | None) -> dict[str, Any]:
        p20, median, p80 = np.percentile(taken, [20, 50, 80])
        rate = self.facts["flops"] / median * 1e-12
        mfu = None if peak_tflops is None else rate / peak_tflops
        found = {
            "ms": median * 1e3, "ms_p20": p20 * 1e3, "ms_p80": p80 * 1e3, "rounds": len(taken), "steps": calls,
            "tokens_per_s": self.facts["batch"] * self.facts["length"] / median, "tflops": rate, "mfu": mfu, "note": "",
        }  # fmt: skip
        if (mfu or 0.0) > 1 or "refused" in self.facts:
            kept = {"note": "impossible" if (mfu or 0.0) > 1 else self.facts["refused"]}
            return {**{name: None for name in found}, **kept}
        return found

    def _ratios(self) -> None:
        """How many times as fast as each way of PyTorch ours is; an emulator's time is compared with nothing."""
        if self.run.emulated:
            return
        ms = {name: result.get("ms") for name, result in self.facts["results"].items()}
        self.facts["times_as_fast"] = {
            f"{ours} / {theirs}": ms[theirs] / ms[ours]
            for ours in (OURS_EAGER, OURS_GRAPH) for theirs in (TORCH_EAGER, TORCH_COMPILED)
            if ms.get(ours) and ms.get(theirs)
        }  # fmt: skip

    def close(self) -> None:
        """Give all memory back before the next group."""
        pools = [] if self.ours is None else self.ours.pools()
        torch = self.torch
        self.contestants.clear()
        self.synchronize.clear()
        self.ours = self.torch = None
        gc.collect()
        for pool in (*pools, self.backend.pool):
            pool.trim()
        if torch is not None:
            release = torch.release
            del torch
            gc.collect()
            release()


# ----------------------------------------------------------------------------------------------------------------- ours


class Ours:
    """minibert's model, optimiser and captured step."""

    def __init__(
        self, backend: Any, config: BertConfig, weights: torch_peer.Weights, packed: Packed, mode: str
    ) -> None:
        dtype, self.product_mode = MODES[mode]
        self.backend, self.packed = backend, packed
        self.model = BertForMaskedLM(config, backend, dtype, initialise=False)
        self.model.load_state_dict(dict(weights))
        self.optimizer = AdamW(parameter_groups(self.model, 0.01), lr=1e-4, max_grad_norm=1.0)
        self.graphed = GraphedSteps(self.model, self.optimizer, tokens_per_batch=len(packed.input_ids))
        self.numbers = count()
        self.model.train()

    def eager(self) -> float:
        """Op by op, as `Trainer.update`."""
        with products_in(self.backend, self.product_mode):
            self.optimizer.zero_grad()
            self.model.step = next(self.numbers)
            loss = self.model(self.packed).loss
            loss.backward()
            value = loss.item()
            self.optimizer.step()
            return value

    def graph(self) -> float:
        """In two calls of the device, as `Trainer.update_by_graph`."""
        with products_in(self.backend, self.product_mode):
            loss, square_norm, recorded = self.graphed.gradients(self.packed, next(self.numbers))
            value = float(self.backend.numpy(loss))
            self.optimizer.check_norm(square_norm)
            self.graphed.update(recorded, square_norm)
            return value

    def quiet_loss(self) -> float:
        """Without dropout: to see that both do the same work."""
        self.model.eval()
        with products_in(self.backend, self.product_mode), no_grad():
            value = self.model(self.packed).loss.item()
        self.model.train()
        return float(value)

    def pools(self) -> list[Pool]:
        """Of the captured graphs."""
        found = [r for r in self.graphed.recorded.values() if r is not None]
        return [capture.pool for r in found for capture in (r.gradients, r.update)]

    def peak(self, reset: bool = False) -> int:
        """Bytes of arrays at the most since the last reset."""
        pool = self.backend.pool
        if reset:
            pool.peak = pool.used
        return int(pool.peak)

    def graph_peak(self, reset: bool = False) -> int:
        """The same once graphs are captured: what they hold, beside what lives on between steps."""
        return int(self.backend.pool.used + sum(graph.peak for graph in self.pools()))


# ----------------------------------------------------------------------------------------------------------------- data


def random_batch(config: BertConfig, batch: int, length: int) -> Packed:
    """Full sequences, of which 15 % of the tokens are predicted."""
    rng = np.random.default_rng(1)
    ids = rng.integers(1, config.vocab_size, (batch, length))
    predicted = rng.permutation(batch * length)[: max(1, round(PREDICTED * batch * length))]
    labels = np.full(batch * length, IGNORE)
    labels[predicted] = rng.integers(1, config.vocab_size, len(predicted))
    return pack(config, ids, labels=labels.reshape(ids.shape))


def flops(config: BertConfig, batch: int, length: int) -> int:
    """Of the products of one step, forward and backward: three times the forward pass."""
    return 3 * forward_flops(config, np.full(batch, length), max(1, round(PREDICTED * batch * length)))
