"""CUDA: one backend, over a driver that is a GPU (`cupy_driver`) or a program that plays one (`backends.emulator`)."""
