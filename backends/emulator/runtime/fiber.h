// A fiber: a stack of its own that gives way only when asked to. Every CUDA thread of a block is one.
#pragma once

#include <cstddef>

namespace emulator {

// Lay out a new stack so that the first switch to it calls `entry`, which must never return.
void* prepare_fiber(char* stack, size_t bytes, void (*entry)());

}  // namespace emulator

// Keep this stack's place in `*left`, and go on where `entered` was left.
extern "C" void emulator_switch_fiber(void** left, void* entered);
