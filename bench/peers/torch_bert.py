"""BERT by PyTorch, to compare with: transformers' BertForMaskedLM or a plain one of the same shape, with our weights.

As PyTorch's users run it: scaled_dot_product_attention, fused AdamW, gradients set to None, the head on every position.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from bench.timing.batches import LEARNING_RATE, WEIGHT_DECAY, Batch
from minibert.model.config import BertConfig

Weights = Mapping[str, np.ndarray]


def missing() -> str:
    """Why there is nothing to compare with; empty if there is."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    return ""


def made(config: BertConfig, weights: Weights, plain: bool | None = None) -> tuple[Any, str]:
    """The model with these weights, and what it is; plain, if not said, where transformers is not installed."""
    plain = importlib.util.find_spec("transformers") is None if plain is None else plain
    import torch

    model, library = plain_bert(config) if plain else transformers_bert(config)
    load(model, weights)
    return model, f"{library}, torch {torch.__version__}"


def fused_adamw(model: Any, weight_decay: float = WEIGHT_DECAY, **settings: Any) -> tuple[Any, list[Any]]:
    """AdamW with decay on matrices alone, and every parameter that is trained, in its order."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, rest = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **{"lr": LEARNING_RATE, "fused": True, **settings}), [*decayed, *rest]


class TorchTraining:
    """Training steps on the CPU: the full head on every position, as BertForMaskedLM does it."""

    def __init__(
        self, config: BertConfig, weights: Weights, threads: int, compiled: bool = False, plain: bool | None = None,
        bfloat16: bool = False,
    ) -> None:  # fmt: skip
        import torch

        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        torch.manual_seed(0)
        self.torch, self.weights = torch, weights
        self.name = "torch.compile" if compiled else "torch.bf16" if bfloat16 else "torch"
        self.model, self.library = made(config, weights, plain)
        self.library += ", products in bfloat16 (autocast)" if bfloat16 else ""
        self.bfloat16 = bfloat16
        self.model.train()
        self.optimizer, self.parameters = fused_adamw(self.model)
        self._loss_of = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, inputs: dict[str, Any]) -> Any:
        with self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.bfloat16):
            return self.model(**inputs).loss

    def prepare(self, batch: Batch) -> dict[str, Any]:
        """The batch as tensors, padded to its longest sequence."""
        return {**tensors(batch), "labels": self.torch.from_numpy(batch.padded["labels"])}

    def step(self, inputs: dict[str, Any]) -> float:
        """One update; the loss."""
        loss = self._loss_of(inputs)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def quiet(self, inputs: dict[str, Any], update: bool = False) -> tuple[float, float]:
        """Loss and gradient norm without dropout; with `update` the weights follow."""
        self.model.eval()
        loss = self._loss_of(inputs)
        loss.backward()
        norm = self.torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if update:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        return float(loss.detach()), float(norm)

    def reload(self) -> None:
        """The weights of the beginning."""
        load(self.model, self.weights)


class TorchInference:
    """Forward passes on the CPU without gradient or dropout: the last hidden state, or the logits of every position."""

    def __init__(
        self, config: BertConfig, weights: Weights, threads: int, logits: bool = False, compiled: bool = False,
        plain: bool | None = None, bfloat16: bool = False,
    ) -> None:  # fmt: skip
        import torch

        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        self.torch = torch
        self.name = "torch.compile" if compiled else "torch.bf16" if bfloat16 else "torch"
        self.model, self.library = made(config, weights, plain)
        self.model.eval()
        if bfloat16:
            self.model, self.library = self.model.to(torch.bfloat16), f"{self.library}, weights and states in bfloat16"
        self.forward = _forward(self.model, logits)
        self._run = torch.compile(self.forward) if compiled else self.forward

    def prepare(self, batch: Batch) -> tuple[Any, ...]:
        """The batch as tensors, padded to its longest sequence."""
        return tuple(tensors(batch).values())

    def run(self, inputs: tuple[Any, ...]) -> Any:
        with self.torch.inference_mode():
            return self._run(*inputs)

    def rows(self, output: Any, batch: Batch) -> np.ndarray:
        """The outputs of the real tokens: (N, C) or (N, V)."""
        return np.asarray(output.float().numpy()[batch.real])


def _forward(model: Any, logits: bool) -> Any:
    from torch import nn

    class Forward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
            if logits:
                return self.model(input_ids=input_ids, attention_mask=attention_mask).logits
            return self.model.bert(input_ids=input_ids, attention_mask=attention_mask)[0]

    return Forward().eval()


def tensors(batch: Batch) -> dict[str, Any]:
    """input_ids (B, T), and attention_mask (B, T) where a sequence is shorter than the longest."""
    import torch

    names = ("input_ids",) if batch.real.all() else ("input_ids", "attention_mask")
    return {name: torch.from_numpy(batch.padded[name]) for name in names}


def load(model: Any, weights: Weights) -> None:
    """Give the model our weights, by Hugging Face's names. Raises ValueError if some are left over or lacking."""
    import torch

    report = model.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in weights.items()}, strict=False)
    tied = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "bert.embeddings.position_ids")
    lacking = [name for name in report.missing_keys if name not in tied]
    if lacking or report.unexpected_keys:
        raise ValueError(f"weights do not fit: lacking {lacking[:3]}, left over {report.unexpected_keys[:3]}")


def transformers_bert(config: BertConfig, architecture: str = "BertForMaskedLM") -> tuple[Any, str]:
    """transformers' model, and what it is."""
    import transformers

    known = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    theirs = transformers.BertConfig(**known, attn_implementation="sdpa")
    model = getattr(transformers, architecture)(theirs)
    model.tie_weights()
    return model, f"transformers {transformers.__version__} {architecture}, sdpa"


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

        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            q, k, v = (
                part(x).view(*x.shape[:2], h, c // h).transpose(1, 2) for part in (self.query, self.key, self.value)
            )
            p = config.attention_probs_dropout_prob if self.training else 0.0
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
            return mixed.transpose(1, 2).reshape(x.shape)

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

        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            x = self.attention["output"](self.attention["self"](x, mask), x)
            return self.output(self.intermediate(x), x)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = Embeddings()
            self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer() for _ in range(config.num_hidden_layers))})

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
            mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()  # over B, H, T, T
            x = self.embeddings(input_ids)
            for layer in self.encoder["layer"]:
                x = layer(x, mask)
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

    class MaskedLM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = Encoder()
            self.cls = Heads(self.bert.embeddings.word_embeddings)

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
        ) -> SimpleNamespace:
            logits = self.cls(self.bert(input_ids, attention_mask)[0])
            loss = None
            if labels is not None:
                loss = functional.cross_entropy(logits.view(-1, config.vocab_size), labels.view(-1))
            return SimpleNamespace(loss=loss, logits=logits)

    return MaskedLM(), "a BERT of torch.nn, sdpa"
