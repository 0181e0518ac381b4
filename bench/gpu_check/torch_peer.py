"""The same training step by PyTorch, to compare with: transformers' BERT, or a plain one of the same shape.

As fast as PyTorch does it without extra work by its user: scaled_dot_product_attention without a mask (no padding), the
head on the predicted rows alone, fused AdamW, gradients set to None, and no wait for the device within a step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np

from minibert.config import BertConfig
from minibert.packing import Packed

Weights = Mapping[str, np.ndarray]


def missing() -> str:
    """Why there is nothing to compare with; empty if there is."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    return ""


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
        plain = importlib.util.find_spec("transformers") is None if plain is None else plain
        self.model, self.library = plain_bert(config) if plain else transformers_bert(config)
        load(self.model, weights)
        self.model.to(self.device).train()
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        rest = [p for p in self.model.parameters() if p.ndim < 2]
        self.parameters = [*decayed, *rest]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
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


def load(model: Any, weights: Weights) -> None:
    """Give the model our weights, by Hugging Face's names. Raises ValueError if some are left over or lacking."""
    import torch

    report = model.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in weights.items()}, strict=False)
    tied = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "bert.embeddings.position_ids")
    lacking = [name for name in report.missing_keys if name not in tied]
    if lacking or report.unexpected_keys:
        raise ValueError(f"weights do not fit: lacking {lacking[:3]}, left over {report.unexpected_keys[:3]}")


def transformers_bert(config: BertConfig) -> tuple[Any, str]:
    """transformers' BertForMaskedLM, and what it is."""
    import transformers

    known = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    theirs = transformers.BertConfig(**known, attn_implementation="sdpa")
    model = transformers.BertForMaskedLM(theirs)
    model.tie_weights()
    return model, f"transformers {transformers.__version__} BertForMaskedLM, sdpa"


def plain_bert(config: BertConfig) -> tuple[Any, str]:
    """BERT of torch.nn modules alone, under the same names: where transformers is not installed."""
    import torch
    from torch import Tensor, nn
    from torch.nn import functional

    c, h, rate = config.hidden_size, config.num_attention_heads, config.hidden_dropout_prob

    def norm() -> nn.LayerNorm:
        return nn.LayerNorm(c, eps=config.layer_norm_eps)

    class Embeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word_embeddings = nn.Embedding(config.vocab_size, c, padding_idx=config.pad_token_id)
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, c)
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, c)
            self.LayerNorm, self.dropout = norm(), nn.Dropout(rate)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.word_embeddings(ids) + self.token_type_embeddings.weight[0]
            return self.dropout(self.LayerNorm(x + self.position_embeddings.weight[: ids.shape[1]]))

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(c, c) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                part(x).view(*x.shape[:2], h, c // h).transpose(1, 2) for part in (self.query, self.key, self.value)
            )
            p = config.attention_probs_dropout_prob if self.training else 0.0
            return functional.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).reshape(x.shape)

    class Output(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.dense, self.LayerNorm, self.dropout = nn.Linear(inputs, c), norm(), nn.Dropout(rate)

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return self.LayerNorm(self.dropout(self.dense(x)) + residual)

    class Dense(nn.Module):
        def __init__(self, outputs: int, then: Any = None) -> None:
            super().__init__()
            self.dense = nn.Linear(c, outputs)
            if then is not None:
                self.LayerNorm = then

        def forward(self, x: Tensor) -> Tensor:
            x = functional.gelu(self.dense(x))
            return self.LayerNorm(x) if hasattr(self, "LayerNorm") else x

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.ModuleDict({"self": SelfAttention(), "output": Output(c)})
            self.intermediate, self.output = Dense(config.intermediate_size), Output(config.intermediate_size)

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention["output"](self.attention["self"](x), x)
            return self.output(self.intermediate(x), x)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = Embeddings()
            self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer() for _ in range(config.num_hidden_layers))})

        def forward(self, input_ids: Tensor) -> tuple[Tensor]:
            x = self.embeddings(input_ids)
            for layer in self.encoder["layer"]:
                x = layer(x)
            return (x,)

    class Predictions(nn.Module):
        def __init__(self, table: nn.Embedding) -> None:
            super().__init__()
            self.transform = Dense(c, norm())
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))
            self.decoder = nn.Linear(c, config.vocab_size, bias=False)
            self.decoder.weight = table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.transform(x)) + self.bias

    class Heads(nn.Module):
        def __init__(self, table: nn.Embedding) -> None:
            super().__init__()
            self.predictions = Predictions(table)

        def forward(self, x: Tensor) -> Tensor:
            return self.predictions(x)

    model = nn.Module()
    model.bert = Encoder()
    model.cls = Heads(model.bert.embeddings.word_embeddings)
    return model, "a BERT of torch.nn, sdpa"
