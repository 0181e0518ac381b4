"""What a search looks through: settings of FineTuningConfig, each with a range or some values, as text and back.

read_space(["learning-rate=1e-5..1e-3:log", "num-train-epochs=2,3,4"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from minibert.errors import UserError
from minibert.tasks.finetune import FineTuningConfig

# What a search may change: what a run is judged by, or draws by, is the same in all of them.
SEARCHED = (
    "learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_seq_length", "warmup_ratio", "weight_decay", "max_grad_norm", "layerwise_lr_decay", "freeze", "class_weights",
    "peft", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "num_virtual_tokens",
)  # fmt: skip
HINTS = get_type_hints(FineTuningConfig)


@dataclass(frozen=True)
class Between:
    """Numbers from `low` to `high`, both among them; whole where both are; with `log`, as many to each power of ten."""

    low: float
    high: float
    log: bool = False

    def __str__(self) -> str:
        return f"{self.low!r}..{self.high!r}{':log' * self.log}"

    @property
    def ends(self) -> tuple[Any, ...]:
        return self.low, self.high

    def suggest(self, trial: Any, name: str) -> Any:
        """A value, of a trial of Optuna."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        return (trial.suggest_int if whole else trial.suggest_float)(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Among:
    """One of some values."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        between = "|" if any("," in str(value) for value in self.values) else ","
        return between.join(value if isinstance(value, str) else repr(value) for value in self.values)

    @property
    def ends(self) -> tuple[Any, ...]:
        return self.values

    def suggest(self, trial: Any, name: str) -> Any:
        return trial.suggest_categorical(name, self.values)


Space = Mapping[str, Between | Among]


def read_space(texts: Sequence[str]) -> Space:
    """The settings of `NAME=LOW..HIGH`, `NAME=LOW..HIGH:log` and `NAME=VALUE,VALUE`, or `|` where values hold commas.

    Raises UserError for an unknown name, one that comes twice, and values that its setting does not take.
    """
    space: dict[str, Between | Among] = {}
    for text in texts:
        given, equals, values = text.partition("=")
        name = given.strip().replace("-", "_")
        if not equals or not values.strip():
            raise UserError(f"--space: expected NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=VALUE,VALUE, got {text!r}")
        if name not in SEARCHED:
            raise UserError(f"--space: expected one of {', '.join(map(option, SEARCHED))}, got {given!r}")
        if name in space:
            raise UserError(f"--space: {option(name)} is there twice: give it once")
        space[name] = read_values(name, values.strip())
    return space


def read_values(name: str, text: str) -> Between | Among:
    kind = next(each for each in get_args(HINTS[name]) or (HINTS[name],) if each is not type(None))
    low, dots, high = text.partition("..")
    if dots and kind is not str:
        high, colon, log = high.partition(":")
        found = Between(read_value(name, low, kind), read_value(name, high, kind), log == "log")
        if (colon and log != "log") or not found.low < found.high or (found.log and found.low <= 0):
            raise UserError(
                f"--space {option(name)}: expected LOW..HIGH or LOW..HIGH:log, LOW below HIGH and with :log above 0, "
                f"got {text!r}"
            )
        return found
    values = tuple(read_value(name, value, kind) for value in text.split("|" if "|" in text else ","))
    if len(values) < 2 or len(set(values)) < len(values):
        raise UserError(
            f"--space {option(name)}: expected two values or more, each once, got {text!r}: "
            f"what is the same in all trials is an option, --{option(name)}"
        )
    return Among(values)


def read_value(name: str, text: str, kind: type) -> Any:
    """A value that the setting takes. Raises UserError for any other."""
    try:
        value = kind(text.strip())
    except ValueError:
        what = {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"--space {option(name)}: expected {what}, got {text.strip()!r}") from None
    try:
        FineTuningConfig(**{name: value})
    except UserError as error:
        raise UserError(f"--space {option(name)}: {error}") from None
    return value


def usual_space(peft: str = "") -> Space:
    """What is searched where nothing is named: around the values of Devlin et al. (2018), appendix A.3; what is trained
    beside a frozen model takes a higher learning rate."""
    return {
        "learning_rate": Between(1e-4, 3e-3, log=True) if peft else Between(1e-5, 2e-4, log=True),
        "num_train_epochs": Among((2.0, 3.0, 4.0)),
        "per_device_train_batch_size": Among((8, 16, 32)),
    }


def option(name: str) -> str:
    return name.replace("_", "-")
