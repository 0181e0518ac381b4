"""Who fine-tunes beside minibert: transformers with torch, with peft or not; of encoders, sentence-transformers.

They are sides as in `sides.py`. Their batches are padded before the step that is timed.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.torch_bert import fused_adamw, load, tensors, transformers_bert
from bench.tasks.given import Given, Step, batch, model_of
from bench.timing.batches import Batch
from minibert import backends
from minibert.model.packing import IGNORE
from minibert.tasks.batches import targets_of
from minibert.tasks.evaluation import in_order
from minibert.tasks.finetune import FineTuningConfig
from minibert.tasks.task import Answer, Prepared, Task


class TorchTuning:
    """transformers' model under torch: sdpa, fused AdamW with the same groups, gradients set to None, padded batches.

    With `adapter`, the folder of a LoRA or AdaLoRA adapter, that of peft beside a frozen model.
    """

    own_loss: Any = None  # of the last forward: to that of AdaLoRA, peft adds its regulariser

    def __init__(self, name: str, given: Given, config: FineTuningConfig, adapter: str | None = None) -> None:
        import torch

        torch.set_num_threads(given.threads)
        torch.set_float32_matmul_precision("highest")
        torch.manual_seed(config.seed)
        self.torch, self.name, self.given, self.config = torch, name, given, config
        self.model, self.library = self.made()
        if adapter is not None:
            import peft

            self.model = peft.PeftModel.from_pretrained(self.model, adapter, is_trainable=True)
            self.library += f", peft {peft.__version__}"
        self.prunes, self.updates = name.endswith(" adalora"), 0
        if self.prunes:
            self.note_own_loss(self.model.base_model.model)
        self.model.train()
        self.optimizer, self.parameters = fused_adamw(
            self.model, config.weight_decay, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon
        )

    def made(self) -> tuple[Any, str]:
        """The model with the weights that are given, and what it is."""
        model, library = transformers_bert(self.given.model, self.given.task.architecture.__name__)
        load(model, self.given.weights)
        return model, library

    @property
    def trained(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def inputs(self, part: Prepared, chosen: np.ndarray) -> dict[str, Any]:
        """Padded to the longest of the batch."""
        laid = batch(self.given.model, part, chosen)
        kinds = laid.padded["token_type_ids"]
        beside = {**({"token_type_ids": kinds} if kinds.any() else {}), **labels(self.given.task, part, chosen, laid)}
        return {**tensors(laid), **{name: self.torch.from_numpy(array) for name, array in beside.items()}}

    def prepare(self, step: Step) -> tuple[float, dict[str, Any]]:
        return step.learning_rate, self.inputs(self.given.train, step.chosen)

    def loss(self, inputs: dict[str, Any]) -> Any:
        """transformers' own; of answers over real tokens alone, as ours: its own has the padding in the softmax."""
        if not isinstance(self.given.task, Answer):
            return self.model(**inputs).loss
        out = self.model(**{name: array for name, array in inputs.items() if not name.endswith("positions")})
        pad = self.real(inputs).logical_not()
        entropy = self.torch.nn.functional.cross_entropy
        ends = ((out.start_logits, "start_positions"), (out.end_logits, "end_positions"))
        start, end = (entropy(logits.masked_fill(pad, -math.inf), inputs[name]) for logits, name in ends)
        return (start + end) / 2

    def real(self, inputs: dict[str, Any]) -> Any:
        """(B, T): False on padding."""
        return inputs.get("attention_mask", self.torch.ones_like(inputs["input_ids"])) != 0

    def note_own_loss(self, model: Any) -> None:
        forward = model.forward  # which peft calls by this name, past all hooks

        def noting(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            self.own_loss = None if out.loss is None else out.loss.detach().clone()
            return out

        model.forward = noting

    def step(self, prepared: tuple[float, dict[str, Any]]) -> float:
        """One update; the loss."""
        learning_rate, inputs = prepared
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self.loss(inputs)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.updates += 1
        if self.prunes:
            self.model.base_model.update_and_allocate(self.updates)
        self.optimizer.zero_grad(set_to_none=True)
        return float(self.own_loss if self.prunes else loss.detach())

    def quiet(self, step: Step) -> tuple[float, float]:
        """Loss and gradient norm of a batch without dropout; nothing is updated."""
        self.model.eval()
        inputs = self.prepare(step)[1]
        loss = self.model.base_model.model(**inputs).loss if self.prunes else self.loss(inputs)
        loss.backward()
        norm = self.torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        return float(loss.detach()), float(norm)

    def outputs(self, part: Prepared) -> np.ndarray:
        """As those of minibert."""
        self.model.eval()
        with self.torch.inference_mode():
            found = [
                self.rows(self.inputs(part, chosen)).numpy()
                for chosen in in_order(part.lengths, self.config.tokens_per_batch)
            ]
        self.model.train()
        return np.concatenate(found)

    def rows(self, inputs: dict[str, Any]) -> Any:
        """The outputs of a batch, without those of padding."""
        out = self.model(**inputs)
        ends = isinstance(self.given.task, Answer)
        logits = self.torch.stack([out.start_logits, out.end_logits], dim=-1) if ends else out.logits
        return logits[self.real(inputs)] if self.given.task.of_tokens else logits


class SentenceTuning(TorchTuning):
    """sentence-transformers' encoder, from a folder that minibert wrote, and its MultipleNegativesRankingLoss."""

    def made(self) -> tuple[Any, str]:
        import sentence_transformers
        import transformers
        from sentence_transformers.sentence_transformer import losses

        transformers.utils.logging.disable_progress_bar()
        ours = model_of(self.given, backends.get("numpy"))
        with tempfile.TemporaryDirectory() as folder:
            self.given.task.save(ours, self.given.tokenizer, Path(folder), self.config.max_seq_length)
            model = sentence_transformers.SentenceTransformer(folder, device="cpu")
        self.ranking = losses.MultipleNegativesRankingLoss(model)
        return model, f"sentence-transformers {sentence_transformers.__version__}"

    def inputs(self, part: Prepared, chosen: np.ndarray) -> dict[str, Any]:
        """All texts of the examples, one after the other."""
        padded = batch(self.given.model, part, chosen).padded
        return {name: self.torch.from_numpy(padded[name]) for name in ("input_ids", "attention_mask")}

    def loss(self, inputs: dict[str, Any]) -> Any:
        texts = self.given.train.texts
        vectors = self.rows(inputs)
        return self.ranking.compute_loss_from_embeddings([vectors[k::texts] for k in range(texts)], None)

    def rows(self, inputs: dict[str, Any]) -> Any:
        return self.model(inputs)["sentence_embedding"]


def labels(task: Task, part: Prepared, chosen: np.ndarray, laid: Batch) -> dict[str, np.ndarray]:
    """The targets of some examples as transformers' model of this task takes them."""
    targets = targets_of(task, part, chosen)
    if isinstance(task, Answer):
        return {"start_positions": targets[:, 0], "end_positions": targets[:, 1]}
    if not task.of_tokens:
        return {"labels": targets}
    padded = np.full(laid.real.shape, IGNORE, np.int64)
    padded[laid.real] = targets
    return {"labels": padded}
