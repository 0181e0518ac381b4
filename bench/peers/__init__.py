"""The other side of a bench: transformers' BERT in PyTorch, onnxruntime, and formulas run on PyTorch's tensors."""
