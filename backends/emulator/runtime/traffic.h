// How memory is moved: for every place in the code, the requests of its warps and what they cost.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "shadow.h"

namespace emulator {

// The n-th time that the lanes of a warp come to one place in the code is one request.
void count_access(const Space& space, uintptr_t address, unsigned bytes, bool writes, uintptr_t pc);

// Add up the requests of the block that has run.
void finish_block_traffic();
void forget_traffic();
std::string traffic_json();

}  // namespace emulator
