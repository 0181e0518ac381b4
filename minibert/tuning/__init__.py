"""Parameter-efficient tuning: the model is frozen, little beside it is trained; files of other libraries in and out.

    model = get_peft_model(mb.BertForMaskedLM.from_pretrained("folder"), LoraConfig(r=8, lora_alpha=16))
    ...                                                         # train it as any model
    model.save_pretrained("adapter")                            # what was trained, and nothing else
    model = load_peft_model(mb.BertForMaskedLM.from_pretrained("folder"), "adapter")
    plain = model.merge_and_unload()                            # the updates added to the weights

LoRA, AdaLoRA and prefixes have the names and files of Hugging Face PEFT, bottleneck adapters those of `adapters`. A
training loop of one's own calls `before_update` and `update_and_allocate` around the optimiser's step.
"""

from typing import Any

from minibert.errors import path_of
from minibert.model.checkpoint import AnyPath, read_json
from minibert.model.pretrained import PreTrained
from minibert.tuning.adalora import AdaLoraModel
from minibert.tuning.adapter_model import AdapterModel
from minibert.tuning.bottleneck import BnConfig, DoubleSeqBnConfig, SeqBnConfig
from minibert.tuning.config import AdaLoraConfig, LoraConfig
from minibert.tuning.files import CONFIG
from minibert.tuning.peft_model import PeftModel
from minibert.tuning.prefix import PrefixTuningConfig, PrefixTuningModel
from minibert.tuning.tuned import TunedModel, get_peft_model

__all__ = [
    "AdaLoraConfig", "AdaLoraModel", "AdapterModel", "BnConfig", "DoubleSeqBnConfig", "LoraConfig", "PeftModel",
    "PrefixTuningConfig", "PrefixTuningModel", "SeqBnConfig", "TunedModel", "get_peft_model", "load_peft_model",
]  # fmt: skip


def load_peft_model(model: PreTrained, folder: AnyPath, is_trainable: bool = False) -> Any:
    """Put beside a model the adapter in a folder, of whichever library: by what its adapter_config.json holds.

    As `PeftModel.from_pretrained` and `AdapterModel.from_pretrained`, which say what is warned of and what is refused.
    """
    path = path_of(folder, "a folder with an adapter") / CONFIG
    values = read_json(path) if path.is_file() else {}
    kind: Any = PeftModel
    if values.get("peft_type") == PrefixTuningConfig.peft_type:
        kind = PrefixTuningModel
    elif "peft_type" not in values and "config" in values:
        kind = AdapterModel
    return kind.from_pretrained(model, folder, is_trainable)
