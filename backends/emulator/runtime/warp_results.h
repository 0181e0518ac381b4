// What each lane gets out of a collective of its warp, once all have come.
#pragma once

#include <cstdio>
#include <string>

#include "threads.h"

namespace emulator {

// Fill in `result`, or `snapshot`, of every lane that takes part; `lanes` are the threads of the warp.
void compute_results(Thread* lanes, uint32_t taking_part);

inline Event event_of(const Thread& thread) {
    return {thread.request.pc, "", current_block, thread.index};
}

template <class... Values>
std::string text(const char* format, Values... values) {
    char line[400];
    std::snprintf(line, sizeof line, format, values...);
    return line;
}

}  // namespace emulator
