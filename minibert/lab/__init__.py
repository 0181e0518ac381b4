"""The laboratory: is a kernel right, which side of two is wrong and since when, and how near is it to the limit.

`conform` judges one call, `lockstep` one step or run on two sides, `measure` time, memory and energy, and `compare` all
backends on one step. Nothing here prints: `cli` and `page` do.
"""
