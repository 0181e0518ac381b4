"""The backend `cupy`: CUDA kernels on an NVIDIA GPU."""

from minibert.backends.cuda.backend import CudaBackend
from minibert.backends.cuda.cupy_driver import CupyDriver

backend = CudaBackend(CupyDriver())
