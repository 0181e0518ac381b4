"""What `minibert` has. Each name is imported where it is first used (`lazy_loader`): a command loads what it needs."""

from . import backends, data, kernels, tasks, train, tuning
from .errors import UserError
from .model.bert import BertForMaskedLM, BertForPreTraining, BertModel
from .model.config import BertConfig, ElectraConfig
from .model.electra import (
    ElectraForMaskedLM,
    ElectraForPreTraining,
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
    ElectraModel,
)
from .model.heads import (
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from .model.tensor import Tensor, apply, no_grad
from .tasks.pipeline import pipeline
from .tasks.sentences import SentenceTransformer
from .train.optim import AdamW

__version__: str
__all__ = [
    "AdamW", "BertConfig", "BertForMaskedLM", "BertForNextSentencePrediction", "BertForPreTraining",
    "BertForQuestionAnswering", "BertForSequenceClassification", "BertForTokenClassification", "BertModel",
    "ElectraConfig", "ElectraForMaskedLM", "ElectraForPreTraining", "ElectraForQuestionAnswering",
    "ElectraForSequenceClassification", "ElectraForTokenClassification", "ElectraModel", "SentenceTransformer",
    "Tensor", "UserError", "apply", "backends", "data", "kernels", "no_grad", "pipeline", "tasks", "train", "tuning",
]  # fmt: skip
