"""Inference by onnxruntime, to compare with: transformers' BERT, exported by torch.onnx and fused for BERT.

onnxruntime's own tool fuses attention, layer norm and GELU (`onnxruntime.transformers.optimizer`); where it is not to
be had, the session's own optimisation stands alone, and `library` says so.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.torch_bert import TorchInference, Weights
from bench.timing.batches import Batch
from minibert.model.config import BertConfig


def missing() -> str:
    """Why there is nothing to compare with; empty if there is."""
    lacking = [name for name in ("onnxruntime", "torch", "onnx") if importlib.util.find_spec(name) is None]
    return f"{', '.join(lacking)} not installed" if lacking else ""


class OnnxInference:
    """A session on the CPU with these weights: the last hidden state, or the logits of every position.

    With `int8` products in 8 bits, the graph unfused: fused, it took a sixth longer in them.
    """

    def __init__(
        self, config: BertConfig, weights: Weights, threads: int, logits: bool, example: Batch, int8: bool = False
    ) -> None:
        onnxruntime = import_module("onnxruntime")
        self.name = "onnxruntime.int8" if int8 else "onnxruntime"
        with tempfile.TemporaryDirectory() as folder:
            exported, fused = Path(folder) / "bert.onnx", Path(folder) / "fused.onnx"
            export(TorchInference(config, weights, threads, logits), self.prepare(example), exported)
            what = (quantize if int8 else partial(fuse, config))(exported, fused)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
            # threads that wait by spinning would take the cores from the others' turns
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            path = str(fused if fused.exists() else exported)
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.library = f"onnxruntime {onnxruntime.__version__}, {what}"

    def prepare(self, batch: Batch) -> dict[str, np.ndarray]:
        """The batch padded to its longest sequence, by the names of the graph's inputs.

        The mask is there even where it masks nothing: only with it does the tool know attention when it sees it.
        """
        return {name: batch.padded[name] for name in ("input_ids", "attention_mask")}

    def run(self, inputs: dict[str, np.ndarray]) -> Any:
        return self.session.run(None, inputs)[0]

    def rows(self, output: Any, batch: Batch) -> np.ndarray:
        """The outputs of the real tokens: (N, C) or (N, V)."""
        return np.asarray(output[batch.real])


def export(peer: TorchInference, inputs: dict[str, np.ndarray], path: Path) -> None:
    """Write torch's model as ONNX, for any number and length of sequences."""
    import torch

    if hasattr(peer.model, "set_attn_implementation"):
        peer.model.set_attn_implementation("eager")  # the tool fuses attention from its parts alone
    axes = {name: {0: "batch", 1: "length"} for name in inputs}
    given = tuple(torch.from_numpy(a) for a in inputs.values())
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter thinks aloud
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                peer.forward, given, str(path), input_names=list(inputs), output_names=["output"],
                dynamic_axes={**axes, "output": {0: "batch", 1: "length"}}, opset_version=17, dynamo=False,
            )  # fmt: skip
    finally:
        logging.disable(level)


def quantize(path: Path, quantized: Path) -> str:
    """The graph with products in int8 into another file: weights by channel, activations as they come, by tensor."""
    tool = import_module("onnxruntime.quantization")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        tool.quantize_dynamic(
            str(path), str(quantized), per_channel=True, weight_type=tool.QuantType.QInt8,
            extra_options={"DefaultTensorType": 1},
        )  # fmt: skip
    finally:
        logging.disable(level)
    return "int8, weights by channel, activations by tensor"


def fuse(config: BertConfig, path: Path, fused: Path) -> str:
    """Fuse the graph for BERT into another file; what was fused, in words."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        tool = import_module("onnxruntime.transformers.optimizer")
        found = tool.optimize_model(
            str(path), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size,
            opt_level=1, use_gpu=False,
        )  # fmt: skip
        found.save_model_to_file(str(fused))
        counts = {name: n for name, n in found.get_fused_operator_statistics().items() if n}
    except Exception as error:  # a tool of many parts: without it the session still optimises by itself
        fused.unlink(missing_ok=True)
        return f"not fused for BERT ({type(error).__name__}: {error})".splitlines()[0][:200]
    finally:
        logging.disable(level)
    return "fused for BERT: " + (", ".join(f"{n} {name}" for name, n in sorted(counts.items())) or "nothing")
