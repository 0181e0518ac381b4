// Where threads wait for each other: warp collectives and the barrier of the block.
#pragma once

#include "threads.h"

namespace emulator {

// Complete the collectives of a warp for which every lane named has come.
void release_any(unsigned warp);

// Every thread that is left stands at the barrier: true. All are done, or some will wait for ever: false.
bool all_at_barrier(Thread* threads, unsigned count);

// Stop the running thread in this state until the others have come.
void wait_for_others(State state);

void drop_snapshot(Thread& thread);
size_t snapshot_pool_bytes();
void keep_snapshots_in(char* memory);

}  // namespace emulator
