"""Fine-tuning on real data beside transformers and torch, a command for each task."""
