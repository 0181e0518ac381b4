"""gelu by the tanh approximation: fast, popular, and not gelu; tanh_gelu.txt lists the checks that say so.

pytest -p minibert.conformance --kernel tanh_gelu.py:gelu=gelu --expected-failures tanh_gelu.txt
"""

import numpy as np


def gelu(x: np.ndarray, approximate: str = "none") -> np.ndarray:
    """Whatever is asked for: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). Hendrycks and Gimpel (2016), sec. 2."""
    inner = np.sqrt(2 / np.pi).astype(x.dtype) * (x + x.dtype.type(0.044715) * x * x * x)
    return x.dtype.type(0.5) * x * (1 + np.tanh(inner))
