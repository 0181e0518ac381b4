// Hand-overs: what one thread has written and another may read without a barrier of the block between them.
//
// CUDA C++ programming guide, "Memory Fence Functions": a thread writes, calls __threadfence, and then changes a place
// by an atomic; who finds that change by an atomic of its own may read what was written before. So the last of many
// blocks adds up what all have left. What a barrier orders before the fence, or after the atomic, is included.
#pragma once

#include <cstdint>

namespace emulator {

void forget_handovers();        // at the beginning of a launch
void begin_block_handovers();   // at the beginning of a block
void fence(bool for_device);    // the running thread's; else for its block only
void meet_at(uintptr_t place);  // an atomic of the running thread

// Whether the running thread has been handed over what this record tells of.
bool handed_over(uint64_t record);

}  // namespace emulator
