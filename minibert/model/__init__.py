"""The model: tensors with gradients, modules, BERT and its configuration, packed batches, and what is read and written.

From below: values (what tensors share with arrays), tensor (the tape), packing (batches without padding), nn (modules),
config, matching (a file's names and the model's), checkpoint (files), outputs, recompute, pretrained (from_pretrained,
save_pretrained), bert. No text, no optimiser: those are `data` and `train`.
"""
