"""Trials that anyone can run for as long as they wish: `python -m tests.torture`. CI runs a part of them."""
