"""A model with the linear layers of its encoder in int8: how far its outputs move by each, and what stays in floats.

The measure is 1 - cosine between the mean of the last hidden states of a text before and after.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from minibert.data import load_tokenizer, special_ids
from minibert.data.sequences import ids_of
from minibert.data.tokenizer import FILES
from minibert.errors import UserError
from minibert.model.checkpoint import read_config
from minibert.model.matching import named
from minibert.model.pretrained import PreTrained
from minibert.model.quantized import Replaced, int8_layers, linear_layers, make_int8
from minibert.model.sentence_config import MODULES
from minibert.model.tensor import no_grad
from minibert.tasks.sentences import SentenceTransformer
from minibert.tasks.task import architecture_of
from minibert.tuning.files import CONFIG as ADAPTER

GROUP = re.compile(r"(?:.*\.)?(encoder\.layer\.\d+\.)(attention\.self|.*)\.\w+")  # query, key and value are one product
BATCH_TOKENS = 4096


class Loaded:
    """A model in floats, its tokenizer, and how it is saved again."""

    def __init__(self, model: Any, tokenizer: Tokenizer, save: Callable[[Path], None]) -> None:
        self.model, self.tokenizer, self.save = model, tokenizer, save


def load(folder: Path, backend: Any) -> Loaded:
    """Of any kind that has a class here. Raises UserError for another, for one with an adapter, or in int8 already."""
    if (folder / ADAPTER).is_file():
        raise UserError(f"{folder} holds an adapter: expected a whole model; merge it into its base first")
    if (folder / MODULES).is_file():
        encoder = SentenceTransformer.from_pretrained(folder, backend)
        loaded = Loaded(encoder.model, encoder.tokenizer, encoder.save_pretrained)
    else:
        name = architecture_of(read_config(folder)) or "BertModel"
        kind: Any = next((each for each in subclasses(PreTrained) if each.__name__ == name), None)
        if kind is None:
            raise UserError(f"{folder} holds a {name}: expected a model that has a class of that name here")
        model, info = kind.from_pretrained(folder, backend, output_loading_info=True)
        if info["missing_keys"]:
            raise UserError(f"{folder}: weights are missing: {named(sorted(info['missing_keys']))}")
        beside = [folder / name for name in FILES if (folder / name).is_file()]
        loaded = Loaded(model, load_tokenizer(folder), partial(model.save_pretrained, tokenizer_files=beside))
    if int8_layers(loaded.model):
        raise UserError(f"{folder} is in int8 already: name the model that it was made of")
    return loaded


def subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    """All of them, of whatever depth, that have been imported."""
    for each in kind.__subclasses__():
        yield each
        yield from subclasses(each)


@dataclass
class Quantization:
    """What came of it."""

    int8: list[str] = field(default_factory=list)  # groups of layers
    floats: list[str] = field(default_factory=list)
    alone: dict[str, float] = field(default_factory=dict)  # mean distance with this group alone in int8
    mean: float = 0.0
    largest: float = 0.0


def groups_of(model: Any) -> dict[str, list[str]]:
    """The encoder's linear layers by name, those that are one product together."""
    groups: dict[str, list[str]] = {}
    for name, _, _ in linear_layers(model):
        if found := GROUP.fullmatch(name):
            groups.setdefault(found[1] + found[2], []).append(name)
    return groups


def quantize(
    loaded: Loaded, texts: Sequence[str], *, budget: float | None = None, keep: Sequence[str] = (),
    sensitivity: bool = False, progress: Callable[[str], None] = lambda said: None,
) -> Quantization:  # fmt: skip
    """Put the encoder's linear layers in int8, in place.

    Groups of layers whose name holds one of `keep` stay in floats. With a `budget`, so do those that move the outputs
    most, one after the other, until the mean distance is no more than that; these, or `sensitivity`, take a pass over
    the texts for each group. Raises UserError where `keep` names none, and where there are no texts with tokens.
    """
    model, found = loaded.model, Quantization()
    groups = groups_of(model)
    unknown = [word for word in keep if not any(word in group for group in groups)]
    if unknown:
        raise UserError(f"keep: no layer is called {unknown[0]!r}: expected a part of a name as {next(iter(groups))}")
    sequences = _sequences(loaded, texts)
    reference = _outputs(model, sequences)
    found.floats = [group for group in groups if any(word in group for word in keep)]
    rest = [group for group in groups if group not in found.floats]
    for number, group in enumerate(rest if sensitivity or budget is not None else (), 1):
        progress(f"{group}: {number} of {len(rest)}")
        replaced = make_int8(model, groups[group], values=True)
        found.alone[group] = float(_distances(reference, _outputs(model, sequences)).mean())
        restore(replaced)
    replaced_of = {group: make_int8(model, groups[group], values=True) for group in rest}
    distances = _distances(reference, _outputs(model, sequences))
    for group in sorted(rest, key=lambda group: -found.alone.get(group, 0.0)):
        if budget is None or distances.mean() <= budget:
            break
        progress(f"mean distance {distances.mean():.2e}, allowed {budget:.2e}: {group} stays in floats")
        restore(replaced_of[group])
        rest.remove(group)
        found.floats.append(group)
        distances = _distances(reference, _outputs(model, sequences))
    found.int8, found.mean, found.largest = rest, float(distances.mean()), float(distances.max())
    return found


def restore(replaced: Sequence[Replaced]) -> None:
    for put, layer in replaced:
        put(layer)


def _sequences(loaded: Loaded, texts: Sequence[str]) -> list[np.ndarray]:
    special, room = special_ids(loaded.tokenizer), loaded.model.config.max_position_embeddings - 2
    kept = [ids[:room] for ids in ids_of(texts, loaded.tokenizer) if len(ids)]
    if not kept:
        raise UserError("expected texts to measure by, got none with a token in it")
    return [np.concatenate([[special.cls], ids, [special.sep]]).astype(np.int32) for ids in kept]


def _outputs(model: Any, sequences: Sequence[np.ndarray]) -> np.ndarray:
    """(S, C) float64: the mean of the last hidden states of each sequence."""
    base, means, batch = model.base_model, [], []
    for number, ids in enumerate(sequences):
        batch.append(ids)
        if number + 1 < len(sequences) and sum(map(len, batch)) + len(sequences[number + 1]) <= BATCH_TOKENS:
            continue
        ends = np.cumsum([0, *map(len, batch)])
        with no_grad():
            states = base(np.concatenate(batch), cu_seqlens=ends, return_dict=True).last_hidden_state
        values = np.asarray(model.backend.numpy(states.data), np.float64)
        means += [values[start:stop].mean(axis=0) for start, stop in pairwise(ends)]
        batch = []
    return np.stack(means)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(S,) 1 - cosine of rows."""
    return 1 - (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
