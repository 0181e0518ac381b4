"""What the op families' cpu.py share: jit (compiling and its cache), threads and team (running rows on all cores), math
(exp, erf, tanh, Philox), vectors, microkernel and product (matrix products), arrays. guard_pages and
guard_bounds are for a process in which a kernel is tried. No op is defined here."""
