"""Parameter-efficient tuning: the model is frozen, little beside it is trained. Files are Hugging Face PEFT's.

model = get_peft_model(mb.BertForMaskedLM.from_pretrained("folder"), LoraConfig(r=8, lora_alpha=16))
...                                                         # train it as any model
model.save_pretrained("adapter")                            # what was trained, and nothing else
model = PeftModel.from_pretrained(mb.BertForMaskedLM.from_pretrained("folder"), "adapter")
plain = model.merge_and_unload()                            # the updates added to the weights
"""

from minibert.tuning.adalora import AdaLoraModel
from minibert.tuning.config import AdaLoraConfig, LoraConfig
from minibert.tuning.peft_model import PeftModel, get_peft_model

__all__ = ["AdaLoraConfig", "AdaLoraModel", "LoraConfig", "PeftModel", "get_peft_model"]
