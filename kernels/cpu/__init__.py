"""What the op families' cpu.py share: jit (compiling and its cache), threads and team (running rows on all cores), math
(exp, erf, tanh, Philox), vectors, microkernel and product (matrix products), arrays. No op is defined here."""
