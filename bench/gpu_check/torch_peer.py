"""The same training step by PyTorch, to compare with: transformers' BERT, or a plain one of the same shape.

As fast as PyTorch does it without extra work by its user: scaled_dot_product_attention without a mask (no padding), the
head on the predicted rows alone, fused AdamW, gradients set to None, and no wait for the device within a step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np

from bench.peers.torch_bert import Weights, fused_adamw, made, missing
from minibert.model.config import BertConfig
from minibert.model.packing import Packed

__all__ = ["TorchSteps", "Weights", "missing"]


class TorchSteps:
    """A model, its optimiser and one batch. `mode` is float32, tf32 or bfloat16 (autocast)."""

    def __init__(
        self, config: BertConfig, weights: Weights, packed: Packed, length: int, mode: str, device: str,
        plain: bool | None = None,
    ) -> None:  # fmt: skip
        import torch

        self.torch, self.device, self.mode = torch, torch.device(device), mode
        torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
        torch.manual_seed(0)
        self.model, self.library = made(config, weights, plain)
        self.model.to(self.device).train()
        self.optimizer, self.parameters = fused_adamw(self.model)
        assert packed.predicted is not None and packed.targets is not None
        pinned = self.device.type == "cuda"
        self.host = tuple(
            torch.from_numpy(np.ascontiguousarray(a)).long().pin_memory()
            if pinned
            else torch.from_numpy(a.copy()).long()
            for a in (packed.input_ids.reshape(-1, length), packed.predicted, packed.targets)
        )
        self.loss_of: Callable[..., Any] = self._loss

    def _loss(self, ids: Any, rows: Any, targets: Any) -> Any:
        hidden = self.model.bert(input_ids=ids)[0]
        picked = hidden.reshape(-1, hidden.shape[-1])[rows]
        return self.torch.nn.functional.cross_entropy(self.model.cls(picked).float(), targets)

    def compile(self, **options: Any) -> None:
        """From here on by torch.compile; it compiles when first called."""
        self.torch._dynamo.reset()
        self.loss_of = self.torch.compile(self._loss, dynamic=False, **options)

    def autocast(self) -> Any:
        if self.mode != "bfloat16":
            return nullcontext()
        return self.torch.autocast(self.device.type, dtype=self.torch.bfloat16)

    def step(self, loss_of: Callable[..., Any] | None = None) -> Any:
        """One update; the loss, on the device."""
        batch = (values.to(self.device, non_blocking=True) for values in self.host)
        with self.autocast():
            loss = (loss_of or self.loss_of)(*batch)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def quiet_loss(self) -> float:
        """Without dropout: to see that both do the same work."""
        self.model.eval()
        with self.torch.no_grad(), self.autocast():
            loss = self._loss(*(values.to(self.device) for values in self.host))
        self.model.train()
        return float(loss)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def peak(self, reset: bool = False) -> int | None:
        """Bytes at the most since the last reset; None on a CPU."""
        if self.device.type != "cuda":
            return None
        if reset:
            self.torch.cuda.reset_peak_memory_stats()
        return int(self.torch.cuda.max_memory_allocated())

    def release(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.empty_cache()
