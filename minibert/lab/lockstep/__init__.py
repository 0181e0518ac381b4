"""Two sides on the same steps: trace (a recorded step), assess (how far apart, how wrong), diff (one step, call by
call), drift (a run), bisect (its first wrong step) and reproduce (its smallest inputs, and a test of them)."""
