// A launch that takes longer than it may is stopped, and where its threads stand is told.
#pragma once

#include <cstdint>
#include <string>

namespace emulator {

void prepare_time_limit();

// From now on the launch has so many milliseconds of computing. Then `tell` gets a JSON object, and the process ends.
void limit_time(uint32_t milliseconds, void (*tell)(const std::string& reply));

void end_time_limit();

}  // namespace emulator
