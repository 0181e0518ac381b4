// Whether an access is ordered after one recorded before it, by a barrier or a warp collective.
#pragma once

#include "shadow.h"

namespace emulator {

// Where the running thread stands; floors are the smallest records of their kind.
struct Now {
    uint64_t stamp = 0;           // the upper part of its records
    uint64_t launch_floor = 0;    // of this launch
    uint64_t block_floor = 0;     // of this block
    uint64_t interval_floor = 0;  // since its last barrier
};

extern Now now;

bool unordered(uint64_t before, uint64_t after);

// Two records of one address, at least one of them a write, that nothing orders. What lies below `floor` does not
// count: for global memory what earlier launches did, for shared memory what other blocks did with theirs.
inline bool races(uint64_t before, uint64_t after, uint64_t floor) {
    if (before < floor) {
        return false;
    }
    if (before - now.block_floor < now.interval_floor - now.block_floor) {
        return false;  // of this block, before its last barrier
    }
    if ((before ^ after) >> thread_shift == 0) {
        return false;  // the thread itself
    }
    return unordered(before, after);
}

Event event_of_record(uint64_t record, const char* access);

}  // namespace emulator
