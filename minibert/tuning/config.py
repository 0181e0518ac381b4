"""What is asked for in tuning, under the names of Hugging Face PEFT and of its adapter_config.json."""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar

from minibert.errors import UserError, warn

# The heads that are trained whole with a task, as PEFT adds them to modules_to_save; BERT has one of each pair.
HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "FEATURE_EXTRACTION": (),
}
BIASES = ("none", "all", "lora_only")
ABOUT = {  # keys of a file that change nothing about what it computes here
    "auto_mapping", "inference_mode", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config",
}  # fmt: skip
# Keys of PEFT that would change what is computed, and that are not known here: refused where they ask for something.
UNSUPPORTED = {
    "alora_invocation_tokens", "arrow_config", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "kasa_config", "layer_replication", "loftq_config", "lora_bias", "lora_ga_config", "megatron_config",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
    "velora_config",
}  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al., "LoRA: Low-rank adaptation of large language models", 2021): y = W x + s B A x, W frozen.

    Raises UserError for a value that is out of range and for what PEFT has and minibert has not.
    """

    peft_type: ClassVar[str] = "LORA"

    r: int = 8  # rank of B A
    lora_alpha: float = 8  # s = lora_alpha / r
    target_modules: Any = ("query", "value")  # ends of names of linear layers; one string: a regex, or "all-linear"
    lora_dropout: float = 0.0  # of x, before A
    bias: str = "none"  # which biases are trained as well: "none", "all", or "lora_only", of the targets
    use_rslora: bool = False  # s = lora_alpha / sqrt(r) (Kalajdzievski 2023), so that a high rank does not learn slower
    modules_to_save: Any = None  # ends of names of modules that are trained whole; the task's head is added
    init_lora_weights: Any = True  # True: A uniform and B 0; "gaussian": A normal and B 0; False: B uniform too
    layers_to_transform: Any = None  # numbers of the layers whose modules are targets; None: of all
    layers_pattern: Any = None  # the name before that number, where it is not the first
    exclude_modules: Any = None  # what is no target though target_modules says so
    rank_pattern: Any = field(default_factory=dict)  # another r by the end of a name (a regex)
    alpha_pattern: Any = field(default_factory=dict)  # another lora_alpha, likewise
    task_type: Any = (
        None  # SEQ_CLS, TOKEN_CLS, QUESTION_ANS: its head is trained whole; FEATURE_EXTRACTION or None: none
    )
    base_model_name_or_path: Any = None  # written into the file, for those who look for the base
    fan_in_fan_out: bool = False  # PEFT's, refused where True, as are the next
    use_dora: bool = False
    lora_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("target_modules", "modules_to_save", "layers_pattern", "exclude_modules"):
            self._set(name, _names(name, getattr(self, name)))
        self._set("task_type", getattr(self.task_type, "value", self.task_type))
        if isinstance(self.layers_to_transform, int):
            self._set("layers_to_transform", (self.layers_to_transform,))
        for name in ("rank_pattern", "alpha_pattern"):
            self._set(name, dict(getattr(self, name) or {}))
        for name in sorted(UNSUPPORTED & vars(self).keys()):
            self._demand(not getattr(self, name), name, "False: minibert has no such thing")
        self._demand_ranks()
        self._demand(_is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1, "lora_dropout", "a share in [0, 1)")
        self._demand(self.bias in BIASES, "bias", " or ".join(map(repr, BIASES)))
        self._demand(
            self.init_lora_weights in (True, False, "gaussian"), "init_lora_weights", "True, False, 'gaussian'"
        )
        self._demand(self.task_type in (None, *HEADS), "task_type", f"None or one of {', '.join(HEADS)}")
        self._demand(self.target_modules not in (None, ()), "target_modules", "names such as ['query', 'value']")
        if isinstance(self.target_modules, str):
            self._demand_regex("target_modules", self.target_modules)
            self._demand(self.layers_to_transform is None, "layers_to_transform", "None beside a regex of targets")
        if isinstance(self.exclude_modules, str):
            self._demand_regex("exclude_modules", self.exclude_modules)

    def _demand_ranks(self) -> None:
        for name, value in (("r", self.r), *(("rank_pattern", rank) for rank in self.rank_pattern.values())):
            self._demand(_is_whole(value) and value > 0, name, "a whole number above 0")
        for name, value in (
            ("lora_alpha", self.lora_alpha),
            *(("alpha_pattern", a) for a in self.alpha_pattern.values()),
        ):
            self._demand(_is_number(value) and value > 0, name, "a number above 0")
        for name, pattern in (*self.rank_pattern.items(), *self.alpha_pattern.items()):
            self._demand(isinstance(pattern, Real), "rank_pattern", f"numbers by name, not {name!r}")
            self._demand_regex("rank_pattern or alpha_pattern", name)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _demand(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise UserError(
                f"{type(self).__name__}: {name}: expected {expected}, got {reprlib.repr(getattr(self, name))}"
            )

    def _demand_regex(self, name: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{type(self).__name__}: {name}: {pattern!r} is no regex: {error}") from None

    @property
    def heads(self) -> tuple[str, ...]:
        """Names that the task adds to `modules_to_save`; a model has one of them."""
        return HEADS[self.task_type] if self.task_type else ()

    def to_dict(self) -> dict[str, Any]:
        """As adapter_config.json holds it."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        saved = sorted({*(self.modules_to_save or ()), *self.heads}) or None
        return {**values, "modules_to_save": saved, "peft_type": self.peft_type, "inference_mode": True}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any:
        """From what adapter_config.json holds; keys that nobody here knows are named in a warning.

        Raises UserError for a kind that is not known, for what is not supported, and for values that are out of range.
        """
        kind = values.get("peft_type")
        found = next((one for one in (cls, *cls.__subclasses__()) if one.peft_type == kind), None)
        if found is None:
            known = ", ".join(one.peft_type for one in (cls, *cls.__subclasses__()))
            raise UserError(f"peft_type: expected one of {known}, got {kind!r}")
        names = {one.name for one in dataclasses.fields(found)}
        asked = sorted(name for name in UNSUPPORTED & values.keys() if values[name])
        if asked:
            raise UserError(f"{asked[0]} is not supported: expected it to be absent or false, got {values[asked[0]]!r}")
        unknown = sorted(values.keys() - names - UNSUPPORTED - ABOUT)
        if unknown:
            warn(f"adapter_config.json: not known here, and ignored: {', '.join(unknown)}")
        given = {name: value for name, value in values.items() if name in names}
        return found(**{name: value for name, value in given.items() if value is not None or name != "target_modules"})


def _names(field_name: str, given: Any) -> Any:
    """A string, or a sorted tuple of names: PEFT writes a set."""
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, list | tuple | set | frozenset) or not all(isinstance(one, str) for one in given):
        raise UserError(f"{field_name}: expected names, got {reprlib.repr(given)}")
    return tuple(sorted(set(given)))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class AdaLoraConfig(LoraConfig):
    """AdaLoRA (Zhang et al., "Adaptive budget allocation for parameter-efficient fine-tuning", 2023).

    y = W x + s B diag(E) A x, of which the least important triplets of a column of B, an entry of E and a row of A are
    pruned, until `target_r` are left in a layer on average. s = lora_alpha / init_r, whatever is pruned.
    """

    peft_type: ClassVar[str] = "ADALORA"

    target_r: int = 8  # triplets that are left in the end, on average
    init_r: int = 12  # triplets of each layer at the beginning
    tinit: int = 0  # steps before anything is pruned
    tfinal: int = 0  # steps at the end in which the ranks stay
    deltaT: int = 1  # steps from one pruning to the next
    beta1: float = 0.85  # of the average of the sensitivity
    beta2: float = 0.85  # of the average of its uncertainty
    orth_reg_weight: float = 0.5  # of the term that keeps A and B orthogonal
    total_step: Any = None  # steps of the whole training; it must be known before

    def _demand_ranks(self) -> None:
        whole = {"target_r": 1, "init_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}
        for name, least in whole.items():
            value = getattr(self, name)
            self._demand(_is_whole(value) and value >= least, name, f"a whole number from {least}")
        self._demand(
            _is_whole(self.total_step) and self.total_step > 0, "total_step", "the steps of the whole training"
        )
        self._demand(self.target_r <= self.init_r, "target_r", f"at most init_r, {self.init_r}")
        self._demand(
            self.tinit < self.total_step - self.tfinal, "tinit", "less than total_step - tfinal: nothing is pruned"
        )
        for name in ("beta1", "beta2"):
            self._demand(_is_number(getattr(self, name)) and 0 < getattr(self, name) < 1, name, "a number in (0, 1)")
        self._demand(_is_number(self.lora_alpha) and self.lora_alpha > 0, "lora_alpha", "a number above 0")
        self._demand(
            _is_number(self.orth_reg_weight) and self.orth_reg_weight >= 0, "orth_reg_weight", "a number from 0"
        )
        for name in ("use_rslora", "alpha_pattern"):
            self._demand(not getattr(self, name), name, "nothing: AdaLoRA has one scaling for all layers")
        self._demand(
            all(
                isinstance(kept, list) and all(isinstance(one, bool) for one in kept) and len(kept) == self.init_r
                for kept in self.rank_pattern.values()
            ),
            "rank_pattern", f"a list of {self.init_r} times true or false for each layer",
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As adapter_config.json holds it."""
        return {**super().to_dict(), "rank_pattern": self.rank_pattern or None}
