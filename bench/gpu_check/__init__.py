"""`python -m bench.gpu_check`: everything there is to learn on a GPU, in one run; see run.py."""
