"""Prefix tuning: trained keys and values stand before those of every sequence, in every layer of a frozen encoder.

Li and Liang, "Prefix-tuning: Optimizing continuous prompts for generation" (ACL 2021), section 4.2; Liu et al.,
"P-tuning v2" (ACL 2022), for encoders with a task's head. As with PEFT, a prefix of P takes the first P positions: a
sequence's tokens count theirs from P on, so there are P fewer of them.
"""

from __future__ import annotations

import dataclasses
import reprlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from minibert.errors import UserError, warn
from minibert.kernels.attention import attention
from minibert.kernels.embedding import gather_rows
from minibert.kernels.philox import Stream
from minibert.kernels.view import concatenate, pad_axis
from minibert.model.bert import BertEmbeddings, BertSelfAttention
from minibert.model.checkpoint import AnyPath
from minibert.model.nn import INITIALISATION_STREAM, Module, Parameter, Place, standard_normal
from minibert.model.outputs import Batch
from minibert.model.pretrained import PreTrained
from minibert.model.tensor import Tensor, apply
from minibert.tuning.config import HEADS
from minibert.tuning.files import naming, read_adapter, write_adapter
from minibert.tuning.targets import named_modules, trained_whole
from minibert.tuning.tuned import TunedModel, is_added

TABLE = "prompt_embeddings"
ABOUT = {
    "auto_mapping", "encoder_hidden_size", "inference_mode", "init_weights", "num_attention_heads", "num_layers",
    "num_transformer_submodules", "peft_type", "peft_version", "revision", "token_dim",
}  # fmt: skip


@dataclass(frozen=True)
class PrefixTuningConfig:
    """A prefix, under PEFT's names. Raises UserError for a value that is out of range."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    num_virtual_tokens: int = 20  # P, of the prefix
    task_type: Any = (
        None  # SEQ_CLS, TOKEN_CLS, QUESTION_ANS: its head is trained whole; FEATURE_EXTRACTION or None: none
    )
    modules_to_save: Any = None  # ends of names of modules that are trained whole besides
    base_model_name_or_path: Any = None  # written into the file, for those who look for the base
    prefix_projection: bool = False  # PEFT's: the table is made by two layers, which are in no file

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_type", getattr(self.task_type, "value", self.task_type))
        object.__setattr__(self, "modules_to_save", tuple(sorted(set(self.modules_to_save or ()))))
        count = self.num_virtual_tokens
        for name, condition, expected in (
            ("num_virtual_tokens", isinstance(count, int) and count > 0, "a whole number above 0"),
            ("task_type", self.task_type in (None, *HEADS), f"None or one of {', '.join(HEADS)}"),
        ):
            if not condition:
                raise UserError(
                    f"PrefixTuningConfig: {name}: expected {expected}, got {reprlib.repr(getattr(self, name))}"
                )

    @property
    def heads(self) -> tuple[str, ...]:
        """Names that the task adds to `modules_to_save`; a model has one of them."""
        return HEADS[self.task_type] if self.task_type else ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrefixTuningConfig:
        """From what adapter_config.json holds; keys that nobody here knows are named in a warning."""
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - names - ABOUT)
        if unknown:
            warn(f"adapter_config.json: not known here, and ignored: {', '.join(unknown)}")
        if values.get("num_transformer_submodules") not in (None, 1):
            raise UserError("num_transformer_submodules: expected 1: BERT is an encoder alone")
        return cls(**{name: value for name, value in values.items() if name in names})


class Rows(NamedTuple):
    """Where a batch's rows stand once the prefix is before each sequence; the table is P prefix rows, then the N."""

    of_table: Tensor  # (N + B P,) the row of the table
    cu_seqlens: Tensor  # (B + 1,)
    real: Tensor  # (N,) where the tokens are


def rows_with_prefix(batch: Batch, count: int) -> Rows:
    """`Rows` of a batch, made once for all layers."""
    if batch.with_prefix is None:
        ends = batch.packed.cu_seqlens
        before = count * np.arange(1, len(ends))  # rows of prefixes before the end of a sequence's own
        lengths = np.diff(ends)
        real = (np.arange(ends[-1]) + np.repeat(before, lengths)).astype(np.int32)
        of_table = np.tile(np.arange(count), len(lengths))
        table = np.zeros(ends[-1] + count * len(lengths), np.int32)
        is_real = np.zeros(len(table), bool)
        is_real[real] = True
        table[is_real], table[~is_real] = count + np.arange(ends[-1]), of_table
        longer = (ends + count * np.arange(len(ends))).astype(np.int32)
        batch.with_prefix = Rows(*(batch.integers(each) for each in (table, longer, real)))
    return batch.with_prefix


class Prefix(Module):
    """Keys and values of one layer: weight (P, 2C), the keys first."""

    step: Any = None  # nothing here is drawn

    def __init__(self, layer: str, count: int, channels: int, seed: int, place: Place) -> None:
        self.weight = Parameter((count, 2 * channels), "normal", place)
        stream = Stream(seed, INITIALISATION_STREAM, 0, zlib.crc32(f"{layer}.prefix".encode()))
        self.weight.assign(standard_normal(stream, count * 2 * channels).reshape(count, -1))

    def __call__(self, qkv: Tensor, batch: Batch, **params: Any) -> Tensor:  # (N, 3C) -> (N, C)
        """Attention of every token to its sequence's and to the prefix.

        The prefix's rows are rows as others are, with queries of 0, whose outputs are left out.
        """
        count, channels = self.weight.shape[0], self.weight.shape[1] // 2
        rows = rows_with_prefix(batch, count)
        table = apply(concatenate, apply(pad_axis, self.weight, axis=1, before=channels, after=0), qkv, axis=0)
        longer = apply(gather_rows, table, rows.of_table)
        for read in (qkv, table):
            read.forget()  # their gradients are rows of others
        return apply(gather_rows, apply(attention, longer, rows.cu_seqlens, **params), rows.real)


class PrefixTuningModel(TunedModel):
    """A model with a prefix in every layer, and modules that are trained whole."""

    config_types: ClassVar[tuple[type, ...]] = (PrefixTuningConfig,)
    layers: dict[str, Prefix]
    peft_config: PrefixTuningConfig

    def __init__(self, model: PreTrained, config: PrefixTuningConfig, *, loaded: bool = False) -> None:
        super().__init__(model, config)
        if config.prefix_projection and not loaded:
            raise UserError("prefix_projection: expected False: minibert trains the keys and values themselves")
        count, positions = config.num_virtual_tokens, model.config.max_position_embeddings
        if count >= positions:
            raise UserError(f"num_virtual_tokens: expected fewer than the model's {positions} positions, got {count}")
        whole: Any = config
        within = trained_whole(model, whole, strict=not loaded)
        self.freeze({n for n, _ in model.named_parameters() if any(n.startswith(f"{one}.") for one in within)})
        found = dict(named_modules(model))
        self.places = {name: one for name, one in found.items() if isinstance(one, BertSelfAttention)}
        self.embeddings = next(one for one in found.values() if isinstance(one, BertEmbeddings))
        channels, place = model.config.hidden_size, model.place
        self.layers = {name: Prefix(name, count, channels, model.seed, place) for name in self.places}
        for name, layer in self.layers.items():
            self.places[name].prefix = layer.train(model.training)
        self.embeddings.first_position = count

    def file_name(self, name: str) -> str:
        """What PEFT writes; of each layer's keys and values, which are columns of one table there, the layer's part."""
        layers = list(self.layers)
        return (
            f"{TABLE}.{layers.index(name.removesuffix('.prefix.weight'))}" if is_added(name) else f"base_model.{name}"
        )

    def save_pretrained(self, folder: AnyPath) -> None:
        """Write adapter_config.json and adapter_model.safetensors as PEFT reads them: what is trained, and no more."""
        values, about = self.values(), self.model.config
        table = np.concatenate([values.pop(f"{TABLE}.{i}") for i in range(len(self.layers))], axis=1)
        saved = sorted({*self.peft_config.modules_to_save, *self.peft_config.heads}) or None
        config = {
            **dataclasses.asdict(self.peft_config), "peft_type": self.peft_config.peft_type, "inference_mode": True,
            "modules_to_save": saved, "prefix_projection": False, "token_dim": about.hidden_size,
            "num_layers": about.num_hidden_layers, "num_attention_heads": about.num_attention_heads,
            "encoder_hidden_size": about.hidden_size, "num_transformer_submodules": 1,
        }  # fmt: skip
        write_adapter(folder, config, {**values, TABLE: table}, self.base_sha256())

    @classmethod
    def from_pretrained(cls, model: PreTrained, folder: AnyPath, is_trainable: bool = False) -> Any:
        """Put beside a model the prefix in a folder, that of minibert or of PEFT; frozen unless `is_trainable`.

        One that PEFT made with `prefix_projection` is here, as in its file, the table that came out. Warns where
        minibert saved it beside other weights. Raises UserError where files and model do not fit.
        """
        values, arrays, base = read_adapter(folder)
        with naming(folder):
            if values.get("peft_type") != PrefixTuningConfig.peft_type:
                raise UserError(f"peft_type: expected {PrefixTuningConfig.peft_type}, got {values.get('peft_type')!r}")
            tuned = cls(model, PrefixTuningConfig.from_dict(values), loaded=True)
            return tuned.settle(tuned._by_layer(arrays), folder, base, is_trainable)

    def _by_layer(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors of a file, the table in parts for each layer where it has as many columns as it ought to."""
        parts = dict(arrays)
        table = parts.pop(TABLE, None)
        count, layers, channels = self.peft_config.num_virtual_tokens, len(self.layers), self.model.config.hidden_size
        expected = (count, 2 * layers * channels)
        if table is None or table.shape != expected:
            self.unload()
            got = "missing" if table is None else f"{table.shape}"
            raise UserError(f"{TABLE} is {got}, expected {expected} by adapter_config.json and this model")
        return parts | {f"{TABLE}.{i}": part for i, part in enumerate(np.split(table, layers, axis=1))}

    def merge_and_unload(self) -> PreTrained:
        """Raises UserError: keys and values of their own are in no weight."""
        raise UserError("a prefix cannot be merged into weights; unload() gives the model without it")

    def unload(self) -> PreTrained:
        """The plain model without the prefix (what was trained whole stays as it is); nothing is frozen any more."""
        for place in self.places.values():
            del place.prefix
        del self.embeddings.first_position
        return self.thaw()
