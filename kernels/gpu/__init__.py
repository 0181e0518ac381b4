"""What the op families' gpu.py and gpu.cu share: launch (a kernel's signature, grid and arguments) and the headers
gpu_*.cuh. No driver: how a launch reaches a device or the emulator is `backends/cuda/` and `backends/emulator/`."""
