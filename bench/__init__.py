"""Speed: `python -m bench.ops`. Whatever is printed was measured in that run."""

import minibert.backends  # noqa: F401  before NumPy is imported: it tells NumPy's BLAS threads not to spin
