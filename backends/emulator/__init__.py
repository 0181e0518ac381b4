"""The emulator: CUDA C compiled by g++ and run on the CPU, every memory access watched, in a process of its own."""
