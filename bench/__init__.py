"""Speed: `python -m bench.ops`. Whatever is printed was measured in that run."""
