// What kernels compiled for the emulator call in its process. The process exports these symbols; a kernel's shared
// library binds to them when it is loaded. `file` and `line` say where in the source a thread stands: lanes that meet
// in one collective must have come to the same place.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_emulator {

// Dynamic shared memory lies at one address, so that `extern __shared__ float rows[];` is a constant pointer.
constexpr uintptr_t dynamic_shared_address = 0x5f0000000000;
constexpr size_t shared_bytes_limit = 227 * 1024;

enum class Shuffle { indexed, up, down, exclusive_or };
enum class Reduce { none, add, minimum, maximum, minimum_unsigned, maximum_unsigned, all, any, exclusive_or };
enum class Collective { synchronise, shuffle, ballot, reduce, match, exchange };
enum class Barrier { plain, any, all, count };

using KernelEntry = void (*)(void** arguments);

}  // namespace cuda_emulator

extern "C" {

// --- threads: each call returns when the others have come ---

int cuda_emulator_barrier(cuda_emulator::Barrier kind, int predicate, const char* file, int line);
uint64_t cuda_emulator_shuffle(uint64_t value, uint32_t mask, cuda_emulator::Shuffle mode, int operand, int width,
                               const char* file, int line);
uint32_t cuda_emulator_ballot(uint32_t mask, int predicate, const char* file, int line);
uint32_t cuda_emulator_reduce(uint32_t mask, uint32_t value, cuda_emulator::Reduce operation, const char* file,
                              int line);
uint32_t cuda_emulator_match(uint32_t mask, uint64_t value, const char* file, int line);
void cuda_emulator_synchronise_warp(uint32_t mask, const char* file, int line);
const void* cuda_emulator_exchange(uint32_t mask, const void* value, unsigned bytes, const char* file, int line);
unsigned cuda_emulator_lane();

// --- memory ---

// The next access is atomic: watched as one that orders itself with other atomics.
void cuda_emulator_atomic(const volatile void* address, unsigned bytes, void* pc);
// What the thread has written is handed over by its next atomic: to the device, or to its block.
void cuda_emulator_fence(int for_device);
void cuda_emulator_copy_async(void* to, const void* from, unsigned bytes, unsigned zeros);
void cuda_emulator_copy_async_commit();
void cuda_emulator_copy_async_wait(unsigned groups_left);

// A mistake of the kernel that the header itself sees; the launch goes on.
void cuda_emulator_fail(const char* kind, const char* detail);
[[noreturn]] void cuda_emulator_trap();

// --- what a library tells of its kernels while it is loaded ---

void cuda_emulator_kernel(const char* name, cuda_emulator::KernelEntry entry);
void cuda_emulator_argument(const char* kind, const char* element, int is_const, unsigned bytes);
}
