// One launch: what was asked for, and the loaded libraries that hold kernels.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda_emulator_interface.h"
#include "symbols.h"

namespace emulator {

struct Extent {
    uint32_t x = 1;
    uint32_t y = 1;
    uint32_t z = 1;

    uint64_t count() const { return uint64_t(x) * y * z; }
    Extent at(uint64_t index) const {
        return {uint32_t(index % x), uint32_t(index / x % y), uint32_t(index / x / y)};
    }
};

// One kernel argument, as the compiler saw its type.
struct Argument {
    std::string kind;     // "pointer", "struct", or a scalar: "f4", "i4", "u8"
    std::string element;  // of a pointer: "f4", "f2", "b2", ...
    bool is_const;
    unsigned bytes;
};

// One library of kernels, and where it keeps its variables.
struct Module {
    uintptr_t begin = 0;  // of all that the library maps
    uintptr_t end = 0;
    uintptr_t data = 0;  // writable: __device__ and __constant__ variables
    size_t data_bytes = 0;
    uintptr_t shared = 0;  // static __shared__ variables of all its kernels
    size_t shared_bytes = 0;
};

struct Kernel {
    std::string name;
    cuda_emulator::KernelEntry entry;
    std::vector<Argument> arguments;
    size_t module;
    std::vector<SharedVariable> shared = {};  // static ones that it may use
    size_t shared_bytes = 0;                  // of these
    bool owns_guard(size_t offset) const;
};

enum class Schedule : uint32_t { forward, reverse, random };

struct Launch {
    const Kernel* kernel = nullptr;
    Extent grid;
    Extent block;
    uint32_t shared_bytes = 0;
    bool sanitise = false;
    bool traffic = false;
    Schedule schedule = Schedule::forward;
    uint64_t seed = 0;
    std::vector<void*> arguments;
    uint64_t blocks_ended = 0;
};

extern Launch launch;
extern std::vector<Module> modules;
extern std::vector<Kernel> kernels;

// Load a library; the kernels it registers are appended to `kernels`. Returns an error message, or "".
std::string load_module(const std::string& path);

// Run the whole grid. Returns an error message where the launch is refused, or "".
std::string run_launch();

}  // namespace emulator
