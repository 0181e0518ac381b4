// Asynchronous copies from global to shared memory (cp.async): the bytes arrive when the thread waits for them.
#pragma once

CUDA_EMULATOR_INLINE void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
    cuda_emulator_copy_async(to, from, unsigned(bytes), unsigned(zeros));
}
CUDA_EMULATOR_INLINE void __pipeline_commit() { cuda_emulator_copy_async_commit(); }
CUDA_EMULATOR_INLINE void __pipeline_wait_prior(unsigned groups_left) { cuda_emulator_copy_async_wait(groups_left); }
