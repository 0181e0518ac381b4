// The arena of device memory, shared with Python: which parts of it are allocated.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulator {

enum class RegionState : uint32_t { unwritten, freed, written };

constexpr uintptr_t arena_address = 0x600000000000;  // the same in every run, so that findings are

void map_arena(int memory_fd, size_t bytes);

// Returns an error message, or "".
std::string set_region(uint64_t address, uint64_t bytes, RegionState state);

struct Neighbour {
    bool freed;
    std::string detail;
};

// What lies nearest to bytes that belong to no region.
Neighbour nearest_region(uintptr_t address, unsigned bytes);

// Whether the processor lets these bytes be touched.
bool pages_accessible(uintptr_t address, unsigned bytes);

}  // namespace emulator
