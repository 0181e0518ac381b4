// Shadow memory: for every two bytes that kernels can reach, who wrote and who read them last.
#pragma once

#include <cstddef>
#include <cstdint>

#include "findings.h"

namespace emulator {

// A record of one access is 64 bits: interval (24), thread of the block (10), epoch of the lane (14), place in the
// code (13), atomic (1), which of the two bytes (2). Intervals lie between the barriers of a block and are numbered
// through all blocks and launches, so that records of the past need not be erased: a smaller number tells them.
constexpr unsigned place_shift = 3;
constexpr unsigned epoch_shift = 16;
constexpr unsigned thread_shift = 30;
constexpr unsigned interval_shift = 40;
constexpr uint64_t both_bytes = 3;
constexpr uint64_t atomic_bit = 4;
constexpr uint32_t most_places = 1 << 13;
constexpr uint32_t most_epochs = (1 << 14) - 1;
constexpr uint32_t most_intervals = (1 << 24) - 1;

// Two reads would not always show a race: `sibling` is by another lane of the warp of `read`, `stranger` by another
// warp or, rather, another block.
struct Cell {
    uint64_t write;
    uint64_t read;
    uint64_t sibling;
    uint64_t stranger;
};

// Memory of one kind. A state has eight bytes in two masks: bits 0 to 7 the bytes that have been written, bits 8 to 15
// those that belong to a region.
struct Space {
    uintptr_t base = 0;
    size_t bytes = 0;
    uint16_t* states = nullptr;
    Cell* cells = nullptr;
    const char* name = "";
    bool of_block = false;  // shared memory: each block has its own
};

extern Space global_space;
extern Space dynamic_space;  // dynamic shared memory
extern Space static_space;   // static shared memory
extern Space module_space;   // __device__ and __constant__ variables
extern bool watching;        // whether the hooks look at accesses

// Reserve shadow for a space; it takes memory only where it is used.
void make_space(Space& space, const char* name, uintptr_t base, size_t bytes, bool of_block = false);

// Make bytes part of a region or not, written or not.
void set_bytes(Space& space, size_t offset, size_t bytes, bool valid, bool written);

void begin_launch_intervals();
void begin_block_interval(uint32_t block);
void begin_interval();

// Keep at hand what records of the running thread begin with.
void stamp_thread();

// The place of a pc in records, and back.
uint32_t place_of(uintptr_t pc);
uintptr_t pc_of_place(uint32_t place);

}  // namespace emulator
