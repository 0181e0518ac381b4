// What kernels call by name apart from collectives: asynchronous copies, and ways to say that something is wrong.
#include <cstdio>
#include <cstring>

#include "cuda_emulator_interface.h"
#include "shadow.h"
#include "threads.h"
#include "watch.h"

using emulator::current;

extern "C" {

// The bytes arrive when the thread waits for them: until then they count as never written, and are NaN.
void cuda_emulator_copy_async(void* to, const void* from, unsigned bytes, unsigned zeros) {
    const auto address = reinterpret_cast<uintptr_t>(to);
    void* pc = __builtin_return_address(0);
    if (address % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
        emulator::report({"misaligned access", emulator::here(reinterpret_cast<uintptr_t>(pc), "write"), bytes,
                          "shared", {}, "both addresses of an asynchronous copy must be multiples of its size"});
    }
    emulator::watch_write(to, bytes, pc);
    for (emulator::Space* space : {&emulator::dynamic_space, &emulator::static_space}) {
        if (address - space->base < space->bytes) {
            emulator::set_bytes(*space, address - space->base, bytes, true, false);
        }
    }
    std::memset(to, 0xff, bytes);
    current->copies.push_back({to, from, bytes, zeros, pc});
}

void cuda_emulator_copy_async_commit() {
    current->groups.push_back(current->copies);
    current->copies.clear();
}

void cuda_emulator_copy_async_wait(unsigned groups_left) {
    while (current->groups.size() > groups_left) {
        for (const auto& copy : current->groups.front()) {
            const unsigned copied = copy.bytes - copy.zeros;
            emulator::watch_read(copy.from, copied, copy.pc);
            emulator::watch_write(copy.to, copy.bytes, copy.pc);
            std::memcpy(copy.to, copy.from, copied);
            std::memset(static_cast<char*>(copy.to) + copied, 0, copy.zeros);
        }
        current->groups.erase(current->groups.begin());
    }
}

void cuda_emulator_fail(const char* kind, const char* detail) {
    emulator::report({kind, emulator::here(reinterpret_cast<uintptr_t>(__builtin_return_address(0))), 0, "", {}, detail});
}

void cuda_emulator_trap() {
    emulator::report({"trap", emulator::here(reinterpret_cast<uintptr_t>(__builtin_return_address(0))), 0, "", {},
                      "the kernel gave up by __trap()"});
    emulator::abandon_launch();
}

// -fsanitize=bounds-strict: an index beyond an array whose size the compiler knows, in registers or shared memory.
void __ubsan_handle_out_of_bounds(void*, void* index) {
    char detail[80];
    std::snprintf(detail, sizeof detail, "index %ld of an array that the kernel declares smaller",
                  static_cast<long>(reinterpret_cast<intptr_t>(index)));
    emulator::report({"out of bounds", emulator::here(reinterpret_cast<uintptr_t>(__builtin_return_address(0))), 0, "",
                      {}, detail});
}

// -fsanitize=integer-divide-by-zero: what a GPU goes on with is some number; a CPU would end the process.
void __ubsan_handle_divrem_overflow(void*, uintptr_t, uintptr_t) {
    emulator::report({"integer division by zero",
                      emulator::here(reinterpret_cast<uintptr_t>(__builtin_return_address(0))), 0, "", {},
                      "a GPU gives no number that can be relied on"});
    emulator::abandon_launch();
}

// -fsanitize=float-cast-overflow: GPUs take the nearest integer, and 0 for NaN; a CPU has its own number for all.
void __ubsan_handle_float_cast_overflow(void*, uintptr_t) {
    emulator::report({"float beyond an integer",
                      emulator::here(reinterpret_cast<uintptr_t>(__builtin_return_address(0))), 0, "", {},
                      "converted as a CPU does; a GPU gives the nearest integer, and 0 for NaN"});
}

// assert() of a kernel: found here before the C library's, which would end the process.
[[noreturn]] void __assert_fail(const char* expression, const char*, unsigned, const char*) noexcept {
    emulator::report({"assertion failed", emulator::here(reinterpret_cast<uintptr_t>(__builtin_return_address(0))),
                      0, "", {}, expression});
    emulator::abandon_launch();
}
}
