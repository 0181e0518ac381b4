"""Training: the optimiser, the trainer with its configuration, the guard against NaN, and steps as captured graphs.

    data = prepare(read_documents(["speeches.txt"]), tokenizer, config)
    for kind, record in Trainer(model, data, config, "folder").run():
        print(kind, record)

What a model computes is `model`, what it is trained on `data`.
"""

from minibert.train.config import TrainingConfig
from minibert.train.log import read_log
from minibert.train.optim import AdamW, linear_schedule, parameter_groups
from minibert.train.trainer import Trainer, prepare

__all__ = ["AdamW", "Trainer", "TrainingConfig", "linear_schedule", "parameter_groups", "prepare", "read_log"]
