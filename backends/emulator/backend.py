"""The backend `emulator`: CUDA kernels on the CPU, each step of them looked at."""

from minibert.backends.cuda.backend import CudaBackend
from minibert.backends.emulator.driver import EmulatorDriver

backend = CudaBackend(EmulatorDriver())
