"""A run's log as Weights & Biases reads it: one offline run, written from the log when the training ends.

Not line by line as it goes: what wandb has not yet flushed is lost with the process, and an offline run that is gone on
with becomes two, of which the one uploaded last replaces the other. The log holds everything.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minibert.errors import UserError, pip_install
from minibert.train.log import read_log
from minibert.train.tensorboard import numbers_in

FOLDER = "wandb"  # in the run's, where `wandb sync` looks for it


def wandb_library() -> Any:
    """The module. Raises UserError where it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError(f"a run of Weights & Biases needs wandb: {pip_install('[wandb]')}") from None
    return wandb


def write_offline_run(folder: Path, project: str, config: Mapping[str, Any]) -> Path:
    """Write the log in a run's folder as an offline run, in place of an earlier one, under the same id. Gives its path.

    It is named by the folder, and its metrics as TensorBoard's are; nothing goes over the network.
    """
    wandb = wandb_library()
    earlier = sorted((folder / FOLDER).glob("offline-run-*-*"))
    settings = wandb.Settings(
        mode="offline", silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True,
        x_disable_meta=True,
    )  # fmt: skip
    with wandb.init(
        project=project, id=earlier[-1].name.rpartition("-")[2] if earlier else None, name=folder.resolve().name,
        config=dict(config), dir=folder, settings=settings,
    ) as run:  # fmt: skip
        for record in read_log(folder):
            run.log(numbers_in(record), step=record["step"])
        written = Path(run.dir).parent
    for path in earlier:
        if path.resolve() != written.resolve():
            shutil.rmtree(path)
    return written
